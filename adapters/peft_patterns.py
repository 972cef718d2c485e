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
REPEATS = 16  # more repeats than these are past every bound already
NAME_LENGTH = 64  # assumed of a module's name when a pattern's steps are estimated


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
) -> tuple[Pattern, ...]:
    """The table `key` of a config; an entry whose value is not `valid`, or else wrong, is a finding."""
    table = raw.get(key) or {}
    if not isinstance(table, dict):
        findings.invalid(key, Finding(f"{file}: {key}", f"is {short(table)}, not a JSON object"))
        return ()
    found: list[Pattern] = []
    for text, value in table.items():
        where = f"{file}: {key}[{short(text)}]"
        if not valid(value):
            findings.invalid(key, Finding(where, f"is {short(value)}, not {wanted}"))
            continue
        if len(text) > 512 or _steps(text) > PATTERN_STEPS:
            findings.invalid(key, Finding(where, "takes too long to match", "write module names as keys"))
            continue
        try:
            regex = re.compile(rf"(.*\.)?({text})$")
        except (re.error, OverflowError, RecursionError) as error:
            findings.invalid(key, Finding(where, f"is not a regular expression: {short(str(error))}"))
            continue
        found.append(Pattern(regex, _tail(text), value))
    return tuple(found)


def _steps(text: str) -> float:
    """About how many steps a match may take at worst; without end for a repeated group."""
    text = text.replace("(?:", "(")
    if re.search(r"\)[*+{]", text):
        return math.inf
    repeats = sum(text.count(sign) for sign in "*+?{")
    groups = text.count("(") + 1
    return float(NAME_LENGTH) ** min(repeats, REPEATS) * (text.count("|") / groups + 1) ** groups


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
