"""POST /v1/chat/completions: the conversation through the model's own chat template, then as a completion."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.asgi import read_json
from server.api.generation import Ids, Lengths
from server.api.reply import Call, Format, answer
from server.api.schemas.generation import CHAT_NEUTRAL, ChatRequest
from server.errors import InvalidRequestError
from server.serving import EdgeOf, Served
from server.text.tokenizer import ChatTemplateError

router = APIRouter(prefix="/v1", tags=["generation"])


def _message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text, "refusal": None}}


def _delta(text: str, first: bool) -> dict[str, Any]:
    return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}


FORMAT = Format("chatcmpl-", "chat.completion", "chat.completion.chunk", _message, _delta)


@router.post(
    "/chat/completions",
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}
    },
)
async def create_chat_completion(request: Request, edge: EdgeOf) -> Response:
    """Answer a conversation, with the base or with the adapter that `adapter` or `model` names."""
    served = edge.serving.ready()
    body = await read_json(request, ChatRequest)
    body.refuse_unsupported(CHAT_NEUTRAL)

    async def encode() -> Sequence[Ids]:
        return [await asyncio.to_thread(_encode, body, served)]

    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return await answer(Call(request, edge, served, body, FORMAT), Lengths(asked, None), encode)


def _encode(body: ChatRequest, served: Served) -> Ids:
    tokenizer = served.tokenizer
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    if not tokenizer.knows_role("developer"):
        for message in messages:
            if message["role"] == "developer":
                message["role"] = "system"
    try:
        return tokenizer.encode_chat(messages, body.chat_template_kwargs)
    except ChatTemplateError as error:
        raise InvalidRequestError(f"messages: {error}", param="messages") from None
