"""What the app is given: the served model's parts (`Served`), and the process's phase of life (`Serving`).

Nouns only: `server/startup.py` fills them in, `server/process.py` moves the phases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from server.errors import EngineDeadError, NotReadyError

if TYPE_CHECKING:
    from adapters.loader import Loader
    from adapters.registry import Registry
    from server.engine.engine import Engine
    from server.text.tokenizer import Tokenizer

Phase = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True)
class GenerationDefaults:
    """How the model's authors sample it, for requests that do not say (generation_config.json)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


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
