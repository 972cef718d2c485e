"""What the engine runs: one sequence of tokens and how far it has come. Knows nothing of text or of its client."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.messages import FinishReason, Sampling, Submit


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and output of one sequence, and the KV blocks that hold what was computed of them."""

    request_id: str
    prompt_length: int
    sampling: Sampling
    generation: str | None
    tokens: list[int]
    computed: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    passed: int = 0  # how many younger sequences were admitted before this one

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

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None."""
        if self.tokens[-1] in self.sampling.stop_token_ids:
            return "stop"
        return "length" if self.output_length >= self.sampling.max_tokens else None
