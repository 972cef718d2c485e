"""/v1/adapters: upload, list, show, roll back and remove adapters while the server runs."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from adapters.errors import AdapterError
from adapters.records import NAME, check_name
from adapters.store import FILES
from server.api.asgi import media_type, read_json, request_id_of
from server.api.auth import CHANGES
from server.api.envelope import as_error
from server.api.openapi import body, json_body
from server.api.schemas.answers import Adapter, AdapterList, AdapterVersionList
from server.api.schemas.generation import described
from server.api.upload import received, received_form
from server.errors import ContentTypeError, InvalidRequestError
from server.serving import Edge, EdgeOf, Served

if TYPE_CHECKING:
    from adapters.entry import Entry, Put

logger = logging.getLogger(__name__)

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

_HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9a-fA-F:]+\](:[0-9]+)?")
_STORED: dict[int | str, dict[str, Any]] = {
    200: {"model": Adapter, "description": "It was there already"},
    201: {"model": Adapter, "description": "The name moved to it"},
}
_ARCHIVE = {"type": "string", "format": "binary", "description": "a zip or tar of a PEFT folder"}
_NAME = {"pattern": f"^{NAME.pattern}$"}
_FORM = {
    "type": "object",
    "required": ["name", "file"],
    "properties": {
        "name": {"type": "string", **_NAME},
        "file": {**_ARCHIVE, "description": "a zip or tar of a PEFT folder, or each of its two files"},
    },
}
_HEADERS = {
    "If-Match": "the generation, as in ETag, that the name must be at",
    "Content-Digest": "`sha-256=:<base64>:` of the body, to have it checked",
}

Name = Annotated[str, Path(json_schema_extra=_NAME)]  # checked where a wrong one is refused in our words


def _headers(*names: str) -> dict[str, Any]:
    """`openapi_extra` of a route that reads these itself."""
    said = [{"name": name, "in": "header", "description": _HEADERS[name]} for name in names]
    return {"parameters": [{**one, "schema": {"type": "string"}} for one in said]}


router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


class Rollback(BaseModel):
    """The body of a rollback: the version that the name should return to."""

    model_config = ConfigDict(frozen=True)

    to: Annotated[
        Annotated[int, Field(ge=1)] | Annotated[str, Field(min_length=1)],
        described("must be a revision (a whole number, 1 or more) or a generation"),
    ]


@router.put(
    "/{name:path}",  # a slash in a name is a wrong name, not another route
    dependencies=[CHANGES],
    responses=_STORED,
    openapi_extra=body({"application/octet-stream": _ARCHIVE}) | _headers("If-Match", "Content-Digest"),
)
async def put_adapter(name: Name, request: Request, edge: EdgeOf) -> Response:
    """Register or replace an adapter from a zip or tar of a PEFT folder; 201, or 200 if nothing changed."""
    return await _counted(_put(name, request, edge), edge)


@router.post(
    "",
    dependencies=[CHANGES],
    responses=_STORED,
    openapi_extra=body({"multipart/form-data": _FORM}) | _headers("If-Match"),
)
async def post_adapter(request: Request, edge: EdgeOf) -> Response:
    """The same from a form: the field `name`, and `file`: the archive, or each of the folder's two files."""
    return await _counted(_post(request, edge), edge)


@router.get("")
def list_adapters(edge: EdgeOf) -> AdapterList:
    """Every adapter, those included that this base cannot serve."""
    entries = edge.serving.ready().registry.entries()
    return {"object": "list", "data": [_shown(entry) for entry in entries]}


@router.get("/{name}", responses={200: {"model": Adapter}})
def get_adapter(name: Name, edge: EdgeOf) -> Response:
    """One adapter; its ETag is its generation."""
    return _response(200, edge.serving.ready().registry.entry(name))


@router.delete("/{name}", status_code=204, dependencies=[CHANGES], openapi_extra=_headers("If-Match"))
def delete_adapter(name: Name, request: Request, edge: EdgeOf) -> Response:
    """Remove the name. Requests that run with it end as they began."""
    edge.serving.ready().registry.delete(name, if_match=_if_match(request))
    logger.info("adapter removed name=%s request_id=%s", name, request_id_of(request))
    return Response(status_code=204)


@router.get("/{name}/versions")
def list_versions(name: Name, edge: EdgeOf) -> AdapterVersionList:
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
    dependencies=[CHANGES],
    responses={200: {"model": Adapter}},
    openapi_extra=json_body(Rollback) | _headers("If-Match"),
)
async def roll_back(name: Name, request: Request, edge: EdgeOf) -> Response:
    """Move the name to an earlier version, as a new revision."""
    registry = edge.serving.ready().registry
    if_match = _if_match(request)
    body = await read_json(request, Rollback)
    entry = await asyncio.to_thread(registry.rollback, name, body.to, if_match)
    logger.info(
        "adapter rolled back name=%s revision=%d generation=%s request_id=%s",
        *(name, entry.revision, entry.generation, request_id_of(request)),
    )
    return _response(200, entry)


async def _counted(upload: Coroutine[Any, Any, Response], edge: Edge) -> Response:
    """The answer to an upload, which becomes a metric."""
    try:
        response = await upload
    except Exception as error:
        edge.metrics.upload("refused", as_error(error).code)
        raise
    edge.metrics.upload("stored" if response.status_code == 201 else "unchanged", "")
    return response


async def _put(name: str, request: Request, edge: Edge) -> Response:
    served = edge.serving.ready()
    _check_name(name, served, edge)
    if media_type(request) not in ARCHIVES:
        raise ContentTypeError(
            "send the zip or tar itself as the body, for example with `curl -T legal.zip`, or with the header "
            "`Content-Type: application/octet-stream`; a form goes to POST /v1/adapters"
        )
    if_match = _if_match(request)
    registry, most = served.registry, edge.settings.max_upload_bytes
    async with received(request, registry.store, most) as archive, edge.checking:
        return await _stored(request, name, lambda: registry.put_archive(name, archive, if_match))


async def _post(request: Request, edge: Edge) -> Response:
    served = edge.serving.ready()
    if media_type(request) != "multipart/form-data":
        raise ContentTypeError(
            "send a form, for example with `curl -F name=legal -F file=@legal.zip`; the archive as the body "
            "goes to PUT /v1/adapters/legal"
        )
    if_match = _if_match(request)
    registry, most = served.registry, edge.settings.max_upload_bytes

    def check(name: str) -> None:
        _check_name(name, served, edge)

    async with received_form(request, registry.store, most, check) as form, edge.checking:
        (sent_as, path), *others = form.files
        if others or sent_as.lower() in FILES:
            return await _stored(
                request, form.name, lambda: registry.put_parts(form.name, form.files, if_match)
            )
        return await _stored(request, form.name, lambda: registry.put_archive(form.name, path, if_match))


async def _stored(request: Request, name: str, put: Callable[[], Put]) -> Response:
    """Check and store what was received, on a thread."""
    try:
        done = await asyncio.to_thread(put)
    except AdapterError as error:
        if error.code != "invalid_archive":
            raise
        cured = f"{error.message[:1000]}; to send one: {_command(request, name)}"
        raise AdapterError(error.code, cured, error.findings) from None
    entry = done.entry
    logger.info(
        "adapter stored name=%s revision=%d generation=%s changed=%s request_id=%s",
        *(name, entry.revision, entry.generation, done.created, request_id_of(request)),
    )
    return _response(201 if done.created else 200, entry)


def _command(request: Request, name: str) -> str:
    """A line for the folder that peft wrote, which sends its two files to this server."""
    given = request.headers.get("host", "")
    host = given if _HOST.fullmatch(given) else "HOST:PORT"
    key = '-H "Authorization: Bearer $KEY" ' if "authorization" in request.headers else ""
    return (
        "zip adapter.zip adapter_config.json adapter_model.safetensors && "
        f"curl {key}-T adapter.zip {request.url.scheme}://{host}{request.scope.get('root_path', '')}/v1/adapters/{name}"
    )


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


def _shown(entry: Entry) -> Adapter:
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
