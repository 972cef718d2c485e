"""What products in 8-bit integers (`--cpu-math int8`) cost: perplexity and agreement on the demo, logits of a 1B shape.

    python -m tests.bench.int8_quality

Both arithmetics score the same texts through the engine's own forward pass, the base and each adapter. The portable
kernel makes the same integers as those with byte instructions (tests/kernels/test_packed.py), so any machine can do it.
Appends to `loadtests/results/int8.jsonl`; `make bench-report` puts the newest run into docs/performance.md.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from adapters.pages import plan_pages
from adapters.peft_format import read_adapter
from adapters.pool import Pool
from demo.documents import IGNORED, Document, plain_prompt
from demo.grammar import ADAPTERS, held_out_turns
from demo.tokenizer import BOS, END
from kernels.cpu.library import Library, load
from kernels.segments import Span, segments_of
from server.model.kernel_set import compiled
from server.model.kv_cache import KVCache
from server.model.load import ModelSource, load_model
from server.model.runner import Runner, StepInputs
from server.model.servable import make_servable
from tests.bench.figures import Results
from tests.bench.random_llama import Checkpoint, Shape, checkpoint

SEED = 0
DEMO = Path(__file__).parents[2] / "demo"
TURNS = 100  # held-out questions of each adapter, with the answers it should give
ROWS, BLOCK = 512, 16  # tokens of one forward pass, and of a block of its cache
ADAPTER_BYTES = 256 << 20


class Scorer:
    """A base in NF4 under one arithmetic, and its adapters."""

    def __init__(self, base: Path, quantized: Path, library: Library, adapters: Mapping[str, Path]) -> None:
        source = ModelSource(str(base), torch.device("cpu"), torch.float32, "nf4", quantized)
        servable = make_servable(load_model(source), kernels=compiled(library))
        layout = servable.layout
        self._pool = Pool(layout, plan_pages(layout, torch.float32, ADAPTER_BYTES), torch.float32, "cpu")
        servable.attach(self._pool.sites)
        for name, folder in adapters.items():
            assert self._pool.admit(read_adapter(folder, name, layout, torch.float32, max_rank=64))
        cache = KVCache.allocate(
            servable.attention, blocks=2 * ROWS, block_size=BLOCK, dtype=torch.float32, device=servable.device
        )
        self._runner = Runner(servable, cache)

    def logits(
        self, texts: Sequence[Document], adapter: str | None
    ) -> Tensor:  # [tokens of all texts, vocabulary]
        """Of every token of texts that are given at once, each read from its own beginning."""
        lengths = [len(text.ids) for text in texts]
        positions = np.concatenate([np.arange(length) for length in lengths])
        spans, kv_index, start, block = [], [], 0, 1
        for length in lengths:
            blocks = -(-length // BLOCK)
            spans.append(Span(start, start + length, length, tuple(range(block, block + blocks))))
            kv_index.append(block * BLOCK + np.arange(length))
            start, block = start + length, block + blocks
        table = {} if adapter is None else self._pool.pages(adapter)
        inputs = StepInputs(
            token_ids=np.concatenate([np.array(text.ids) for text in texts]),
            positions=positions,
            kv_index=np.concatenate(kv_index),
            logits_rows=np.arange(start),
            spans=tuple(spans),
            segments={group: segments_of([(start, ids, (1.0,) * len(ids))]) for group, ids in table.items()},
        )
        return self._runner.forward(inputs)


@dataclass
class Difference:
    """Sums over the tokens that are scored."""

    tokens: int = 0
    agree: int = 0  # tokens after which both find the same one likeliest
    surprise: tuple[float, float] = (0.0, 0.0)  # negative log likelihood of what comes next, of each
    square: float = 0.0  # of what the logits differ by
    square_exact: float = 0.0  # of the exact logits, less their mean

    def add(self, exact: Tensor, rounded: Tensor, then: Tensor) -> None:
        """Logits of both [tokens, vocabulary], and the token that comes next [tokens]."""
        self.tokens += len(then)
        self.agree += int((exact.argmax(1) == rounded.argmax(1)).sum())
        found = (float(F.cross_entropy(logits, then, reduction="sum")) for logits in (exact, rounded))
        self.surprise = (self.surprise[0] + next(found), self.surprise[1] + next(found))
        self.square += float((exact - rounded).square().sum())
        self.square_exact += float((exact - exact.mean(1, keepdim=True)).square().sum())

    def line(self) -> dict[str, float]:
        """What is kept of it."""
        return {
            "tokens": self.tokens,
            "perplexity_fp32": round(math.exp(self.surprise[0] / self.tokens), 4),
            "perplexity_int8": round(math.exp(self.surprise[1] / self.tokens), 4),
            "agreement": round(self.agree / self.tokens, 5),
            "logit_error": round(math.sqrt(self.square / self.square_exact), 5),
        }


def compare(exact: Scorer, rounded: Scorer, texts: Sequence[Document], adapter: str | None) -> Difference:
    """Both over the same texts, wherever a text has a label."""
    found = Difference()
    for some in batches(texts):
        labels = torch.tensor([label for text in some for label in [*text.labels[1:], IGNORED]])
        scored = labels != IGNORED
        logits = [scorer.logits(some, adapter)[scored] for scorer in (exact, rounded)]
        found.add(*logits, labels[scored])
    return found


def batches(texts: Sequence[Document]) -> Iterator[list[Document]]:
    """As many texts at a time as one forward pass takes."""
    batch: list[Document] = []
    for text in texts:
        if batch and sum(len(other.ids) for other in [*batch, text]) > ROWS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def held_out(folder: Path, turns: int) -> dict[str, list[Document]]:
    """Each adapter's unseen questions with the answers it should give, which are what is scored; all for the base."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def document(question: str, answer: str) -> Document:
        before = tokenizer.encode(BOS + plain_prompt(question), add_special_tokens=False)
        after = tokenizer.encode(f" {answer}{END}", add_special_tokens=False)
        return Document(before + after, [IGNORED] * len(before) + after)

    texts = {
        name: [document(turn.question, turn.answer) for turn in held_out_turns(name)[:turns]]
        for name in ADAPTERS
    }
    return {"base": [text for name in ADAPTERS for text in texts[name][: turns // len(ADAPTERS)]]} | texts


def demo(results: Results, libraries: tuple[Library, Library], turns: int = TURNS) -> None:
    """The demo's base on everyone's texts, each adapter on its own."""
    adapters = {name: DEMO / "adapters" / name for name in ADAPTERS}
    with tempfile.TemporaryDirectory(prefix="loraplex-int8-") as quantized:
        exact, rounded = (Scorer(DEMO / "base", Path(quantized), library, adapters) for library in libraries)
        for name, texts in held_out(DEMO / "base", turns).items():
            found = compare(exact, rounded, texts, None if name == "base" else name)
            results.add(name="demo", model=name, isa=libraries[1].instruction_set, **found.line())


def random_shape(
    results: Results, libraries: tuple[Library, Library], made: Checkpoint, tokens: int = 128
) -> None:
    """Random tokens through random weights, whose likeliest tokens are closer to one another than a trained model's."""
    adapters = {"adapter": made.adapters[0]}
    quantized = made.base.parent / "quantized"
    exact, rounded = (Scorer(made.base, quantized, library, adapters) for library in libraries)
    ids = torch.randint(
        3, made.shape.vocabulary, (tokens,), generator=torch.Generator().manual_seed(SEED)
    ).tolist()
    for name, adapter in (("base", None), ("adapter", "adapter")):
        found = compare(exact, rounded, [Document(ids, ids)], adapter)
        results.add(name="random", model=name, isa=libraries[1].instruction_set, **found.line())


def both_arithmetics() -> tuple[Library, Library]:
    """Of one instruction set: the processor's, or the portable one where it has no dot product of bytes."""
    exact = load()
    if exact is None:
        sys.exit("tests.bench.int8_quality needs the compiled kernels: install where there is a C compiler")
    try:
        rounded = load(math="int8")
    except ValueError:
        exact, rounded = load("portable"), load("portable", "int8")
    assert exact is not None
    assert rounded is not None
    return exact, rounded


def main() -> int:
    results, libraries = Results("int8", "python -m tests.bench.int8_quality", SEED), both_arithmetics()
    torch.set_num_threads(1)  # the demo's products are too short to be shared
    demo(results, libraries)
    torch.set_num_threads(os.cpu_count() or 1)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraplex" / "bench"
    random_shape(results, libraries, checkpoint(Shape(), cache))
    return 0


if __name__ == "__main__":
    sys.exit(main())
