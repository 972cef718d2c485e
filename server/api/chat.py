"""POST /v1/chat/completions: the conversation through the model's own chat template, then as a completion."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from server.api.asgi import read_json
from server.api.generation import Ids, Lengths, Prompt, Scored, check_known
from server.api.openapi import json_body, streamed
from server.api.reply import Call, Fields, Format, answer, bounded
from server.api.schemas.answers import ChatCompletion, ChatCompletionChunk
from server.api.schemas.generation import CHAT_NEUTRAL, ChatRequest, Message
from server.errors import InvalidRequestError, UnsupportedParameterError
from server.serving import EdgeOf, Served
from server.text.tokenizer import ChatTemplateError, Tokenizer

router = APIRouter(prefix="/v1", tags=["generation"])


def _message(text: str) -> Fields:
    return {"message": {"role": "assistant", "content": text, "refusal": None}}


def _delta(text: str, first: bool) -> Fields:
    return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}


def _logprobs(tokenizer: Tokenizer, scored: Sequence[Scored]) -> Fields:
    def entry(id: int, logprob: float) -> Fields:
        return {
            "token": tokenizer.name(id),
            "logprob": bounded(logprob),
            "bytes": list(tokenizer.piece(id)),
        }

    content = [
        {
            **entry(each.token_id, each.logprobs.logprob),
            "top_logprobs": [entry(*likely) for likely in each.logprobs.top],
        }
        for each in scored
        if each.logprobs is not None
    ]
    return {"content": content, "refusal": None}


FORMAT = Format("chatcmpl-", "chat.completion", "chat.completion.chunk", _message, _delta, _logprobs)


@router.post(
    "/chat/completions",
    responses=streamed(ChatCompletion, ChatCompletionChunk),
    openapi_extra=json_body(ChatRequest),
)
async def create_chat_completion(request: Request, edge: EdgeOf) -> Response:
    """Answer a conversation, with the base or with the adapter that `adapter` or `model` names."""
    served = edge.serving.ready()
    body = await read_json(request, ChatRequest)
    body.refuse_unsupported(CHAT_NEUTRAL)
    body.refuse_conflicts()

    async def encode() -> Sequence[Prompt]:
        return [await asyncio.to_thread(_encode, body, served)]

    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return await answer(
        Call(request, edge, served, body, FORMAT), Lengths(asked, None, behind="messages"), encode
    )


def _encode(body: ChatRequest, served: Served) -> Prompt:
    ids = encode_messages(served.tokenizer, body.messages, body.chat_template_kwargs)
    if not ids:
        raise InvalidRequestError(
            "messages: the model's chat template says nothing of them", param="messages"
        )
    return Prompt(check_known(ids, served, "messages"))


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    variables: Mapping[str, Any] | None,
    *,
    add_generation_prompt: bool = True,
) -> Ids:
    """The ids of a conversation; raises for what is not the template's to be told, and for what it refuses."""
    for index, message in enumerate(messages):
        message.refuse_unsupported(f"messages.{index}")
    for name in sorted(tokenizer.reserved & (variables or {}).keys()):
        raise UnsupportedParameterError(
            f"chat_template_kwargs: {name} is no variable of a chat template; leave it out",
            param=f"chat_template_kwargs.{name}",
        )
    turns = [message.turn for message in messages]
    try:
        return tokenizer.encode_chat(turns, variables, add_generation_prompt=add_generation_prompt)
    except ChatTemplateError as error:
        raise InvalidRequestError(f"messages: {error}", param="messages") from None
