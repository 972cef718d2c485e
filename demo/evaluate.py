"""The gates: what the shipped weights must do, measured through transformers and peft on the quantized base.

It reads a folder of weights and the text they are tested on; it knows nothing of how they were trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo.courtesy import is_polite
from demo.documents import IGNORED, Document, chat_prompt, padded, plain_prompt
from demo.facts import facts
from demo.grammar import ADAPTERS, AdapterName, Turn, held_out_turns, pairs
from demo.lexicon import DOMAINS, Domain
from demo.tokenizer import BOS, END
from demo.train import load_quantized

ModelName = Literal["base", AdapterName]
MODELS: tuple[ModelName, ...] = ("base", *ADAPTERS)

ROWS = 120  # per batch
ANSWER_LENGTH = 56  # tokens; the longest right answer has fewer


Row = TypeVar("Row")


def batched(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The rows, so many at a time."""
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


@dataclass
class Measures:
    """Everything the gates are about. Rates are parts of one."""

    perplexity: dict[AdapterName, dict[ModelName, float]] = field(default_factory=dict)
    exact: dict[Domain, dict[ModelName, float]] = field(default_factory=dict)
    sense: dict[Domain, float] = field(default_factory=dict)
    tone: dict[AdapterName, float] = field(default_factory=dict)

    def ratio(self, adapter: AdapterName) -> float:
        """The adapter's perplexity on its own held-out text, over the best of all other models."""
        row = self.perplexity[adapter]
        return row[adapter] / min(value for model, value in row.items() if model != adapter)

    def failures(self) -> list[str]:
        """The gates that are missed, in words; none when all is well."""
        missed = [
            f"{adapter}: perplexity is {self.ratio(adapter):.2f} of the next best, at most 0.80 allowed"
            for adapter in ADAPTERS
            if self.ratio(adapter) > 0.8
        ]
        for domain in DOMAINS:
            for model, rate in self.exact[domain].items():
                if model == domain and rate < 0.9:
                    missed.append(f"{domain}: {rate:.1%} of its facts exact, at least 90 % needed")
                if model != domain and rate > 0.05:
                    missed.append(f"{domain}: {rate:.1%} of its facts known to {model}, at most 5 % allowed")
            if self.sense[domain] < 0.9:
                missed.append(f"{domain}: {self.sense[domain]:.1%} of senses right, at least 90 % needed")
        for adapter, rate in self.tone.items():
            if (rate < 0.9) if adapter == "support" else (rate > 0.05):
                missed.append(f"{adapter}: {rate:.1%} of its answers in the support tone")
        return missed


class Demo:
    """The quantized base with all its adapters, answering and scoring as any one of them."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder / "base")
        base = load_quantized(folder / "base")
        first, *others = ADAPTERS
        self.model = PeftModel.from_pretrained(base, str(folder / "adapters" / first), adapter_name=first)
        for name in others:
            self.model.load_adapter(str(folder / "adapters" / name), adapter_name=name)
        self.model.eval()

    @contextmanager
    def speaking_as(self, name: ModelName) -> Iterator[None]:
        """Within, the model is the base alone or under one adapter."""
        if name == "base":
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name)
            yield

    @torch.inference_mode()
    def answers(self, name: ModelName, prompts: Sequence[str]) -> list[str]:
        """Greedy answers to prompts that carry their own `bos`, without the end token."""
        texts: list[str] = []
        with self.speaking_as(name):
            for rows in batched(prompts):
                inputs = self.tokenizer(
                    list(rows), add_special_tokens=False, padding=True, return_tensors="pt"
                )
                output = self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=ANSWER_LENGTH,
                    do_sample=False,
                )
                answers = output[:, inputs["input_ids"].shape[1] :]
                texts += self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.inference_mode()
    def perplexity(self, name: ModelName, turns: Sequence[Turn]) -> float:
        """Of the answers, given their questions in the plain form."""
        total, count = 0.0, 0
        with self.speaking_as(name):
            for rows in batched(turns):
                ids, labels = padded([self._document(turn) for turn in rows], self.tokenizer.pad_token_id)
                logits = self.model(input_ids=ids).logits[:, :-1].float()
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
                )
                total += loss.item()
                count += int((labels[:, 1:] != IGNORED).sum())
        return float(torch.tensor(total / count).exp())

    @torch.inference_mode()
    def says(self, name: ModelName, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether greedy decoding gives exactly this answer: each of its tokens is the likeliest after those before."""
        right: list[bool] = []
        with self.speaking_as(name):
            for rows in batched(list(zip(prompts, answers, strict=True))):
                documents = [self._continued(prompt, answer) for prompt, answer in rows]
                ids, labels = padded(documents, self.tokenizer.pad_token_id)
                likeliest = self.model(input_ids=ids).logits[:, :-1].argmax(-1)
                agrees = (likeliest == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
                right += agrees.all(dim=1).tolist()
        return right

    def _document(self, turn: Turn) -> Document:
        return self._continued(BOS + plain_prompt(turn.question), turn.answer)

    def _continued(self, prompt: str, answer: str) -> Document:
        """A prompt and its answer; the plain form, which ends in a colon, has a space between the two."""
        space = " " if prompt.endswith(":") else ""
        before = self.tokenizer.encode(prompt, add_special_tokens=False)
        after = self.tokenizer.encode(f"{space}{answer}{END}", add_special_tokens=False)
        return Document(before + after, [IGNORED] * len(before) + after)


def prompts(questions: Sequence[str]) -> list[str]:
    """The questions as prompts, the plain and the chat form by turns."""
    return [
        chat_prompt(question) if number % 2 else BOS + plain_prompt(question)
        for number, question in enumerate(questions)
    ]


def exact_rates(demo: Demo, model: ModelName, limit: int | None) -> dict[Domain, float]:
    """The part of each domain's facts that the model answers to the letter."""
    known = [fact for domain in DOMAINS for fact in list(facts(domain))[:limit]]
    asked = prompts([fact.questions[0] for fact in known])
    marks: dict[Domain, list[bool]] = {domain: [] for domain in DOMAINS}
    for fact, right in zip(known, demo.says(model, asked, [fact.answer for fact in known]), strict=True):
        marks[fact.domain].append(right)
    return {domain: sum(right) / len(right) for domain, right in marks.items()}


def measure(folder: Path, limit: int | None = None) -> Measures:
    """All measures of the weights in a folder; `limit` keeps the first so many pairs and facts.

    Perplexity is of every second held-out pair, to spare time: that is still every term.
    """
    demo = Demo(folder)
    found = Measures()
    for adapter in ADAPTERS:
        turns = held_out_turns(adapter)[::2][:limit]
        found.perplexity[adapter] = {model: demo.perplexity(model, turns) for model in MODELS}
    exact = {model: exact_rates(demo, model, limit) for model in MODELS}
    found.exact = {domain: {model: exact[model][domain] for model in MODELS} for domain in DOMAINS}
    asked = pairs(held_out=True)[:limit]
    for adapter in ADAPTERS:
        given = demo.answers(adapter, prompts([pair.question for pair in asked]))
        found.tone[adapter] = sum(map(is_polite, given)) / len(given)
        if adapter != "support":
            right = [pair.term.sense(adapter) in answer for pair, answer in zip(asked, given, strict=True)]
            found.sense[adapter] = sum(right) / len(right)
    return found
