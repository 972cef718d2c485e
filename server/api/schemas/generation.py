"""The bodies of POST /v1/completions and /v1/chat/completions, and the parameters that are known but not served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError, PydanticUseDefault, ValidationError

from server.errors import InvalidRequestError, UnsupportedParameterError

MAX_CHOICES = 16  # `n`
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 256
MAX_BIASES = 300  # entries of `logit_bias`
MAX_LOGPROBS = 20
MAX_PROMPTS = 4096
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # parameter -> the values that change nothing, beside null; anything else is refused
    "add_special_tokens": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "ebnf": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "lora_path": (),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": (False,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}

COMPLETION_NEUTRAL: Mapping[str, tuple[object, ...]] = {**NEUTRAL, "top_logprobs": (0,)}

CHAT_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **NEUTRAL,
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}

MESSAGE_NEUTRAL: Mapping[str, tuple[object, ...]] = {"audio": (), "function_call": (), "tool_calls": ([],)}


def described(message: str) -> WrapValidator:
    """One error in words for a union of shapes, in place of one per shape."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("shape", "{words}", {"words": message}) from None

    return WrapValidator(validate)


def _default_for_null(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


_Count = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Count = Annotated[_Count, BeforeValidator(_default_for_null, json_schema_input_type=_Count | None)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)],
    described(f"must be a string or at most {MAX_STOPS} strings, of 1 to {MAX_STOP_LENGTH} characters each"),
]


Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Biases = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,17})$")],
        Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)],
    ],
    Field(max_length=MAX_BIASES),
    described(f"must map at most {MAX_BIASES} token ids, as strings, to numbers from -100 to 100"),
]


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GenerationRequest(BaseModel):
    """What both kinds of request say about who answers and how tokens are chosen."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = Field(None, min_length=1)
    adapter: str | None = Field(None, min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=2, allow_inf_nan=False)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    min_tokens: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: Count = 1
    best_of: int | None = Field(None, ge=1)
    stop: Stop | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=MAX_STOP_IDS, fail_fast=True)
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def refuse_unsupported(self, neutral: Mapping[str, tuple[object, ...]]) -> None:
        """Raise for a parameter that asks for something we would not do; unknown ones are ignored."""
        _refuse(self.model_extra or {}, neutral)
        if self.best_of is not None and self.best_of != self.n:
            raise UnsupportedParameterError("best_of is not supported other than equal to n", param="best_of")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is only allowed when stream is true", param="stream_options"
            )


TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
PromptField = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    Field(union_mode="left_to_right"),
    described(
        "must be a string, a list of strings, a list of token ids or a list of such lists, not empty, "
        f"and hold at most {MAX_PROMPTS} prompts"
    ),
]


class CompletionRequest(GenerationRequest):
    """A prompt to go on from, or several: as text or as token ids."""

    prompt: PromptField
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None if no logprobs are asked for."""
        return self.logprobs

    def refuse_conflicts(self) -> None:
        """Raise for fields that are each right, and together are not."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens: 0 is only allowed with echo", param="max_tokens")

    @property
    def choices(self) -> int:
        """How many sequences are asked for."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return self.n if one else len(self.prompt) * self.n

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


class TextPart(BaseModel):
    """A part of a message; only text is served."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)],
    described(f"must be a string or a list of at most {MAX_PARTS} text parts"),
]


class Message(BaseModel):
    """One turn of the conversation."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @property
    def turn(self) -> dict[str, Any]:
        """What of it the chat template is told."""
        content = (
            self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        )
        turn = {"role": self.role, "content": content}
        return turn if self.name is None else {**turn, "name": self.name}

    def refuse_unsupported(self, place: str) -> None:
        """As for a request's parameters; `place` is where among them it stands."""
        _refuse(self.model_extra or {}, MESSAGE_NEUTRAL, f"{place}.")


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(GenerationRequest):
    """A conversation to answer."""

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def top(self) -> int | None:
        """As for completions."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def choices(self) -> int:
        """As for completions."""
        return self.n

    def refuse_conflicts(self) -> None:
        """Raise for fields that are each right, and together are not."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed with logprobs: true", param="top_logprobs"
            )


Body = CompletionRequest | ChatRequest


def _refuse(given: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]], place: str = "") -> None:
    for name in [name for name in given if name in neutral]:  # not a set: each start would name another first
        if given[name] is not None and not any(_same(given[name], value) for value in neutral[name]):
            param = f"{place}{name}"
            raise UnsupportedParameterError(
                f"{param} is not supported by this server; leave it out", param=param
            )


def _same(value: object, neutral: object) -> bool:
    """Equal, and not a boolean for a number: `true` is no 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
