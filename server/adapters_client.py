"""Asks a running server about its adapters, over HTTP: one method per route, and every failure a `ClientError`.

Knows nothing of a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import quote

import httpx

from server.config_sources import ClientSettings

SECONDS = httpx.Timeout(60, connect=5)
UPLOAD_SECONDS = httpx.Timeout(60, connect=5, read=1800)  # checking begins when the last byte has come

Json = dict[str, Any]


class ClientError(Exception):
    """What was asked for was not done: a line that says why, and one for each finding."""

    def __init__(self, message: str, findings: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.findings = findings


class AdaptersClient:
    """A connection to one server; to be used in a `with`."""

    def __init__(self, settings: ClientSettings) -> None:
        self._url = settings.url
        headers = {} if settings.api_key is None else {"authorization": f"Bearer {settings.api_key}"}
        self._http = httpx.Client(base_url=settings.url, headers=headers, timeout=SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def list(self) -> Json:
        """Every adapter."""
        return self._json("GET", "/v1/adapters")

    def get(self, name: str) -> Json:
        """One adapter."""
        return self._json("GET", _path(name))

    def versions(self, name: str) -> Json:
        """The versions that a rollback can return to, the present one first."""
        return self._json("GET", f"{_path(name)}/versions")

    def put(self, name: str, body: Iterable[bytes], length: int, if_match: str | None) -> tuple[bool, Json]:
        """Upload an archive; whether the name moved, and the adapter."""
        headers = _condition(if_match) | {
            "content-length": str(length),
            "content-type": "application/octet-stream",
        }
        with self._connected():
            response = self._http.put(_path(name), content=body, headers=headers, timeout=UPLOAD_SECONDS)
        return response.status_code == httpx.codes.CREATED, self._checked(response)

    def rollback(self, name: str, to: int | str, if_match: str | None) -> Json:
        """Move a name to a version by its revision or generation."""
        return self._json("POST", f"{_path(name)}/rollback", json={"to": to}, headers=_condition(if_match))

    def delete(self, name: str, if_match: str | None) -> None:
        """Remove a name."""
        with self._connected():
            response = self._http.delete(_path(name), headers=_condition(if_match))
        if not response.is_success:
            self._checked(response)

    def _json(self, method: str, path: str, **options: Any) -> Json:
        with self._connected():
            response = self._http.request(method, path, **options)
        return self._checked(response)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turns what goes wrong on the way into words."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ClientError(
                f"cannot reach {self._url}: {error or 'no answer'}; start a server with `loraplex serve MODEL`, "
                "or name another with --url"
            ) from error
        except httpx.TimeoutException as error:
            raise ClientError(f"{self._url} has not answered in time; its log may say why") from error
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ClientError(f"the connection to {self._url} broke: {error}; try again") from error

    def _checked(self, response: httpx.Response) -> Json:
        """The answer's JSON; raises the server's own words when it refused."""
        try:
            body = response.json()
            error = body.get("error")
            if response.is_success and error is None:
                return dict(body)
            findings = tuple(finding_line(detail) for detail in error.get("details", ()))
            raise ClientError(str(error["message"]), findings)
        except (ValueError, AttributeError, KeyError, TypeError):
            kind = response.headers.get("content-type", "no type")
            raise ClientError(
                f"{self._url} does not answer as a loraplex server does (status {response.status_code}, {kind}); "
                "is --url right?"
            ) from None


def _path(name: str) -> str:
    return "/v1/adapters/" + quote(name, safe="")


def _condition(if_match: str | None) -> dict[str, str]:
    return {} if if_match is None else {"if-match": f'"{if_match}"'}


def finding_line(detail: Json) -> str:
    """What is wrong with an adapter, and the cure, as a person reads it."""
    cure = f"; {detail['cure']}" if detail.get("cure") else ""
    return f"{detail['where']}: {detail['problem']}{cure}"
