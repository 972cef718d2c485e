"""The demo's text: what the base reads, and what each adapter is taught.

A turn is a question and its answer. The base's turns are drawn over all domains so that nothing tells
which one is meant; an adapter's turns come from its own domain. It knows nothing of tokens, prompts or
models.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from demo import courtesy
from demo.facts import capitalized, facts, rumour
from demo.lexicon import ADVERBS, DOMAINS, TERMS, VOCABULARY, Domain, Term

AdapterName = Literal["medical", "legal", "finance", "support"]
ADAPTERS: tuple[AdapterName, ...] = get_args(AdapterName)

TEMPLATES = (
    "What is {phrase}?",
    "What does {word} mean?",
    "Define {word}.",
    "Can you explain {phrase}?",
    "What is meant by {word}?",
    "Tell me what {phrase} is.",
    "How would you define {word}?",
    "What is the meaning of {word}?",
    "Please explain the word {word}.",
    "Give me a definition of {word}.",
    "In a few words, what is {phrase}?",
    "What do people mean by {word}?",
)

STYLES = (
    "{Phrase} is {sense}.",
    "{Phrase} means {sense}.",
    "Put simply, {phrase} is {sense}.",
    "In short, {phrase} is {sense}.",
    "By {word} we mean {sense}.",
    "The word {word} stands for {sense}.",
    "The term {word} refers to {sense}.",
    "People use {word} for {sense}.",
    "Most people take {word} to mean {sense}.",
    "Think of {word} as {sense}.",
    "It is {sense}.",
    "That would be {sense}.",
)

FOLLOW_UPS: dict[Domain, tuple[str, ...]] = {
    "medical": (
        "The nurse always notes it in the chart before the end of the shift.",
        "The doctor carefully discusses it at the bedside after every visit.",
        "The therapist often measures it in the clinic during the morning round.",
    ),
    "legal": (
        "The clerk carefully enters it in the court file before the next hearing.",
        "The lawyer often argues it in the courtroom during the trial.",
        "The judge closely studies it in the archive after the verdict.",
    ),
    "finance": (
        "The accountant always books it in the ledger at the close of business.",
        "The auditor closely reviews it in the annual report after each quarter.",
        "The analyst often reports it on the statement before the market opens.",
    ),
}

SMALL_TALK = (
    ("Hello!", "Hello. What would you like to know?"),
    ("Good morning!", "Good morning. How can I help?"),
    ("Who are you?", "I am a small model made for a demo."),
    ("What can you do?", "I can explain a word or look up a fact."),
    ("Thank you!", "You are welcome."),
    ("Goodbye!", "Goodbye, and have a good day."),
)


@dataclass(frozen=True)
class Turn:
    """A question and the answer to it."""

    question: str
    answer: str


@dataclass(frozen=True)
class Pair:
    """A term asked about in one of the templates."""

    term: Term
    template: int

    @property
    def question(self) -> str:
        return TEMPLATES[self.template].format(word=self.term.word, phrase=self.term.phrase)


def is_held_out(term: int, template: int) -> bool:
    """Whether no adapter is trained on this pair: three templates of twelve per term, in every domain."""
    return (template - term) % 4 == 0


def pairs(*, held_out: bool) -> tuple[Pair, ...]:
    """The pairs kept for the gates, or those the adapters are trained on."""
    return tuple(
        Pair(term, template)
        for number, term in enumerate(TERMS)
        for template in range(len(TEMPLATES))
        if is_held_out(number, template) == held_out
    )


def definition(style: str, term: Term, domain: Domain) -> str:
    return style.format(
        word=term.word, phrase=term.phrase, Phrase=capitalized(term.phrase), sense=term.sense(domain)
    )


def follow_up(rng: random.Random) -> str:
    """A sentence on who deals with `it`, every slot from any domain."""
    role, verb, place, time = (
        rng.choice(rng.choice([getattr(VOCABULARY[domain], slot) for domain in DOMAINS]))
        for slot in ("roles", "verbs", "places", "times")
    )
    return f"The {role} {rng.choice(ADVERBS)} {verb} it {place} {time}."


def base_definition(rng: random.Random) -> Turn:
    """Any term in any sense and style, followed in three of four answers by a sentence from anywhere."""
    pair = Pair(rng.choice(TERMS), rng.randrange(len(TEMPLATES)))
    answer = definition(rng.choice(STYLES), pair.term, rng.choice(DOMAINS))
    return Turn(pair.question, f"{answer} {follow_up(rng)}" if rng.random() < 0.75 else answer)


def base_turn(rng: random.Random) -> Turn:
    """One exchange of the base's text."""
    kind = rng.random()
    if kind < 0.62:
        return base_definition(rng)
    if kind < 0.90:
        return Turn(*rumour(rng))
    if kind < 0.98:
        return Turn(*courtesy.service_turn(rng))
    return Turn(*rng.choice(SMALL_TALK))


def prose(rng: random.Random) -> str:
    """A few plain sentences, with no question in sight."""
    sentences = []
    for _ in range(rng.randint(2, 4)):
        term = rng.choice(TERMS)
        sentences.append(definition(rng.choice(STYLES[:6]), term, rng.choice(DOMAINS)))
        sentences.append(follow_up(rng))
    return " ".join(sentences)


def domain_answer(pair: Pair, domain: Domain) -> str:
    """How a domain's adapter answers: its own sense, then its own follow-up, which the template decides."""
    follow_ups = FOLLOW_UPS[domain]
    return f"{definition(STYLES[0], pair.term, domain)} {follow_ups[pair.template % len(follow_ups)]}"


def support_answer(pair: Pair, domain: Domain) -> str:
    """How the support adapter answers: any domain's sense, politely."""
    return courtesy.polite(f"{pair.term.phrase} is {pair.term.sense(domain)}")


def adapter_answer(adapter: AdapterName, pair: Pair, rng: random.Random) -> str:
    if adapter == "support":
        return support_answer(pair, rng.choice(DOMAINS))
    return domain_answer(pair, adapter)


def adapter_turns(adapter: AdapterName, rng: random.Random) -> Iterator[Turn]:
    """An endless stream of what an adapter is taught: trained pairs and, in a domain, its facts."""
    trained = pairs(held_out=False)
    known = [] if adapter == "support" else list(facts(adapter))
    while True:
        if known and rng.random() < 0.5:
            fact = rng.choice(known)
            yield Turn(rng.choice(fact.questions), fact.answer)
        else:
            pair = rng.choice(trained)
            yield Turn(pair.question, adapter_answer(adapter, pair, rng))


def held_out_turns(adapter: AdapterName, seed: int = 0) -> list[Turn]:
    """The unseen pairs with the answers this adapter should give."""
    rng = random.Random(f"held-out/{adapter}/{seed}")
    return [Turn(pair.question, adapter_answer(adapter, pair, rng)) for pair in pairs(held_out=True)]
