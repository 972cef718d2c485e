"""What a name points at, and how that is written: one small JSON file per name.

Knows nothing of files on disk or of what a generation holds.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from adapters.errors import AdapterError

SCHEMA = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE = "use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit"
GENERATION = re.compile(r"[0-9a-f]{64}")

Mover = Literal[
    "client",  # an upload or a rollback
    "start",  # a folder that the server was started with
]


class BrokenRecordError(Exception):
    """A name's file that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A generation that a name points at, with its share of the traffic."""

    generation: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Version:
    """One revision of a name."""

    revision: int
    generation: str
    time: int  # unix seconds at which the name moved to it


@dataclass(frozen=True, slots=True)
class Record:
    """A name's present target and the versions before it, oldest first."""

    revision: int
    created: int
    updated: int
    targets: tuple[Target, ...]  # one, today; several with weights are refused
    history: tuple[Version, ...] = ()
    mover: Mover = "client"  # who moved the name to the present one

    @property
    def generation(self) -> str:
        return self.targets[0].generation

    @property
    def version(self) -> Version:
        """The present one."""
        return Version(self.revision, self.generation, self.updated)

    def generations(self) -> set[str]:
        """All that the name may be moved to."""
        return {self.generation, *(version.generation for version in self.history)}

    def moved(self, generation: str, now: int, keep_versions: int, mover: Mover = "client") -> Record:
        """The record after the name moved; the history keeps the last `keep_versions`."""
        history = (*self.history, self.version)[-keep_versions:] if keep_versions else ()
        return Record(self.revision + 1, self.created, now, (Target(generation),), history, mover)


def check_name(name: str) -> None:
    """Hold a name to the rule, which also makes it a safe file name."""
    if not NAME.fullmatch(name):
        raise AdapterError(
            "invalid_adapter_name",
            f"{json.dumps(name[:80])} is not a name for an adapter; {NAME_RULE}",
        )


def dump_record(record: Record) -> bytes:
    """As JSON with sorted keys."""
    return json.dumps({"schema": SCHEMA, **asdict(record)}, indent=1, sort_keys=True).encode() + b"\n"


def parse_record(data: bytes) -> Record:
    """Read what `dump_record` wrote."""
    try:
        raw = json.loads(data)
        if raw["schema"] != SCHEMA:
            raise BrokenRecordError(f"it has schema {raw['schema']!r}, this server reads {SCHEMA}")
        targets = tuple(Target(_generation(item), float(item["weight"])) for item in raw["targets"])
        if len(targets) != 1:
            raise BrokenRecordError(f"it has {len(targets)} targets, this server serves one")
        history = tuple(
            Version(_integer(item, "revision"), _generation(item), _integer(item, "time"))
            for item in raw["history"]
        )
        revision, created, updated = (_integer(raw, key) for key in ("revision", "created", "updated"))
        mover: Mover = raw.get("mover", "client")
        if mover not in get_args(Mover):
            raise ValueError(f"mover is {mover!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BrokenRecordError(f"it cannot be read: {type(error).__name__}: {error}") from error
    return Record(revision, created, updated, targets, history, mover)


def _integer(raw: Any, key: str) -> int:
    value = raw[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} is {value!r}")
    return value


def _generation(raw: Any) -> str:
    value = raw["generation"]
    if not isinstance(value, str) or not GENERATION.fullmatch(value):
        raise ValueError(f"generation is {value!r}")
    return value
