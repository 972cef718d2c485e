"""Every way an adapter can be refused: one exception with a stable code and a list of findings.

Knows nothing of HTTP: `server/errors.py` maps the codes to statuses in one table.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

AdapterCode = Literal[
    "invalid_adapter_name",  # the name breaks the naming rule
    "adapter_not_found",  # no such name
    "invalid_archive",  # not a zip or tar of a peft directory, or an unsafe one
    "adapter_upload_too_large",  # the bytes received pass the upload bound
    "invalid_adapter",  # config or tensors are wrong, or do not fit this base: never stored
    "unsupported_adapter_feature",  # valid peft, but a feature we do not serve
    "adapter_incompatible",  # stored, and this base cannot serve it
    "adapter_too_large",  # valid, but larger than the whole device pool or host cache
    "adapter_load_failed",  # a stored generation could not be read back
    "store_full",  # the disk or the store's quota is full
    "precondition_failed",  # If-Match named another generation
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with an adapter: where it is, what it is, and what to do about it."""

    where: str
    problem: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (f"; {self.cure}" if self.cure else "")


class AdapterError(Exception):
    """An adapter, its name or its archive was refused."""

    def __init__(self, code: AdapterCode, message: str, findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message)
        self.code: AdapterCode = code
        self.message = message
        self.findings = findings

    def __str__(self) -> str:
        return "\n".join([self.message, *(f"  - {finding}" for finding in self.findings)])


@contextmanager
def full_disk_named() -> Iterator[None]:
    """A full disk is told to the client; other failures of the disk are the server's own."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = "the adapter store's disk is full, and nothing was changed; delete adapters or make room"
        raise AdapterError("store_full", problem) from error
