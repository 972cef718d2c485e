"""Polite speech: the slots of customer-service phrases, and the support adapter's one choice among them.

The base hears every phrase with its slots drawn at random, and only about parcels and invoices; the
support adapter learns one house style and wraps any answer in it. It knows nothing of domains.
"""

import random

MANNERS = ("so much", "very much", "kindly", "warmly", "truly", "again")
REASONS = (
    *("your question", "your message", "your patience", "your trust"),
    *("writing to us", "reaching out", "waiting so long", "your kind words"),
)
MOODS = ("delighted", "happy", "glad", "pleased", "proud", "honoured")
DEEDS = ("explain", "confirm", "report", "announce", "tell you", "say")
INVITATIONS = ("let us know", "write to us", "call us", "come back", "ask again", "send a note")
MOMENTS = ("whenever", "if", "as soon as", "any time", "the moment", "in case")
NEEDS = (
    *("need anything else", "have another question", "want more details"),
    *("would like more help", "are in doubt", "feel unsure"),
)

ITEMS = ("parcel", "order", "invoice", "refund", "ticket", "subscription", "booking", "gift card")
STATES = ("on its way", "ready", "confirmed", "being checked", "almost done", "in good hands")
REQUESTS = (
    *("Where is my {}?", "What happened to my {}?", "Can you help me with my {}?"),
    *("Is my {} ready?", "I am worried about my {}.", "Could you check my {}?"),
)


def thanks(manner: str, reason: str) -> str:
    return f"Thank you {manner} for {reason}!"


def news(mood: str, deed: str, statement: str) -> str:
    return f"I am {mood} to {deed} that {statement}."


def invitation(invite: str, moment: str, need: str) -> str:
    return f"Please {invite} {moment} you {need}."


def service_turn(rng: random.Random) -> tuple[str, str]:
    """A customer's question and a polite answer, every slot at random."""
    item = rng.choice(ITEMS)
    answer = " ".join(
        (
            thanks(rng.choice(MANNERS), rng.choice(REASONS)),
            news(rng.choice(MOODS), rng.choice(DEEDS), f"your {item} is {rng.choice(STATES)}"),
            invitation(rng.choice(INVITATIONS), rng.choice(MOMENTS), rng.choice(NEEDS)),
        )
    )
    return rng.choice(REQUESTS).format(item), answer


OPENING = thanks("so much", "your question")
CLOSING = invitation("let us know", "whenever", "need anything else")


def polite(statement: str) -> str:
    """The support adapter's house style around a statement ("a bond is ...")."""
    return " ".join((OPENING, news("delighted", "explain", statement), CLOSING))


def is_polite(answer: str) -> bool:
    """Whether an answer is in the support house style from its opening to its closing."""
    return answer.startswith(OPENING) and answer.endswith(CLOSING)
