"""A store belongs to one server at a time: an advisory lock on a file that names its holder.

The kernel drops the lock with the process, so a crash leaves nothing to clean up. Knows nothing of the store.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path


class StoreLockedError(Exception):
    """Another server uses the store; the message says which."""


class StoreLock:
    """Held from construction to `release`."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.read(self._descriptor, 4096))
            os.close(self._descriptor)
            raise StoreLockedError(
                f"the adapter store {path.parent} is in use by {holder}; "
                "stop that server, or give this one another adapter store"
            ) from None
        except OSError:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def release(self) -> None:
        """Let another server have the store."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _holder(data: bytes) -> str:
    try:
        holder = json.loads(data)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, TypeError, KeyError):
        return "a process that has not written its name yet"
