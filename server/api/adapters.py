"""/v1/adapters: upload, list, show, roll back and remove adapters while the server runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import AdapterError
from adapters.records import check_name
from server.api.asgi import media_type, read_json
from server.api.envelope import as_error
from server.api.schemas.generation import described
from server.api.upload import received
from server.errors import ContentTypeError, InvalidRequestError
from server.serving import Edge, EdgeOf, Served

if TYPE_CHECKING:
    from adapters.registry import Entry

ARCHIVES = frozenset(
    {
        "",  # what curl -T sends
        "application/octet-stream",
        "application/zip",
        "application/x-zip-compressed",
        "application/tar",
        "application/x-tar",
        "application/gzip",
        "application/x-gzip",
        "application/tar+gzip",
        "application/x-gtar",
    }
)

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


class Rollback(BaseModel):
    """The body of a rollback: the version that the name should return to."""

    model_config = ConfigDict(frozen=True)

    to: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)],
        described("must be a revision (a whole number, 1 or more) or a generation"),
    ]


@router.put("/{name}")
async def put_adapter(name: str, request: Request, edge: EdgeOf) -> Response:
    """Register or replace an adapter from a zip or tar of a PEFT folder; 201, or 200 if nothing changed."""
    try:
        response = await _put(name, request, edge)
    except Exception as error:
        edge.metrics.upload("refused", as_error(error).code)
        raise
    edge.metrics.upload("stored" if response.status_code == 201 else "unchanged", "")
    return response


@router.get("")
def list_adapters(edge: EdgeOf) -> dict[str, Any]:
    """Every adapter, those included that this base cannot serve."""
    entries = edge.serving.ready().registry.entries()
    return {
        "object": "list",
        "data": [_shown(entry) for entry in sorted(entries, key=lambda entry: entry.name)],
    }


@router.get("/{name}")
def get_adapter(name: str, edge: EdgeOf) -> Response:
    """One adapter; its ETag is its generation."""
    return _response(200, edge.serving.ready().registry.entry(name))


@router.delete("/{name}", status_code=204)
def delete_adapter(name: str, request: Request, edge: EdgeOf) -> Response:
    """Remove the name. Requests that run with it end as they began."""
    edge.serving.ready().registry.delete(name, if_match=_if_match(request))
    return Response(status_code=204)


@router.get("/{name}/versions")
def list_versions(name: str, edge: EdgeOf) -> dict[str, Any]:
    """The present version and those that a rollback can return to, newest first."""
    versions = edge.serving.ready().registry.versions(name)
    return {
        "object": "list",
        "data": [
            {
                "revision": version.revision,
                "generation": version.generation,
                "created": version.time,
                "current": place == 0,
            }
            for place, version in enumerate(versions)
        ],
    }


@router.post(
    "/{name}/rollback",
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": Rollback.model_json_schema()}}}
    },
)
async def roll_back(name: str, request: Request, edge: EdgeOf) -> Response:
    """Move the name to an earlier version, as a new revision."""
    registry = edge.serving.ready().registry
    if_match = _if_match(request)
    body = await read_json(request, Rollback)
    return _response(200, await asyncio.to_thread(registry.rollback, name, body.to, if_match))


async def _put(name: str, request: Request, edge: Edge) -> Response:
    served = edge.serving.ready()
    _check_name(name, served, edge)
    if media_type(request) not in ARCHIVES:
        raise ContentTypeError(
            "send the zip or tar itself as the body, for example with `curl -T legal.zip`, "
            "or with the header `Content-Type: application/octet-stream`"
        )
    if_match = _if_match(request)
    most = edge.settings.max_upload_bytes
    async with received(request, served.registry.store, most) as upload, edge.checking:
        put = await asyncio.to_thread(served.registry.put_archive, name, upload.path, if_match)
    return _response(201 if put.created else 200, put.entry)


def _check_name(name: str, served: Served, edge: Edge) -> None:
    """Before the body is read: a name that cannot be, or the base's, which `model` could not tell apart."""
    check_name(name)
    if name in edge.base_names(served):
        raise AdapterError("invalid_adapter_name", f"{name!r} is the base model's name; choose another")


def _if_match(request: Request) -> str | None:
    """The generation that the caller believes the name to have."""
    if "if-none-match" in request.headers:
        raise InvalidRequestError("If-None-Match is not supported; use If-Match", param="If-None-Match")
    header = request.headers.get("if-match")
    if header is None:
        return None
    tag = header.strip()
    if tag == "*" or "," in tag or not tag.strip('"'):
        raise InvalidRequestError("If-Match: must hold one generation, as in ETag", param="If-Match")
    return tag.strip('"')


def _response(status: int, entry: Entry) -> Response:
    return Response(
        orjson.dumps(_shown(entry)), status, {"etag": f'"{entry.generation}"'}, "application/json"
    )


def _shown(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "adapter",
        "state": entry.state,
        "generation": entry.generation,
        "revision": entry.revision,
        "created": int(entry.created),
        "updated": int(entry.updated),
        "bytes": entry.nbytes,
        "rank": entry.rank,
        "modules": list(entry.modules),
        "base_model": entry.base_model,
        "references": entry.references,
        "findings": [
            {"where": finding.where, "problem": finding.problem, "cure": finding.cure}
            for finding in entry.findings
        ],
    }
