"""Ids to text and back: a transformers tokenizer behind the few operations that serving needs.

Knows nothing of sequences or requests. Every decode skips special tokens and leaves spaces alone, so that
"the text of these ids" has one meaning everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from server.text.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class ChatTemplateError(ValueError):
    """The conversation does not fit the model's chat template, or there is none."""


class Tokenizer:
    """A tokenizer that several threads may use: it is never set to truncate or pad."""

    def __init__(self, backend: PreTrainedTokenizerBase) -> None:
        self._backend = backend
        self.vocab_size = len(backend)
        self.special_ids = frozenset(
            id for id, token in backend.added_tokens_decoder.items() if token.special
        )
        self.byte_ids = frozenset(
            id for token, id in backend.get_vocab().items() if _BYTE_TOKEN.fullmatch(token)
        )
        self.encode(
            "warm"
        )  # a saved truncation setting is dropped by the first call, before threads share this

    @classmethod
    def load(cls, model: str, *, trust_remote_code: bool = False) -> Self:
        """The tokenizer of a checkpoint folder or hub name."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of `text`, with the model's beginning token unless it is not wanted."""
        return tuple(self._backend(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        text = self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh incremental decoder for one sequence."""
        return IncrementalDetokenizer(self.decode, self.special_ids, self.byte_ids)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._backend.chat_template)

    def knows_role(self, role: str) -> bool:
        """Whether the chat template speaks of this role by name."""
        return role in str(self._backend.chat_template)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """The ids of a conversation in the model's own chat template, ready for the assistant's turn."""
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        try:
            text = self._backend.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                **{"add_generation_prompt": True, **(options or {})},
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        assert isinstance(text, str)
        return self.encode(text, add_special_tokens=False)
