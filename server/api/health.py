"""/health, /ready, /version and /metrics: what supervisors, balancers and Prometheus ask, without a key."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Response

from server.api.envelope import RETRY_AFTER
from server.api.schemas.answers import Status, Version
from server.serving import EdgeOf
from server.version import VERSION

METRICS_TYPE = (
    "text/plain; version=0.0.4; charset=utf-8"  # whatever Accept says: OpenMetrics breaks vllm:* names
)
STATUS: dict[int | str, dict[str, Any]] = {200: {"model": Status}, 503: {"model": Status}}

router = APIRouter(tags=["operations"])


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=STATUS)
def health(edge: EdgeOf) -> Response:
    """Whether the process is of use: 200 from the first second, 503 once only a restart helps."""
    serving = edge.serving
    dead = serving.dead
    return _json(503 if dead else 200, {"status": "failed" if dead else serving.phase})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses=STATUS)
def ready(edge: EdgeOf) -> Response:
    """Whether requests would be served now."""
    serving = edge.serving
    if serving.dead:
        return _json(503, {"status": "failed", "detail": serving.detail})
    if serving.phase == "ready":
        return _json(200, {"status": "ready"})
    body = {"status": serving.phase, "progress": round(serving.progress, 3), "detail": serving.detail}
    return _json(503, body)


@router.get("/version")
def version() -> Version:
    """The server's version."""
    return {"name": "loraplex", "version": VERSION}


@router.get(
    "/metrics",
    response_class=Response,  # FastAPI would promise JSON as well
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(edge: EdgeOf) -> Response:
    """Prometheus' text format."""
    return Response(edge.metrics.render(), headers={"content-type": METRICS_TYPE})


def _json(status: int, body: dict[str, Any]) -> Response:
    headers = {"retry-after": RETRY_AFTER[status]} if status in RETRY_AFTER else {}
    return Response(orjson.dumps(body), status, headers, "application/json")
