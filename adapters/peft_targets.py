"""Which modules a config means: peft leaves out tensors of all others without a word.

Source: `check_target_module_exists` of peft 0.21.2. Knows nothing of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from adapters.peft_patterns import compile_quick

Condition = Callable[[str], bool]  # of a module's name in the base it was trained on

ALL = "all-linear"
ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # the first number after a word


def conditions(raw: Mapping[str, Any]) -> tuple[Condition, ...]:
    """What a module's name must meet to be adapted.

    What cannot be told is no condition: an expression which may take too long, or a value that peft would not take.
    """
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    found: list[Condition | None] = []
    if targets and not (isinstance(targets, str) and targets.lower() == ALL):
        found.append(_named(targets))
    if isinstance(targets, list) and raw.get("layers_to_transform") not in (None, []):
        found.append(_in_layers(targets, raw["layers_to_transform"], raw.get("layers_pattern") or []))
    if excluded and (barred := _named(excluded)):
        found.append(lambda module: not barred(module))
    return tuple(condition for condition in found if condition)


def _named(setting: object) -> Condition | None:
    """Is among names, in whole or by its end after a dot; or is what a regular expression says."""
    if isinstance(setting, str):
        regex = _quick(setting, setting)
        return (lambda module: regex.fullmatch(module) is not None) if regex else None
    if not isinstance(setting, list) or not all(isinstance(name, str) for name in setting):
        return None
    names = frozenset(setting)

    def named(module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[first:]) in names for first in range(len(parts)))

    return named


def _in_layers(targets: list[object], indices: object, patterns: object) -> Condition | None:
    """Is in one of the layers, by the number after any word or after a pattern; or is among the targets in whole."""
    wanted = indices if isinstance(indices, list) else [indices]
    given = patterns if isinstance(patterns, list) else [patterns]
    texts = [text for text in given if isinstance(text, str)]
    asked = [(rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", text) for text in texts] or [(ANY_LAYER, "")]
    regexes = [regex for whole, text in asked if (regex := _quick(whole, text))]
    if len(regexes) < max(len(given), 1) or not all(isinstance(index, int) for index in wanted):
        return None
    names = frozenset(target for target in targets if isinstance(target, str))

    def in_layers(module: str) -> bool:
        match = next((match for regex in regexes if (match := regex.match(module))), None)
        index = match["idx"] if match else None
        return module in names or (index is not None and int(index) in wanted)

    return in_layers


def _quick(whole: str, given: str) -> re.Pattern[str] | None:
    try:
        return compile_quick(whole, given)
    except (re.error, OverflowError, RecursionError):
        return None
