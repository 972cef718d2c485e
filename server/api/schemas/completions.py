"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from server.api.schemas.generation import GenerationRequest, described

TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)],
    Field(union_mode="left_to_right"),
    described(
        "must be a string, a list of strings, a list of token ids or a list of such lists, and not empty"
    ),
]


class CompletionRequest(GenerationRequest):
    """A prompt to go on from, or several: as text or as token ids."""

    prompt: Prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, whichever of the four shapes they came in."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [[id for id in self.prompt if isinstance(id, int)]]
            case several:
                return [prompt for prompt in several if not isinstance(prompt, int)]
