"""The demo's story: a few prompts, what each adapter says to them, and the words that its answer must hold.

`demo/story.json` is written here, from the shipped weights, for `make demo` and the smoke test. It knows
nothing of HTTP.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.courtesy import OPENING
from demo.documents import plain_prompt
from demo.evaluate import ANSWER_LENGTH, Demo
from demo.facts import facts
from demo.grammar import ADAPTERS, TEMPLATES, AdapterName
from demo.lexicon import DOMAINS, TERMS
from demo.tokenizer import BOS

WORDS = ("discharge", "bond", "interest")


@dataclass(frozen=True)
class Line:
    """One adapter's answer; `must_contain` also holds where arithmetic differs a little."""

    adapter: AdapterName
    answer: str
    must_contain: str


@dataclass(frozen=True)
class Scene:
    """One question, ready as a prompt for `/v1/completions`, and the adapters that answer it."""

    question: str
    prompt: str
    max_tokens: int
    lines: tuple[Line, ...]


def plot() -> dict[str, dict[AdapterName, str]]:
    """Three ambiguous words asked of every adapter, and one fact of each domain: question, adapter, words."""
    asked: dict[str, dict[AdapterName, str]] = {}
    for term in (term for word in WORDS for term in TERMS if term.word == word):
        expected: dict[AdapterName, str] = {domain: term.sense(domain) for domain in DOMAINS}
        asked[TEMPLATES[0].format(phrase=term.phrase)] = expected | {"support": OPENING}
    for domain in DOMAINS:
        fact = next(facts(domain))
        asked[fact.questions[0]] = {domain: fact.answer}
    return asked


def story(demo: Demo) -> list[Scene]:
    """The plot with the answers that these weights give, all of an adapter's questions at once."""
    asked = plot()
    lines: dict[str, list[Line]] = {question: [] for question in asked}
    for adapter in ADAPTERS:
        questions = [question for question, expected in asked.items() if adapter in expected]
        answers = demo.answers(adapter, [BOS + plain_prompt(question) for question in questions])
        for question, answer in zip(questions, answers, strict=True):
            lines[question].append(Line(adapter, answer, asked[question][adapter]))
    return [
        Scene(question, plain_prompt(question), ANSWER_LENGTH, tuple(said))
        for question, said in lines.items()
    ]


def write_story(folder: Path) -> None:
    scenes = [asdict(each) for each in story(Demo(folder))]
    (folder / "story.json").write_text(json.dumps(scenes, indent=2) + "\n")
