"""The OpenAPI document: what FastAPI finds of the routes, and what they read, stream and ask for by hand.

Routes read bodies themselves, so that a wrong one is refused in our words; `json_body` tells the document of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter

from server.api.auth import CHANGES, OPEN, Guard
from server.api.schemas.answers import Error

Document = dict[str, Any]

_REFERENCE = "#/components/schemas/{model}"
_KEYS = {
    "ApiKey": {"type": "http", "scheme": "bearer", "description": "one of --api-key, or an admin key"},
    "AdminApiKey": {"type": "http", "scheme": "bearer", "description": "one of --admin-api-key"},
}

ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": Error, "description": "An error; docs/http-api.md has every status and code"}
}


def json_body(shape: type[BaseModel]) -> Document:
    """`openapi_extra` of a route that reads this shape itself."""
    return body({"application/json": shape.model_json_schema(ref_template=_REFERENCE)})


def body(schemas: Document) -> Document:
    """`openapi_extra` of a route that reads one of these kinds itself."""
    content = {kind: {"schema": schema} for kind, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def streamed(whole: type, chunk: type) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers at once, or with `stream` in server-sent events."""
    schema = TypeAdapter(chunk).json_schema(ref_template=_REFERENCE)
    said = "The answer; with `stream`, events of `data: {json}`, the last of them `data: [DONE]`"
    return {200: {"model": whole, "description": said, "content": {"text/event-stream": {"schema": schema}}}}


def install(app: FastAPI, routes: Sequence[APIRoute], guard: Guard) -> None:
    """Have `app` answer with the document of these routes, with the keys that this server asks for."""

    def document() -> Document:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, routes, guard)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way


def _document(app: FastAPI, routes: Sequence[APIRoute], guard: Guard) -> Document:
    found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    components = found.setdefault("components", {})
    components["securitySchemes"] = _KEYS
    for route in routes:
        for method in (route.methods or ()) if route.include_in_schema else ():
            operation = found["paths"][route.path_format][method.lower()]
            for content in _contents(operation):
                content["schema"] = _by_name(content["schema"], components["schemas"])
            operation.update(_security(route, guard))
    return found


def _contents(operation: Document) -> Iterator[Document]:
    """Each kind of body that an operation takes or answers with."""
    for part in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield from part.get("content", {}).values()


def _by_name(schema: Document, components: Document) -> Document:
    """The reference to a schema of a class, which moves to the components with all that it speaks of."""
    if "title" not in schema or schema.get("type") != "object":
        return schema
    components.update(schema.pop("$defs", {}))
    components[schema["title"]] = schema
    return {"$ref": _REFERENCE.format(model=schema["title"])}


def _security(route: APIRoute, guard: Guard) -> Document:
    if CHANGES in route.dependencies and guard.admin:
        return {"security": [{"AdminApiKey": []}]}
    return {"security": [{"ApiKey": []}] if guard.closed and route.path not in OPEN else []}
