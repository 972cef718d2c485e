"""The engine's nouns: the commands and events that cross to it and back, and the sequence it runs.

Commands and events are plain frozen data without tensors: an engine in another process would exchange exactly these.
Knows nothing of text or HTTP.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adapters.tally import Tally

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence's tokens are chosen, and when it ends.

    `temperature == 0` is greedy. `top_k == 0`, `top_p == 1`, `min_p == 0`, penalties of 0 and a repetition penalty of 1
    are off. `stop_token_ids` holds the model's end-of-sequence tokens too, unless the caller ignores them; none of them
    is chosen before `min_tokens`. `logprobs` and `prompt_logprobs` say how many of the likeliest tokens are told with
    each token of the output and of the prompt; None is off, 0 tells of the token itself. Without `max_tokens` (0) the
    prompt is read and nothing more.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit; each id once
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """Run one sequence. `generation` is the adapter's content id, or None for the base alone."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """End a sequence now: its client is gone, or the edge found a stop string in its text."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Forget:
    """No name and no request holds this generation any more: its pages may go."""

    generation: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Look again: a loader thread has finished a read."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End every sequence with an error and leave the loop."""


Command = Submit | Abort | Forget | Wake | Stop


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How likely the model itself found a token, and which tokens it found likeliest, before any sampling parameter."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token id and its logprob, likeliest first


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of the prompt's tokens, where they were asked for: once, before the sequence's first token.

    The prompt's first token follows nothing, so it has none and the tuple is one shorter than the prompt.
    """

    request_id: str
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token. The token that ends a sequence (an end-of-sequence id) is an event too."""

    request_id: str
    token_id: int
    logprobs: Logprobs | None = None  # where they were asked for
    queued: float = field(default=0.0, compare=False)  # seconds from the sequence's arrival to its first step


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence that ended well."""

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a sequence that could not go on."""

    request_id: str
    error: Exception


Event = PromptLogprobs | Token | Finished | Failed


@dataclass(slots=True)
class StepCounts:
    """What all steps together have come to, and the size of the last one."""

    steps: int = 0
    seconds: float = 0.0
    prefill_steps: int = 0  # of these, with prompt tokens in them
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0  # of prompts, computed: again after a preemption
    decode_tokens: int = 0  # of outputs, likewise
    generated_tokens: int = 0
    last_sequences: int = 0
    last_adapters: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and levels of the engine, read at any time from any thread."""

    counts: StepCounts
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_block_size: int
    pages_used: int
    pages_total: int
    resident: tuple[str, ...]  # generations on the device
    waiting_for: tuple[str, ...]  # generations of waiting sequences that are not on the device
    adapter_room: int  # adapters of one page per group that fit on the device together
    adapter_copies: Tally  # seconds of copies to the device
    adapter_evictions: int  # from the device
    adapter_hits: int  # sequences that started with their adapter on the device already
    adapter_misses: int
    prefix_tokens: int  # of all prompts admitted, each counted once
    prefix_hits: int  # of these, taken up from blocks that were there
    preemptions: int


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and output of one sequence, and the KV blocks that hold what was computed of them."""

    request_id: str
    prompt_length: int
    sampling: Sampling
    generation: str | None
    tokens: list[int]
    computed: int = 0  # tokens whose keys and values are in the cache
    blocks: array[int] = field(default_factory=lambda: array("i"))  # int32, as a step's tables are
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they were asked for
    remembered: int = 0  # full blocks that others may take up
    arrived: float = field(default_factory=time.perf_counter)
    queued: float = 0.0  # seconds until it was first admitted
    passed: int = 0  # how many younger sequences were admitted before this one
    prompt_logprobs: list[Logprobs] = field(default_factory=list)  # from its second token on, so far
    _prompt_ids: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, submit: Submit) -> Sequence:
        return cls(
            submit.request_id, len(submit.prompt), submit.sampling, submit.generation, list(submit.prompt)
        )

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def missing(self) -> int:
        """Tokens still to be computed: 1 in decode, more in prefill."""
        return len(self.tokens) - self.computed

    @property
    def scored(self) -> int:
        """Up to which position the prompt's logits are not needed, or not any more; its last row gives the output."""
        last = self.prompt_length - 1
        return last if self.sampling.prompt_logprobs is None else min(last, len(self.prompt_logprobs))

    @property
    def ends(self) -> bool:
        """Whether it ends with the token that is drawn next, whichever that is."""
        return self.output_length + 1 >= self.sampling.max_tokens

    def prompt_ids(self) -> NDArray[np.int64]:
        """The distinct tokens of the prompt, in order of their ids."""
        if self._prompt_ids is None:
            self._prompt_ids = np.unique(np.asarray(self.tokens[: self.prompt_length], dtype=np.int64))
        return self._prompt_ids

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None."""
        if self.tokens[-1] in self.sampling.stop_token_ids:
            return "stop"
        return "length" if self.output_length >= self.sampling.max_tokens else None
