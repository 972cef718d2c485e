"""POST /tokenize and /detokenize, in vLLM's shapes: what a text or a conversation is in token ids, and back."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from server.api.asgi import read_json
from server.api.chat import encode_messages
from server.api.generation import Ids, check_ids
from server.api.openapi import json_body
from server.api.schemas.answers import Text, Tokens
from server.api.schemas.generation import Messages
from server.api.selection import select
from server.errors import InvalidRequestError
from server.serving import Edge, EdgeOf, Served

router = APIRouter(tags=["tokens"])


class _Request(BaseModel):
    """Who would answer. The ids do not depend on it; a name that nobody has is refused all the same."""

    model_config = ConfigDict(frozen=True)

    model: str | None = Field(None, min_length=1)
    adapter: str | None = Field(None, min_length=1)


class TokenizeRequest(_Request):
    """A prompt, or a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(_Request):
    """Token ids."""

    tokens: Annotated[list[int], Field(fail_fast=True)]


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest))
async def tokenize(request: Request, edge: EdgeOf) -> Tokens:
    """The ids that a completion or a chat completion would begin with."""
    served = edge.serving.ready()
    body = await read_json(request, TokenizeRequest)
    _check_name(body, served, edge)
    ids = await asyncio.to_thread(_encode, body, served)
    return {
        "count": len(ids),
        "max_model_len": served.max_model_len,
        "tokens": list(ids),
        "token_strs": served.tokenizer.spellings(ids) if body.return_token_strs else None,
    }


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request, edge: EdgeOf) -> Text:
    """The text of ids, special tokens included."""
    served = edge.serving.ready()
    body = await read_json(request, DetokenizeRequest)
    _check_name(body, served, edge)
    ids = check_ids(body.tokens, served.vocab_size, "tokens")
    return {"prompt": await asyncio.to_thread(served.tokenizer.decode_verbatim, ids)}


def _check_name(body: _Request, served: Served, edge: Edge) -> None:
    select(served, edge.base_names(served), body.model, body.adapter).release()


def _encode(body: TokenizeRequest, served: Served) -> Ids:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", param="prompt")
    if body.prompt is not None:
        return served.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise InvalidRequestError(
            "add_special_tokens: is for a prompt; the chat template writes its own",
            param="add_special_tokens",
        )
    assert body.messages is not None
    return encode_messages(
        served.tokenizer,
        body.messages,
        body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt,
    )
