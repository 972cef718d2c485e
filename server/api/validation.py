"""From pydantic's findings to one error that names the field, in words and of bounded length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.errors import InvalidRequestError

MAX_ECHO = 80  # characters of a wrong value that are repeated to the client
SOURCES = frozenset({"body", "query", "path", "header"})  # where FastAPI found a value: no part of its name


def first_error(details: Sequence[Any]) -> InvalidRequestError:
    """The first finding; `param` is the path of the field, as in `messages.0.content`."""
    detail = details[0]
    if detail["type"] in ("json_invalid", "json_type"):
        return InvalidRequestError(
            f"the body is not valid JSON: {detail['msg'].removeprefix('Invalid JSON: ')}"
        )
    path = [str(part) for part in detail["loc"] if part not in SOURCES]
    if not path:
        return InvalidRequestError("the body must be a JSON object")
    param = ".".join(path)[:MAX_ECHO]
    if detail["type"] == "missing":
        return InvalidRequestError(f"{param} is required", param=param)
    message = str(detail["msg"]).replace("Input should be", "must be")
    return InvalidRequestError(
        f"{param}: {message[:1].lower()}{message[1:]}{_echo(detail['input'])}", param=param
    )


def _echo(value: object) -> str:
    """The wrong value if it is short enough to help; containers are not repeated."""
    if isinstance(value, list | dict):
        return ""
    text = repr(value[: MAX_ECHO + 1] if isinstance(value, str) else value)
    return f", got {text}" if len(text) <= MAX_ECHO else ""
