"""What the app works with: the served model's parts, the process's phase of life, and the edge that holds both.

Nouns only: `server/startup.py` fills in a `Served`, `server/process.py` moves the phases of a `Serving`, and
`server/api/app.py` makes the one `Edge` that every route reaches through `EdgeOf`.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import Depends, Request

from server.errors import EngineDeadError, NotReadyError

if TYPE_CHECKING:
    from adapters.loader import Loader
    from adapters.registry import Registry
    from adapters.side_stream import SideStream
    from server.api.auth import Guard
    from server.config import Settings
    from server.engine.engine import Engine
    from server.metrics import Metrics
    from server.text.tokenizer import Tokenizer

Phase = Literal["loading", "ready", "draining", "failed"]

CHECKED_AT_ONCE = 2  # uploads; each takes a thread and the memory of its weights


@dataclass(frozen=True)
class GenerationDefaults:
    """How the model's authors sample it, for requests that do not say (generation_config.json)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Served:
    """A loaded base model with everything that answers for it."""

    name: str
    created: int  # unix seconds
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    defaults: GenerationDefaults
    tokenizer: Tokenizer
    engine: Engine
    registry: Registry
    loader: Loader
    copier: SideStream | None = None  # to a GPU
    seeds: random.Random = field(default_factory=random.SystemRandom)  # for requests that bring none


@dataclass
class Serving:
    """The one mutable holder per process. Written by one thread at a time, read by any."""

    phase: Phase = "loading"
    progress: float = 0.0  # 0..1 while loading
    detail: str = "starting"  # what is being done, in a few words
    plan: tuple[str, ...] = ()  # the banner's lines on device, quantization and memory
    served: Served | None = None

    @property
    def dead(self) -> bool:
        """Whether only a restart helps."""
        stopped = self.served is not None and not self.served.engine.healthy
        return self.phase == "failed" or (self.phase == "ready" and stopped)

    def ready(self) -> Served:
        """The served model, or the error that a request gets while there is none."""
        if self.phase == "loading":
            raise NotReadyError(f"the model is loading ({self.progress:.0%}); try again shortly")
        if self.phase == "draining":
            raise NotReadyError("the server is shutting down; send the request elsewhere")
        if self.dead or self.served is None:
            raise EngineDeadError("the engine has stopped; the server must be restarted")
        return self.served


@dataclass(frozen=True)
class Edge:
    """The parts that routes work with."""

    settings: Settings
    serving: Serving
    metrics: Metrics
    guard: Guard
    checking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CHECKED_AT_ONCE))

    def base_names(self, served: Served) -> frozenset[str]:
        """What a client may call the base."""
        return self.settings.base_names | {served.name}


async def edge_of(request: Request) -> Edge:
    """The app's edge, for this request. Async: FastAPI would send it to a thread, each time."""
    edge = request.app.state.edge
    assert isinstance(edge, Edge)
    return edge


EdgeOf = Annotated[Edge, Depends(edge_of)]
