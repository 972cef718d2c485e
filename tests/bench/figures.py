"""Figures with their bounds, and the lines that say what was measured where. Knows nothing of how."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loadtests.load import commit, machine

RESULTS = Path(__file__).parents[2] / "loadtests" / "results"


@dataclass(frozen=True)
class Figure:
    """A measured value that must be at least, or at most, its bound."""

    name: str
    value: float
    bound: float
    want: Literal["at least", "at most"]

    @property
    def ok(self) -> bool:
        return self.value >= self.bound if self.want == "at least" else self.value <= self.bound

    @property
    def status(self) -> Literal["ok", "short"]:
        return "ok" if self.ok else "short"

    def __str__(self) -> str:
        return f"figure {self.name} {self.value:.3g} {self.bound:.3g} {self.status}"


class Results:
    """One run's lines, appended to a file of `loadtests/results` as they come: a run that is cut keeps what it saw."""

    def __init__(self, name: str, command: str, seed: int) -> None:
        self._file = RESULTS / f"{name}.jsonl"
        self._run = {
            "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "machine": machine(),
            "command": command,
            "seed": seed,
        }

    def add(self, **measured: Any) -> None:
        """Keep one measurement."""
        with self._file.open("a") as lines:
            lines.write(json.dumps({**self._run, **measured}) + "\n")

    def close(self, figures: list[Figure]) -> int:
        """Keep and print the figures; 1 when any is short."""
        for figure in figures:
            self.add(name=figure.name, value=round(figure.value, 4), bound=figure.bound, status=figure.status)
        sys.stdout.flush()
        print("\n".join(map(str, figures)))
        return 0 if all(figure.ok for figure in figures) else 1
