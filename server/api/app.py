"""Builds the app from its settings and the holder of what it serves. No globals: two apps may coexist."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.api import adapters, chat, completions, envelope, health, models, openapi, tokenize
from server.api.asgi import Frame, OpenRequests
from server.api.auth import Guard
from server.config import Settings
from server.metrics import Metrics
from server.serving import Edge, Serving
from server.version import VERSION


def create_app(settings: Settings, serving: Serving) -> FastAPI:
    """The HTTP app. It answers at once; what needs the model is refused until `serving` is ready."""
    app = FastAPI(
        title="loraplex",
        version=VERSION,
        summary="One base model, many LoRA adapters in one batch",
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        responses=openapi.ERRORS,
    )
    metrics, guard = Metrics(serving), Guard(settings)
    app.state.edge = Edge(settings, serving, metrics, guard)
    app.state.requests = OpenRequests()
    routes: list[APIRoute] = []
    for part in (completions, chat, models, adapters, tokenize, health):
        app.include_router(part.router)
        routes += [route for route in part.router.routes if isinstance(route, APIRoute)]
    envelope.install(app, routes)
    openapi.install(app, routes, guard)
    app.add_middleware(Frame, settings=settings, metrics=metrics, guard=guard, requests=app.state.requests)
    return app
