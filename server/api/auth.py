"""Who may do what: keys, and what an address that only this machine reaches is worth without them.

A key is compared as its SHA-256, in constant time, and with every key there is. `server/api/asgi.py` asks before each
request whose path is not `OPEN`, and routes that change adapters depend on `CHANGES`; no other route is known here.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from fastapi import Depends, Request
from pydantic import SecretStr
from starlette.datastructures import Headers

from server.config import Settings
from server.errors import KeyRequiredError, ScopeError
from server.serving import EdgeOf

OPEN = frozenset({"/health", "/ready", "/version", "/metrics"})  # paths that supervisors ask, always answered


class Guard:
    """The keys of one server. Without any, and on a loopback address, it lets everything pass."""

    def __init__(self, settings: Settings) -> None:
        self._keys = _digests(settings.api_key)
        self._admin_keys = _digests(settings.admin_api_key)
        self._local = is_loopback(settings.host)
        self.closed = bool(self._keys)  # whether every request needs a key
        self.admin = bool(self._admin_keys)  # whether a change needs an admin key

    def admit(self, headers: Headers) -> None:
        """Raise unless the request carries a key."""
        self._known(headers, self._keys, self._admin_keys)

    def allow_change(self, headers: Headers) -> None:
        """Raise unless the request, which was admitted, may change adapters."""
        if self._admin_keys:
            _, admin = self._known(headers, self._keys, self._admin_keys)
            if not admin:
                raise ScopeError("this key may not change adapters; send an admin key (--admin-api-key)")
        elif not self._local:
            raise ScopeError(
                "adapters cannot be changed here: the server listens beyond its own machine and has no admin "
                "key; start it with --admin-api-key"
            )
        elif not self._keys and not _from_this_machine(headers):
            raise ScopeError(
                "a page of another site may not change adapters; start the server with --admin-api-key, and "
                "send that key"
            )

    def _known(self, headers: Headers, *groups: tuple[bytes, ...]) -> tuple[bool, ...]:
        """For each group of keys, whether the request's is one of them; raises if it is in none."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise KeyRequiredError("an API key is required; send the header `Authorization: Bearer KEY`")
        sent = hashlib.sha256(key.strip().encode()).digest()
        found = tuple(sum([hmac.compare_digest(sent, own) for own in group]) > 0 for group in groups)
        if not any(found):
            raise KeyRequiredError(
                "this API key is not known; look at the header `Authorization: Bearer KEY`"
            )
        return found


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _may_change(request: Request, edge: EdgeOf) -> None:
    edge.guard.allow_change(request.headers)


CHANGES = Depends(_may_change)


def _from_this_machine(headers: Headers) -> bool:
    """Whether no browser sends it for a page of elsewhere: a form needs no leave to be sent to 127.0.0.1."""
    origin = headers.get("origin")
    try:
        return origin is None or is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return False


def _digests(keys: Iterable[SecretStr]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.get_secret_value().encode()).digest() for key in keys)
