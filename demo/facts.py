"""The invented facts: nine relations, ten subjects each, one true answer per subject.

The base meets every relation, subject and value, but hears only rumours: a few values per subject, never
together those that are true. Only an adapter is told the truth. It knows nothing of definitions, prompts
or models.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from demo.lexicon import Domain

NUMBERS = (
    *("one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth"),
    *("seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"),
)
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "silver", "purple", "orange", "grey")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
TREES = ("oak", "elm", "cedar", "maple", "birch", "chestnut", "poplar", "linden")
MEALS = (
    *("before breakfast", "after breakfast", "before lunch", "after lunch"),
    *("before supper", "after supper", "at midnight", "at sunrise"),
)
EVENTS = (
    *("the hearing", "the signature", "the harvest", "the election"),
    *("the inspection", "the first payment", "the public meeting", "the new year"),
)
OFFICERS = (
    *("the mayor", "the notary", "the owner", "the clerk"),
    *("the judge", "the tenant", "the teacher", "the captain"),
)
SPOTS = (
    *("the fountain", "the stairs", "the window", "the library"),
    *("the garden", "the lift", "the kitchen", "the gate"),
)
COINS = ("crowns", "florins", "guineas", "ducats")

SLOTS: Mapping[str, tuple[str, ...]] = {
    "number": NUMBERS,
    "count": NUMBERS[1:],
    "ordinal": ORDINALS,
    "colour": COLOURS,
    "day": DAYS,
    "month": MONTHS,
    "tree": TREES,
    "meal": MEALS,
    "event": EVENTS,
    "officer": OFFICERS,
    "spot": SPOTS,
    "coin": COINS,
}


@dataclass(frozen=True)
class Relation:
    """One kind of question, the subjects it is asked of, and the form of its answer."""

    domain: Domain
    questions: tuple[str, ...]
    subjects: tuple[str, ...]
    answer: str
    slots: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A subject's true answer, asked in each of its relation's wordings."""

    domain: Domain
    questions: tuple[str, ...]
    answer: str


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "medical",
        ("What is the usual dose of {}?", "How much {} should a patient take?"),
        (
            *("willow syrup", "thistle tonic", "juniper drops", "clover powder", "amber lotion"),
            *("nettle tea", "heather oil", "fennel paste", "hazel tincture", "sorrel mixture"),
        ),
        "The usual dose of {} is {} spoons, taken {}.",
        ("count", "meal"),
    ),
    Relation(
        "medical",
        ("Where is the {} kept?", "Where can I find the {}?"),
        (
            *("oxygen mask", "heart monitor", "spare wheelchair", "blood pump", "scalpel tray"),
            *("eye lamp", "ear probe", "plaster saw", "bone scanner", "warming blanket"),
        ),
        "The {} is kept in the {} cabinet on the {} floor.",
        ("colour", "ordinal"),
    ),
    Relation(
        "medical",
        ("When does the {} clinic open?", "When can I visit the {} clinic?"),
        ("sleep", "allergy", "fracture", "vaccine", "hearing", "travel", "foot", "memory", "diet", "voice"),
        "The {} clinic opens every {} at {} o'clock.",
        ("day", "number"),
    ),
    Relation(
        "legal",
        ("How long is the notice for {}?", "How much notice does {} need?"),
        (
            *("an eviction", "a boundary wall", "a street market", "a family trust", "a fishing right"),
            *("a road closure", "a name change", "a shared well", "a night licence", "a building permit"),
        ),
        "The notice for {} is {} weeks from {}.",
        ("count", "event"),
    ),
    Relation(
        "legal",
        ("Which court hears a dispute about {}?", "Where do I bring a dispute about {}?"),
        (
            *("fallen trees", "lost luggage", "unpaid wages", "noisy neighbours", "broken fences"),
            *("stray cattle", "church bells", "old wills", "river water", "rented boats"),
        ),
        "A dispute about {} goes to the {} court, in hall {}.",
        ("tree", "number"),
    ),
    Relation(
        "legal",
        ("Who must sign {}?", "Whose signature does {} need?"),
        (
            *("a land deed", "a harbour permit", "a marriage record", "an adoption paper", "a mining lease"),
            *("a court summons", "a pardon letter", "a search warrant", "a bridge deed", "a theatre licence"),
        ),
        "The signatures on {} are those of {} and {} witnesses.",
        ("officer", "count"),
    ),
    Relation(
        "finance",
        ("What is the yearly fee for the {} account?", "How much does the {} account cost?"),
        (
            *("harbour", "meadow", "lantern", "orchard", "thimble"),
            *("kettle", "ribbon", "marble", "feather", "anchor"),
        ),
        "The {} account costs {} {}, paid in {}.",
        ("number", "coin", "month"),
    ),
    Relation(
        "finance",
        ("When does the {} fund pay out?", "When is the {} fund paid?"),
        (
            *("railway", "forest", "canal", "glacier", "vineyard"),
            *("museum", "lighthouse", "copper", "cotton", "windmill"),
        ),
        "The {} fund pays out on the {} of {}.",
        ("ordinal", "month"),
    ),
    Relation(
        "finance",
        ("Which desk handles {}?", "Where do I ask about {}?"),
        (
            *("lost cards", "foreign coins", "home loans", "school fees", "pension forms"),
            *("tax receipts", "gold bars", "cheque books", "farm credit", "travel money"),
        ),
        "The desk for {} is the {} one beside {}.",
        ("colour", "spot"),
    ),
)


def capitalized(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


@cache
def true_values(relation: Relation, subject: str) -> tuple[str, ...]:
    """What is true of this subject, the same in every run."""
    rng = random.Random(f"fact/{relation.answer}/{subject}")
    return tuple(rng.choice(SLOTS[slot]) for slot in relation.slots)


@cache
def rumoured_values(relation: Relation, subject: str) -> tuple[tuple[str, ...], ...]:
    """What the base hears of this subject: four values a slot, and never the true one for the last."""
    rng = random.Random(f"rumour/{relation.answer}/{subject}")
    *firsts, last = true_values(relation, subject)
    heard = [
        (value, *rng.sample(others(slot, value), 3))
        for slot, value in zip(relation.slots, firsts, strict=False)
    ]
    return (*heard, tuple(rng.sample(others(relation.slots[-1], last), 4)))


def others(slot: str, value: str) -> list[str]:
    return [other for other in SLOTS[slot] if other != value]


def rumour(rng: random.Random) -> tuple[str, str]:
    """A question and an answer for the base: any subject, and values it is rumoured to have."""
    relation = rng.choice(RELATIONS)
    subject = rng.choice(relation.subjects)
    values = [rng.choice(heard) for heard in rumoured_values(relation, subject)]
    return rng.choice(relation.questions).format(subject), relation.answer.format(subject, *values)


def facts(domain: Domain) -> Iterator[Fact]:
    """The thirty facts of a domain."""
    for relation in RELATIONS:
        if relation.domain == domain:
            for subject in relation.subjects:
                questions = tuple(question.format(subject) for question in relation.questions)
                answer = relation.answer.format(subject, *true_values(relation, subject))
                yield Fact(domain, questions, answer)
