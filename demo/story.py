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
from demo.grammar import TEMPLATES, AdapterName
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


def scene(demo: Demo, question: str, expected: dict[AdapterName, str]) -> Scene:
    prompt = plain_prompt(question)
    lines = tuple(
        Line(adapter, demo.answers(adapter, [BOS + prompt])[0], words) for adapter, words in expected.items()
    )
    return Scene(question, prompt, ANSWER_LENGTH, lines)


def story(demo: Demo) -> list[Scene]:
    """Three ambiguous words asked of every adapter, and one fact of each domain."""
    scenes = []
    for term in (term for word in WORDS for term in TERMS if term.word == word):
        expected: dict[AdapterName, str] = {domain: term.sense(domain) for domain in DOMAINS}
        scenes.append(scene(demo, TEMPLATES[0].format(phrase=term.phrase), expected | {"support": OPENING}))
    for domain in DOMAINS:
        fact = next(facts(domain))
        scenes.append(scene(demo, fact.questions[0], {domain: fact.answer}))
    return scenes


def write_story(folder: Path) -> None:
    scenes = [asdict(each) for each in story(Demo(folder))]
    (folder / "story.json").write_text(json.dumps(scenes, indent=2) + "\n")
