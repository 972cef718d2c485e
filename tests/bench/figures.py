"""Figures with their bounds, and the lines that say what was measured where. Knows nothing of how."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loadtests.load import commit, machine

RESULTS = Path(__file__).parents[2] / "loadtests" / "results"


Want = Literal["at least", "at most"]


@dataclass(frozen=True)
class Figure:
    """A value that must be at least, or at most, its bound; None where it could not be measured, and why."""

    name: str
    value: float | None
    bound: float
    want: Want
    why: str | None = None

    @property
    def status(self) -> Literal["ok", "short", "unmeasured"]:
        if self.value is None:
            return "unmeasured"
        ok = self.value >= self.bound if self.want == "at least" else self.value <= self.bound
        return "ok" if ok else "short"

    def __str__(self) -> str:
        if self.value is None:
            return f"figure {self.name} - {self.bound:.3g} unmeasured ({self.why})"
        return f"figure {self.name} {self.value:.3g} {self.bound:.3g} {self.status}"


class Results:
    """One run's lines, appended to a file of `loadtests/results` as they come: a run that is cut keeps what it saw."""

    def __init__(
        self,
        name: str,
        command: str,
        seed: int,
        where: str | None = None,
        copy: Path | None = None,  # a folder that gets every line as well
    ) -> None:
        self._files = [folder / f"{name}.jsonl" for folder in (RESULTS, copy) if folder is not None]
        self._run = {
            "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "machine": where or machine(),
            "command": command,
            "seed": seed,
        }

    def add(self, **measured: Any) -> None:
        """Keep one measurement."""
        for file in self._files:
            with file.open("a") as lines:
                lines.write(json.dumps({**self._run, **measured}) + "\n")

    def close(self, figures: list[Figure]) -> int:
        """Keep and print the figures, and how many are what; 1 when any is short."""
        for figure in figures:
            value = None if figure.value is None else round(figure.value, 4)
            self.add(name=figure.name, value=value, bound=figure.bound, status=figure.status, why=figure.why)
        counts = Counter(figure.status for figure in figures)
        sys.stdout.flush()
        print("\n".join(map(str, figures)))
        print(", ".join(f"{counts[status]} {status}" for status in ("ok", "short", "unmeasured")))
        return 1 if counts["short"] else 0
