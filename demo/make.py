"""Makes everything the demo ships: the base, its tokenizer, the four adapters, and the README's table.

    python -m demo.make                          # all of it, with seed 0
    python -m demo.make --steps 20 --out /tmp/x  # a short end-to-end run that leaves the shipped files alone

It knows the order of the work and the recipes; text, training and gates have modules of their own.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from demo.documents import Document, DocumentMaker, batches
from demo.evaluate import Measures, measure
from demo.grammar import AdapterName, adapter_turns, base_turn, prose
from demo.report import write_table
from demo.story import write_story
from demo.tokenizer import train_tokenizer
from demo.train import (
    ATTENTION,
    LINEAR,
    Recipe,
    fit,
    load_quantized,
    new_adapter,
    new_base,
    save_adapter,
    save_base,
    seed_everything,
)

SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter's size and its training."""

    rank: int
    targets: tuple[str, ...]
    recipe: Recipe


BASE_RECIPE = Recipe(steps=950, tokens=1152, rate=2e-3, decay=0.05)
PLANS: dict[AdapterName, AdapterPlan] = {
    "medical": AdapterPlan(4, ("q_proj", "v_proj"), Recipe(steps=600, tokens=512, rate=1e-2)),
    "legal": AdapterPlan(8, ATTENTION, Recipe(steps=450, tokens=512, rate=6e-3)),
    "finance": AdapterPlan(16, LINEAR, Recipe(steps=350, tokens=512, rate=3e-3)),
    "support": AdapterPlan(16, LINEAR, Recipe(steps=220, tokens=512, rate=2e-3)),
}


def base_documents(maker: DocumentMaker) -> Iterator[Document]:
    """What the base reads: single questions, chats of a few turns, and some prose."""
    rng = maker.rng
    while True:
        kind = rng.random()
        if kind < 0.06:
            yield maker.prose(prose(rng))
        elif kind < 0.14:
            yield maker.answers([base_turn(rng) for _ in range(rng.randint(2, 5))])
        else:
            yield maker.answers([base_turn(rng)])


def adapter_documents(maker: DocumentMaker, adapter: AdapterName) -> Iterator[Document]:
    """What an adapter is taught: mostly single questions, some chats of two or three turns."""
    turns = adapter_turns(adapter, maker.rng)
    while True:
        count = maker.rng.randint(2, 3) if maker.rng.random() < 0.08 else 1
        yield maker.answers([next(turns) for _ in range(count)])


def tokenizer_texts(seed: int, count: int = 20_000) -> Iterator[str]:
    """The base's text as plain strings, for fitting the tokenizer."""
    rng = random.Random(f"tokenizer/{seed}")
    for _ in range(count):
        turn = base_turn(rng)
        yield f"Q: {turn.question}\nA: {turn.answer}"
        yield turn.question.lower()
        yield turn.answer


def make_base(out: Path, recipe: Recipe, seed: int) -> None:
    seed_everything(seed)
    tokenizer = train_tokenizer(tokenizer_texts(seed))
    model = new_base(tokenizer)
    maker = DocumentMaker(tokenizer, random.Random(f"base/{seed}"))
    train(model, base_documents(maker), maker, recipe, "base")
    save_base(model, tokenizer, out / "base")


def make_adapter(out: Path, adapter: AdapterName, plan: AdapterPlan, seed: int) -> None:
    seed_everything(seed)
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(out / "base")
    model = new_adapter(load_quantized(out / "base"), plan.rank, plan.targets)
    maker = DocumentMaker(tokenizer, random.Random(f"{adapter}/{seed}"))
    train(model, adapter_documents(maker, adapter), maker, plan.recipe, adapter)
    save_adapter(model, out / "adapters" / adapter)


def train(
    model: nn.Module, documents: Iterator[Document], maker: DocumentMaker, recipe: Recipe, label: str
) -> None:
    pad = maker.tokenizer.pad_token_id
    made = batches(documents, tokens=recipe.tokens, steps=recipe.steps, pad=pad, rng=maker.rng)
    fit(model, made, recipe, label)


def readme_note(seconds: float, seed: int) -> str:
    return f"Made with seed {seed} in {seconds / 60:.0f} minutes on {torch.get_num_threads()} CPU threads."


def shortened(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe, or a run of a few small steps that shows the machinery works."""
    return recipe if steps is None else replace(recipe, steps=steps, tokens=128)


def make(out: Path, *, seed: int, steps: int | None = None) -> Measures:
    """Runs every stage into a folder, from the text to the README's table."""
    begin = time.monotonic()
    make_base(out, shortened(BASE_RECIPE, steps), seed)
    for adapter, plan in PLANS.items():
        make_adapter(out, adapter, replace(plan, recipe=shortened(plan.recipe, steps)), seed)
    seconds = time.monotonic() - begin
    write_story(out)
    measures = measure(out, limit=None if steps is None else 2)
    write_table(out / "README.md", measures, readme_note(seconds, seed))
    return measures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.make", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder to write to (default: demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="train each model for so few, small steps; needs --out")
    options = parser.parse_args()
    if options.steps is not None and options.out == SHIPPED:
        parser.error("--steps would overwrite the shipped weights: name another folder with --out")
    missed = make(options.out, seed=options.seed, steps=options.steps).failures()
    if options.steps is None and missed:
        sys.exit("\n".join(["gates missed:", *missed]))


if __name__ == "__main__":
    main()
