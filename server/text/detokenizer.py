"""Text from ids that arrive one by one: never half a character, and in sum exactly the decode of all ids.

Knows nothing of any tokenizer but its decode function, its special ids and its byte-fallback ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one


class IncrementalDetokenizer:
    """Decodes a short window: some ids already shown, for their effect on spacing, and the ids still pending.

    Text is held back while it may still change: when it ends in a replacement character (half a character),
    and while a run of byte-fallback ids is open (one more byte can turn the whole run into replacement
    characters).
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], special_ids: Set[int], byte_ids: Set[int]
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._byte_ids = byte_ids
        self._window: list[int] = []
        self._shown = 0  # how many ids at the window's beginning have been shown
        self._shown_text = ""  # their text

    def add(self, token_id: int) -> str:
        """The text that this id makes certain: its own, or none, or that of several ids."""
        if token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """The ids have ended: the rest, with replacement characters where no character was completed."""
        if self._shown == len(self._window):
            return ""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        piece = text[len(self._shown_text) :]
        pending = self._window[self._shown :]
        if alone := self._decode(pending):
            self._window, self._shown_text = pending, alone
        else:  # these ids have no text of their own, so they cannot stand for what came before them
            self._shown_text = text
        self._shown = len(self._window)
        return piece
