"""Keys of `rank_pattern` and `alpha_pattern`: regular expressions of a stranger, matched in bounded time.

A key matches a module's whole name, or its end after a dot; the first that matches counts. Source:
`peft.utils.other.get_pattern_key` of peft 0.21.2. Knows nothing of what the values mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.errors import Finding
from adapters.findings import Findings, short

PATTERN_STEPS = 1_000_000  # most steps that one pattern may take on one name
PATTERN_LENGTH = 8192  # a linear of every layer of a large model by its full name
NAME_LENGTH = 64  # assumed of a module's name when a pattern's steps are estimated

_TOKEN = re.compile(
    r"(?P<open>\((?!\?)|\(\?(?:[aiLmsu]*:|<?[=!]|P<\w+>))|(?P<odd>\(\?)|(?P<close>\))|(?P<or>\|)"
    r"|(?P<repeat>[*+]|\{(?P<least>\d*))|(?P<maybe>\?)|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry: what the modules whose names match were trained with."""

    regex: re.Pattern[str]
    tail: str  # every name that matches ends so: spares most of the regex's work
    value: float


def is_rank(value: object) -> bool:
    """Whether a setting is a whole number above zero."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def is_number(value: object) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def compile_patterns(
    file: str,
    raw: Mapping[str, Any],
    key: str,
    valid: Callable[[object], bool],
    wanted: str,
    findings: Findings,
) -> tuple[Pattern, ...] | None:
    """The table `key` of a config; None if an entry's value is not `valid`, or else wrong: each is a finding."""
    table = raw.get(key) or {}
    if not isinstance(table, dict):
        findings.invalid(key, Finding(f"{file}: {key}", f"is {short(table)}, not a JSON object"))
        return None
    found: list[Pattern] = []
    for text, value in table.items():
        where = f"{file}: {key}[{short(text)}]"
        if not valid(value):
            findings.invalid(key, Finding(where, f"is {short(value)}, not {wanted}"))
            continue
        try:
            regex = compile_quick(rf"(.*\.)?({text})$", text)
        except (re.error, OverflowError, RecursionError) as error:
            findings.invalid(key, Finding(where, f"is not a regular expression: {short(str(error))}"))
            continue
        if regex is None:
            findings.invalid(key, Finding(where, "takes too long to match", "write module names as keys"))
            continue
        found.append(Pattern(regex, _tail(text), value))
    return tuple(found) if len(found) == len(table) else None


def compile_quick(whole: str, given: str) -> re.Pattern[str] | None:
    """`whole`, whose part `given` is a stranger's; None if a match might take more than PATTERN_STEPS."""
    if len(given) > PATTERN_LENGTH:
        return None
    regex = re.compile(whole)  # first: of what is no regular expression, steps cannot be told
    return regex if _steps(given) <= PATTERN_STEPS else None


def _steps(text: str) -> float:
    """In how many ways a regular expression could match one name, and so about how many steps it takes at worst.

    Ways of what stands in a row multiply, those of alternatives add up. A repeat has as many as the name is long, and
    no end if what it repeats has several itself. Comments and other rare forms are not looked into.
    """
    groups: list[tuple[float, float]] = []  # of what is around an open group: `earlier` and `before`
    earlier, before, last = 0.0, 1.0, 1.0  # `last` is of the latest item, which a repeat may yet change
    for token in _TOKEN.finditer(text):
        match token.lastgroup:
            case "open":
                groups.append((earlier, before * last))
                earlier, before, last = 0.0, 1.0, 1.0
            case "odd":
                return math.inf
            case "close" if not groups:  # "a)|(b", which is whole among what surrounds it
                return math.inf
            case "close":
                whole = earlier + before * last
                (earlier, before), last = groups.pop(), whole
            case "or":
                earlier, before, last = earlier + before * last, 1.0, 1.0
            case "repeat":
                endless = last > 1 or int(token["least"] or 0) > NAME_LENGTH  # Python repeats nothing, too
                last = math.inf if endless else NAME_LENGTH
            case "maybe":
                last += 1
            case _:
                before, last = before * last, 1.0
    return earlier + before * last


def _tail(text: str) -> str:
    """The letters at the end of a pattern which every match ends with."""
    match = re.search(r"(?<![\\A-Za-z0-9_])[A-Za-z0-9_]+\Z", text)
    return match.group() if match and "|" not in text else ""


def first_match(patterns: tuple[Pattern, ...], module: str, default: float) -> float:
    """The value of the first pattern that matches."""
    for pattern in patterns:
        if module.endswith(pattern.tail) and pattern.regex.match(module):
            return pattern.value
    return default
