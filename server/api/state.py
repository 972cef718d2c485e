"""What every route may reach: one frozen object on the app, and the typed way to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from server.config import Settings
from server.metrics import Metrics
from server.serving import Served, Serving

CHECKED_AT_ONCE = 2  # uploads; each takes a thread and the memory of its weights


@dataclass(frozen=True)
class Edge:
    """The parts that routes work with."""

    settings: Settings
    serving: Serving
    metrics: Metrics
    checking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CHECKED_AT_ONCE))

    def base_names(self, served: Served) -> frozenset[str]:
        """What a client may call the base: its served name, or the model it was loaded from."""
        return frozenset({served.name, self.settings.model})


def edge_of(request: Request) -> Edge:
    """The app's edge, for this request."""
    edge = request.app.state.edge
    assert isinstance(edge, Edge)
    return edge


EdgeOf = Annotated[Edge, Depends(edge_of)]
