"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.asgi import read_json
from server.api.generation import Ids, Lengths, check_ids
from server.api.reply import Call, Format, answer
from server.api.schemas.generation import CompletionRequest
from server.errors import InvalidRequestError
from server.serving import EdgeOf, Served

DEFAULT_MAX_TOKENS = 16  # OpenAI's
INLINE = 2000  # characters that are encoded sooner than a thread could be asked to

router = APIRouter(prefix="/v1", tags=["generation"])


def _text(text: str) -> dict[str, Any]:
    return {"text": text}


def _delta(text: str, _first: bool) -> dict[str, Any]:
    return {"text": text}


FORMAT = Format("cmpl-", "text_completion", "text_completion", _text, _delta)


@router.post(
    "/completions",
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": CompletionRequest.model_json_schema()}}}
    },
)
async def create_completion(request: Request, edge: EdgeOf) -> Response:
    """Continue one or several prompts, with the base or with the adapter that `adapter` or `model` names."""
    served = edge.serving.ready()
    body = await read_json(request, CompletionRequest)
    body.refuse_unsupported()

    async def encode() -> Sequence[Ids]:
        if sum(map(len, body.prompts)) <= INLINE:
            return _encode(body, served)
        return await asyncio.to_thread(_encode, body, served)

    call = Call(request, edge, served, body, FORMAT)
    return await answer(call, Lengths(body.max_tokens, DEFAULT_MAX_TOKENS), encode)


def _encode(body: CompletionRequest, served: Served) -> list[Ids]:
    found: list[Ids] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            ids = served.tokenizer.encode(prompt)
        else:
            ids = check_ids(prompt, served.vocab_size, "prompt")
        if not ids:
            raise InvalidRequestError("prompt: has no tokens", param="prompt")
        found.append(ids)
    return found
