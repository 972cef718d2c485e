"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from server.api.asgi import read_json
from server.api.generation import Echo, Lengths, Prompt, Scored, check_ids, check_known
from server.api.openapi import json_body, streamed
from server.api.reply import Call, Fields, Format, answer, bounded
from server.api.schemas.answers import Completion, CompletionChunk
from server.api.schemas.generation import COMPLETION_NEUTRAL, CompletionRequest
from server.errors import InvalidRequestError
from server.serving import EdgeOf, Served
from server.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
INLINE = 2000  # characters that are encoded sooner than a thread could be asked to

router = APIRouter(prefix="/v1", tags=["generation"])


def _text(text: str) -> Fields:
    return {"text": text}


def _delta(text: str, _first: bool) -> Fields:
    return {"text": text}


def _logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> Fields:
    """Lists of equal length; a prompt's first token has null in place of its numbers."""
    return {
        "tokens": [tokenizer.name(each.token_id) for each in scored],
        "token_logprobs": [
            None if each.logprobs is None else bounded(each.logprobs.logprob) for each in scored
        ],
        "top_logprobs": [_likeliest(tokenizer, each) for each in scored],
        "text_offset": [each.offset for each in scored],
    }


def _likeliest(tokenizer: Tokenizer, scored: Scored) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one; of several with one name the likeliest."""
    if scored.logprobs is None:
        return None
    found: dict[str, float] = {}
    for id, logprob in (*scored.logprobs.top, (scored.token_id, scored.logprobs.logprob)):
        found.setdefault(tokenizer.name(id), bounded(logprob))
    return found


FORMAT = Format("cmpl-", "text_completion", "text_completion", _text, _delta, _logprobs)


@router.post(
    "/completions",
    responses=streamed(Completion, CompletionChunk),
    openapi_extra=json_body(CompletionRequest),
)
async def create_completion(request: Request, edge: EdgeOf) -> Response:
    """Continue one or several prompts, with the base or with the adapter that `adapter` or `model` names."""
    served = edge.serving.ready()
    body = await read_json(request, CompletionRequest)
    body.refuse_unsupported(COMPLETION_NEUTRAL)
    body.refuse_conflicts()

    lengths = Lengths(body.max_tokens, DEFAULT_MAX_TOKENS, behind="prompt")

    async def encode() -> Sequence[Prompt]:
        if sum(map(len, body.prompts)) <= INLINE and not body.echo:
            return _encode(body, lengths, served)
        return await asyncio.to_thread(_encode, body, lengths, served)

    return await answer(Call(request, edge, served, body, FORMAT), lengths, encode)


def _encode(body: CompletionRequest, lengths: Lengths, served: Served) -> list[Prompt]:
    found: list[Prompt] = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            ids = check_known(served.tokenizer.encode(prompt), served, "prompt")
        else:
            ids = check_ids(prompt, served.vocab_size, "prompt")
        if not ids:
            raise InvalidRequestError("prompt: has no tokens", param="prompt")
        lengths.most(len(ids), served.max_model_len)  # before anybody works on a prompt that is too long
        given = prompt if isinstance(prompt, str) else None
        found.append(Prompt(ids, Echo.of(served.tokenizer, ids, given) if body.echo else None))
    return found
