"""/v1/models: the base and every adapter that is ready, as models; an adapter can be removed as one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request

from adapters.errors import AdapterError
from server.api.asgi import request_id_of
from server.api.auth import CHANGES
from server.api.schemas.answers import DeletedModel, Model, ModelList
from server.errors import InvalidRequestError, ModelNotFoundError
from server.serving import Edge, EdgeOf, Served

if TYPE_CHECKING:
    from adapters.entry import Entry

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(edge: EdgeOf) -> ModelList:
    """The base first, by each of its served names, then its adapters by name."""
    return {"object": "list", "data": _models(edge)}


@router.get("/{id:path}")
def get_model(id: str, edge: EdgeOf) -> Model:
    """One model by the id it is listed under, by `base:adapter`, or the base by its path."""
    wanted = _named(edge, id)
    for model in _models(edge):
        if model["id"] == wanted:
            return model
    raise _unknown(id)


@router.delete("/{id:path}", dependencies=[CHANGES])
def delete_model(id: str, request: Request, edge: EdgeOf) -> DeletedModel:
    """Remove an adapter, as OpenAI's clients delete a fine-tuned model."""
    served, name = edge.serving.ready(), _named(edge, id)
    if name in edge.base_names(served):
        raise InvalidRequestError("the base model cannot be removed; name an adapter", param="model")
    try:
        served.registry.delete(name)
    except AdapterError as error:
        raise (_unknown(id) if error.code == "adapter_not_found" else error) from None
    logger.info("adapter removed name=%s request_id=%s", name, request_id_of(request))
    return {"id": name, "object": "model", "deleted": True}


def _named(edge: Edge, id: str) -> str:
    """The id that a model is listed under, from that, from `base:adapter`, or from the base's path."""
    served = edge.serving.ready()
    base_names = edge.base_names(served)
    base, _, adapter = id.rpartition(":")
    wanted = adapter if base in base_names and id not in base_names else id
    return served.name if wanted == edge.settings.model else wanted


def _unknown(id: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"no model {id!r}; GET /v1/models lists the base and its adapters", param="model"
    )


def _models(edge: Edge) -> list[Model]:
    served = edge.serving.ready()
    bases: list[Model] = [
        {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "loraplex",
            "root": edge.settings.model,
            "parent": None,
            "max_model_len": served.max_model_len,
        }
        for name in edge.settings.served_model_name or (served.name,)
    ]
    ready = [entry for entry in served.registry.entries() if entry.state == "ready"]
    return [*bases, *(_adapter(entry, served) for entry in ready)]


def _adapter(entry: Entry, served: Served) -> Model:
    return {
        "id": entry.name,
        "object": "model",
        "created": int(entry.created),
        "owned_by": "loraplex",
        "root": entry.generation,
        "parent": served.name,
        "max_model_len": served.max_model_len,
    }
