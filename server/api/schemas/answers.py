"""The shapes of what is answered, as the OpenAPI document has them. Answers themselves are plain dicts."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict  # the one that pydantic can read on Python 3.11

from server.engine.sequence import FinishReason


class Usage(TypedDict):
    """Tokens that were counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(TypedDict):
    """Who answered a request for text. `adapter` and `adapter_generation` are null for the base."""

    id: str
    created: int
    model: str
    adapter: str | None
    adapter_generation: str | None


class CompletionLogprobs(TypedDict):
    """Lists of equal length; a prompt's first token has null for its numbers."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text. In a stream, a piece of it, and null for both reasons until its last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class Completion(Answer):
    """What POST /v1/completions answers."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class StreamUsage(TypedDict, total=False):
    """There with `stream_options` that ask for it, and then null where it is not due."""

    usage: Usage | None


class CompletionChunk(Answer, StreamUsage):
    """The data of one event of a streamed completion; the last event is `[DONE]`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class LikelyToken(TypedDict):
    """A token, its logprob and its exact bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(LikelyToken):
    """A token that was chosen, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(TypedDict):
    """One entry for each token."""

    content: list[ScoredToken]
    refusal: None


class ChatMessage(TypedDict):
    """The model's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatEnd(TypedDict):
    """What a choice of a chat completion has, streamed or not."""

    index: int
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class ChatChoice(ChatEnd):
    """One turn."""

    message: ChatMessage


class ChatCompletion(Answer):
    """What POST /v1/chat/completions answers."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatRole(TypedDict, total=False):
    """In a choice's first piece."""

    role: Literal["assistant"]


class ChatDelta(ChatRole):
    """A piece of the text."""

    content: str


class ChatChunkChoice(ChatEnd):
    """A piece of one turn, and null for both reasons until its last."""

    delta: ChatDelta


class ChatCompletionChunk(Answer, StreamUsage):
    """The data of one event of a streamed chat completion; the last event is `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class Model(TypedDict):
    """The base, whose `root` is its path, or an adapter, whose `root` is its generation and `parent` the base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    """The base by each of its names, then the adapters that are ready."""

    object: Literal["list"]
    data: list[Model]


class DeletedModel(TypedDict):
    """An adapter that was removed as a model."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


class AdapterFinding(TypedDict):
    """Something that is wrong with an adapter: where, what, and what to do."""

    where: str
    problem: str
    cure: str


class Adapter(TypedDict):
    """A name and the generation it points at; `findings` say why one is `incompatible` with this base."""

    id: str
    object: Literal["adapter"]
    state: Literal["ready", "incompatible"]
    generation: str
    revision: int
    created: int
    updated: int
    bytes: int
    rank: int
    modules: list[str]
    base_model: str | None
    references: int
    findings: list[AdapterFinding]


class AdapterList(TypedDict):
    """Every adapter, those included that this base cannot serve."""

    object: Literal["list"]
    data: list[Adapter]


class AdapterVersion(TypedDict):
    """A revision that a name is at, or was at and can return to."""

    revision: int
    generation: str
    created: int
    current: bool


class AdapterVersionList(TypedDict):
    """The present version and those that are kept, newest first."""

    object: Literal["list"]
    data: list[AdapterVersion]


class Tokens(TypedDict):
    """What POST /tokenize answers; `token_strs` with `return_token_strs`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    """What POST /detokenize answers."""

    prompt: str


class Progress(TypedDict, total=False):
    """How far a start has come (0 to 1), and what it does or why it failed."""

    progress: float
    detail: str


class Status(Progress):
    """The server's phase."""

    status: Literal["loading", "ready", "draining", "failed"]


class Version(TypedDict):
    """Which server answers."""

    name: str
    version: str


class Details(TypedDict, total=False):
    """Of an adapter that was refused."""

    details: list[AdapterFinding]


class ErrorBody(Details):
    """What is wrong, for people; the field or header at fault; and a code that does not change."""

    message: str
    type: str
    param: str | None
    code: str


class Error(TypedDict):
    """What every request gets that fails before its answer began."""

    error: ErrorBody
