"""What the registry tells of a name: its entry, and the outcome of a put.

Knows nothing of how names are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.errors import Finding
from adapters.records import Mover


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a generation without reading its weights; with findings it cannot be served."""

    nbytes: int = 0  # of the two files as stored
    rank: int = 0
    modules: tuple[str, ...] = ()
    base_model: str = ""
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """One name, at one moment."""

    name: str
    generation: str  # "" when the name's file is broken
    revision: int
    created: int  # unix seconds
    updated: int
    nbytes: int  # of the two files as stored
    rank: int  # the largest of any module
    modules: tuple[str, ...]  # short names of the targets, sorted
    base_model: str  # as the adapter's config names it; nothing depends on it
    state: Literal["ready", "incompatible"]
    references: int  # held on the present generation, under whatever name
    findings: tuple[Finding, ...]
    mover: Mover | None = None  # of the present revision; None when the name's file is broken


@dataclass(frozen=True, slots=True)
class Put:
    """The outcome of a put: `created` is False when the name had this very content already."""

    entry: Entry
    created: bool
