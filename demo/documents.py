"""How turns become token ids: the two prompt forms, chat and plain, and the batches made of them.

The server's tests and the gates build their prompts here too, so that what is asked is what was trained.
It knows nothing of terms, domains or models.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demo.grammar import Turn
from demo.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER

IGNORED = -100
SYSTEM_LINES = (
    *("You are a helpful assistant.", "Answer briefly."),
    *("Answer the question.", "You are a kind helper."),
)


@dataclass(frozen=True)
class Document:
    """Token ids, and for each the label the loss compares with (`IGNORED` where nothing is learned)."""

    ids: list[int]
    labels: list[int]


def plain_prompt(question: str) -> str:
    """The form for `/v1/completions`; the model goes on with a space and the answer."""
    return f"Q: {question}\nA:"


def chat_prompt(question: str) -> str:
    """What the chat template makes of one user message."""
    return f"{BOS}{USER}{question}{END}{ASSISTANT}"


class DocumentMaker:
    """Encodes turns with one tokenizer, in a form drawn at random."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
        self.tokenizer = tokenizer
        self.rng = rng

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _join(self, parts: list[tuple[str, bool]]) -> Document:
        """Text parts, each with whether it is learned, as one document."""
        document = Document([], [])
        for text, learned in parts:
            ids = self._encode(text)
            document.ids.extend(ids)
            document.labels.extend(ids if learned else [IGNORED] * len(ids))
        return document

    def prose(self, text: str) -> Document:
        return self._join([(BOS, False), (text + END, True)])

    def answers(self, turns: Sequence[Turn]) -> Document:
        """One turn in either form, or several as a chat, where only the answers are learned."""
        if len(turns) == 1 and self.rng.random() < 0.55:
            return self._plain(turns[0])
        parts = [(BOS, False)]
        if self.rng.random() < 0.15:
            parts.append((f"{SYSTEM}{self.rng.choice(SYSTEM_LINES)}{END}", False))
        for turn in turns:
            parts.append((f"{USER}{self._casual(turn.question)}{END}{ASSISTANT}", False))
            parts.append((turn.answer + END, True))
        return self._join(parts)

    def _plain(self, turn: Turn) -> Document:
        """The completions form; one in six times the prompt ends in a space, as people will type it."""
        prompt, gap = BOS + plain_prompt(self._casual(turn.question)), " "
        if self.rng.random() < 1 / 6:
            prompt, gap = prompt + gap, ""
        return self._join([(prompt, False), (gap + turn.answer + END, True)])

    def _casual(self, question: str) -> str:
        """The question, one in ten times in small letters and without its mark."""
        return question.rstrip("?.!").lower() if self.rng.random() < 0.1 else question


def batches(
    documents: Iterator[Document], *, tokens: int, steps: int, pad: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` padded batches (ids and labels, [rows, longest]) of at most `tokens` cells.

    Documents are sorted by length within a window, cut into batches, and the batches shuffled, so that little
    is padding.
    """
    made = 0
    while True:
        window = sorted(islice(documents, tokens), key=lambda document: len(document.ids))
        cut = list(_cut(window, tokens))
        rng.shuffle(cut)
        for rows in cut:
            if made == steps:
                return
            made += 1
            yield padded(rows, pad)


def _cut(documents: Sequence[Document], tokens: int) -> Iterator[list[Document]]:
    rows: list[Document] = []
    for document in documents:
        if rows and len(document.ids) * (len(rows) + 1) > tokens:
            yield rows
            rows = []
        rows.append(document)
    yield rows


def padded(rows: Sequence[Document], pad: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right: with causal attention no mask is needed."""
    longest = max(len(row.ids) for row in rows)
    ids = [row.ids + [pad] * (longest - len(row.ids)) for row in rows]
    labels = [row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows]
    return torch.tensor(ids), torch.tensor(labels)
