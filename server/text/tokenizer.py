"""Ids to text and back, piece by piece, cut at stop strings.

`Tokenizer` is a transformers tokenizer behind the few operations that serving needs; every decode skips special tokens
and leaves spaces alone, so that "the text of these ids" has one meaning everywhere. `IncrementalDetokenizer` gives text
from ids that arrive one by one: never half a character, and in sum exactly the decode of all ids, or what it adds to
that of a prompt. `StopChecker` finds where that text ends. `Tokenizer.piece` is what one id stands for by itself, in
bytes, since it may be half a character. Knows nothing of sequences or requests.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# what transformers hands to a chat template, beside its options
_RENDERED = frozenset({"conversations", "messages"})
_LONGEST_CHARACTER = 4  # bytes, and so ids that it may take
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
_JOINS = "@@"  # ends a part of a word, in fastBPE's vocabularies, and goes when the next part comes


class ChatTemplateError(ValueError):
    """The conversation does not fit the model's chat template, or there is none."""


class Tokenizer:
    """A tokenizer that several threads may use: it is never set to truncate or pad."""

    def __init__(self, backend: PreTrainedTokenizerBase) -> None:
        vocabulary = backend.get_vocab()
        self._backend = backend
        self.vocab_size = 1 + max(vocabulary.values())  # there may be fewer tokens: ids may have gaps
        self.special_ids = frozenset(
            id for id, token in backend.added_tokens_decoder.items() if token.special
        )
        self._bytes = {  # ids that the decoder takes for a byte; to some decoders they are words
            id: int(token[3:5], 16)
            for token, id in vocabulary.items()
            if _BYTE_TOKEN.fullmatch(token) and id not in self.special_ids and self.decode([id]) != token
        }
        self._bytes_of = _byte_level_alphabet(backend)
        self._anchor = self._find_anchor()
        self._open_ends = self._find_open_ends(vocabulary)
        self._pieces: dict[int, bytes] = {}
        # names that a chat template gets from us, and transformers' own options: a template of the caller's among them
        self.reserved = frozenset(inspect.signature(type(backend).apply_chat_template).parameters) | _RENDERED
        self._reads_parts = _reads_parts(backend)
        self.encode("warm")  # drops a saved truncation setting before threads share this

    @classmethod
    def load(cls, model: str, *, trust_remote_code: bool = False, chat_template: str | None = None) -> Self:
        """The tokenizer of a checkpoint folder or hub name, with another chat template if one is given."""
        from transformers import AutoTokenizer

        backend = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        if chat_template is not None:
            backend.chat_template = chat_template
            _check_template(backend)
        return cls(backend)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of `text`, with the model's beginning token unless it is not wanted."""
        return tuple(self._backend(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        text = self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def piece(self, id: int) -> bytes:
        """What one id stands for inside a text: its bytes, its name if it is special, nothing if it is unknown."""
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = self._piece(id)
        return found

    def name(self, id: int) -> str:
        """The id's piece as text; `bytes:\\xe2\\x82` where it is no whole characters."""
        piece = self.piece(id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _piece(self, id: int) -> bytes:
        token = self._backend.convert_ids_to_tokens(id) if id < self.vocab_size else None
        if token is None:
            return b""
        if id in self.special_ids:
            return str(token).encode()
        if id in self._bytes:
            return bytes([self._bytes[id]])
        if self._bytes_of and all(character in self._bytes_of for character in token):
            return bytes(self._bytes_of[character] for character in token)
        before = [] if self._anchor is None else [self._anchor]  # a first id may lose its space
        return self.decode([*before, id])[len(self.decode(before)) :].encode()

    def _find_anchor(self) -> int | None:
        """An ordinary id to decode another one behind."""
        for id in self._backend("a", add_special_tokens=False, verbose=False)["input_ids"]:
            if id not in self.special_ids and id not in self._bytes and self.decode([id]):
                return int(id)
        return None

    def _find_open_ends(self, vocabulary: Mapping[str, int]) -> tuple[str, ...]:
        """Ends of a text that may go when more comes."""
        part = next((id for token, id in vocabulary.items() if token.endswith(_JOINS)), None)
        if part is None or self.decode([part, part]).count(_JOINS) != 1:
            return (_REPLACEMENT,)
        return (_REPLACEMENT, _JOINS)

    def detokenizer(self, behind: Sequence[int] = ()) -> IncrementalDetokenizer:
        """A fresh incremental decoder for one sequence: for a whole text, or for what comes behind the ids of a prompt.

        A text's first id may lose its space. Behind a prompt it does not, so that the two can be put together; any
        other id stands for the prompt's last one, for that may be half a character.
        """
        fresh = IncrementalDetokenizer(
            self.decode, self.vocab_size, self.special_ids, self._bytes, self._open_ends
        )
        has_text = any(id not in self.special_ids and id < self.vocab_size for id in reversed(behind))
        if has_text and self._anchor is not None:
            fresh.add(self._anchor)
        return fresh

    def decode_verbatim(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included: what gives these ids again."""
        known = [id for id in ids if id < self.vocab_size]  # beyond it some tokenizers raise
        text = self._backend.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def spellings(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary spells each of `ids`."""
        return [str(token) for token in self._backend.convert_ids_to_tokens(list(ids))]

    @property
    def has_chat_template(self) -> bool:
        return bool(self._backend.chat_template)

    def knows_role(self, role: str) -> bool:
        """Whether the chat template speaks of this role by name; of several, the one that is used."""
        return role in self._backend.get_chat_template()

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """The ids of a conversation in the model's own chat template, ready for the assistant's turn.

        `variables` are the template's own; none may be `reserved`. A message's content is a text or a list of text
        parts, and comes to the template as it reads them. One that does not speak of the role `developer` gets
        `system` in its place.
        """
        assert not self.reserved & (variables or {}).keys(), "these are not the template's"
        if not self.has_chat_template:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        try:
            known = self.knows_role("developer")
            turns = [
                {
                    **message,
                    "role": "system" if message["role"] == "developer" and not known else message["role"],
                    "content": self._content(message["content"]),
                }
                for message in messages
            ]
            text = self._backend.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        except Exception as error:  # a template is a program: it may divide by zero
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        assert isinstance(text, str)
        return self.encode(text, add_special_tokens=False)

    def _content(self, given: str | Sequence[Mapping[str, str]]) -> str | Sequence[Mapping[str, str]]:
        """What a message says, as the chat template reads it."""
        if self._reads_parts:
            return [_part(given)] if isinstance(given, str) else given or [_part("")]
        return given if isinstance(given, str) else "\n".join(part["text"] for part in given)


def _part(text: str) -> Mapping[str, str]:
    return {"type": "text", "text": text}


def _reads_parts(backend: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template looks for a message's parts and passes over a text, as LLaVA's and SmolVLM's do."""

    def shows(content: object) -> bool:
        try:
            return probe in str(
                backend.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            )
        except Exception:  # whatever a program may raise
            return False

    probe = "what is asked"
    return bool(backend.chat_template) and not shows(probe) and shows([_part(probe)])


def _check_template(backend: PreTrainedTokenizerBase) -> None:
    """Raise `ChatTemplateError` if the template is not one; that it refuses this conversation is its right."""
    from jinja2 import TemplateSyntaxError

    try:
        backend.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ChatTemplateError(f"line {error.lineno}: {error.message}") from error
    except Exception:  # whatever a program may raise
        pass


def _byte_level_alphabet(backend: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """The byte that each character of a byte-level vocabulary stands for; empty for other kinds of tokenizers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    inner = getattr(backend, "backend_tokenizer", None)
    if inner is None or '"ByteLevel"' not in json.dumps(json.loads(inner.to_str())["decoder"]):
        return {}
    return {character: byte for byte, character in bytes_to_unicode().items()}


class IncrementalDetokenizer:
    """Decodes a short window: some ids already shown, for their effect on spacing, and the ids still pending.

    Short whatever comes, unless each of many ids in a row ends one character and begins the next, or one word goes on.

    Text is held back while it may still change: when it ends in a replacement character (half a character) or in
    what joins two parts of a word, and while a run of byte-fallback ids is open (one more byte can turn the whole
    run into replacement characters).
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        vocab_size: int,  # a model may have more ids than its tokenizer
        special_ids: Set[int],
        bytes_: Mapping[int, int],  # of the ids that stand for one
        open_ends: tuple[str, ...],  # of a text that may still change
    ) -> None:
        self._decode = decode
        self._vocab_size = vocab_size
        self._special_ids = special_ids
        self._bytes = bytes_
        self._open_ends = open_ends
        self._window: list[int] = []
        self._shown = 0  # how many ids at the window's beginning have been shown
        self._shown_text = ""  # their text

    def add(self, token_id: int) -> str:
        """The text that this id makes certain: its own, or none, or that of several ids."""
        if token_id in self._special_ids or token_id >= self._vocab_size:
            return ""
        self._window.append(token_id)
        if token_id in self._bytes:
            return ""
        text = self._decode(self._window)
        return self._show_but_last(text) if text.endswith(self._open_ends) else self._show(text)

    @property
    def held(self) -> int:
        """How many characters are whole in what is held back; if bytes yet to come break them, they become more."""
        ids = self._window[self._shown :]
        if not ids:
            return 0
        if ids[-1] in self._bytes:
            return len(bytes(self._bytes[id] for id in ids if id in self._bytes).decode(errors="ignore"))
        text = self._decode(self._window).rstrip(_REPLACEMENT)
        for end in self._open_ends:
            text = text.removesuffix(end)
        return max(0, len(text) - len(self._shown_text))

    def copy(self) -> IncrementalDetokenizer:
        """One that goes on from here by itself."""
        other = IncrementalDetokenizer(
            self._decode, self._vocab_size, self._special_ids, self._bytes, self._open_ends
        )
        other._window, other._shown, other._shown_text = list(self._window), self._shown, self._shown_text
        return other

    def flush(self) -> str:
        """The ids have ended: the rest, with replacement characters where no character was completed."""
        if self._shown == len(self._window):
            return ""
        return self._show(self._decode(self._window))

    def _show_but_last(self, text: str) -> str:
        """The text ends in half a character: what the ids before the last one say, if the last has begun it.

        Without this a text of broken characters would be decoded from its beginning for each id.
        """
        if len(self._window) - self._shown < _LONGEST_CHARACTER:
            return ""
        last = self._window.pop()
        before = self._decode(self._window)
        certain = len(self._shown_text) < len(before) < len(text) and text.startswith(before)
        piece = self._show(before) if certain else ""
        self._window.append(last)
        return piece

    def _show(self, text: str) -> str:
        piece = text[len(self._shown_text) :]
        pending = self._window[self._shown :]
        if alone := self._decode(pending):
            self._window, self._shown_text = pending, alone
        elif self._shown and (alone := self._decode(self._window[self._shown - 1 :])):
            self._window, self._shown_text = self._window[self._shown - 1 :], alone
        else:  # these ids have no text of their own, so they cannot stand for what came before them
            self._shown_text = text
        self._shown = len(self._window)
        return piece


class StopChecker:
    """Cuts a growing text before the first stop string in it.

    First means completed first, and of two completed by the same character the longer one: so the cut does
    not depend on how the text was divided into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece; return what may be shown now. Once `matched` is set nothing more is."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        hits = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if hits:
            _, start, self.matched = min(hits)
            self._held = ""
            return text[:start]
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string after all."""
        rest, self._held = self._held, ""
        return rest

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
