"""Collects everything that is wrong with one adapter, so that its owner can mend it in one go.

Knows nothing of what is checked.
"""

from __future__ import annotations

import json
from collections import Counter

from adapters.errors import AdapterError, Finding

SHOWN = 5  # findings of one kind that are listed; the rest is counted


class Findings:
    """Findings in the order they were met, the first five of a kind."""

    def __init__(self) -> None:
        self._shown: list[Finding] = []
        self._counts: Counter[str] = Counter()
        self._unsupported = False

    def __bool__(self) -> bool:
        return bool(self._counts)

    def invalid(self, kind: str, finding: Finding) -> None:
        """Something is wrong. `kind` groups findings that differ in their place alone."""
        self._counts[kind] += 1
        if self._counts[kind] <= SHOWN:
            self._shown.append(finding)

    def unsupported(self, kind: str, finding: Finding) -> None:
        """Something that is sound, and not served here."""
        self._unsupported = True
        self.invalid(kind, finding)

    def include(self, error: AdapterError) -> None:
        """Take over what another check raised."""
        for finding in error.findings:
            self.invalid(finding.problem, finding)

    def all(self) -> tuple[Finding, ...]:
        """What was found; a kind with more than five ends with their number."""
        more = [
            Finding(f"{count - SHOWN} more", f"as above ({kind})")
            for kind, count in self._counts.items()
            if count > SHOWN
        ]
        return (*self._shown, *more)

    def raise_if_any(self, what: str) -> None:
        """Raise them as one error; an unsupported feature gives the code, since it explains the rest."""
        if not self:
            return
        if self._unsupported:
            raise AdapterError(
                "unsupported_adapter_feature", f"{what} uses a feature that is not served", self.all()
            )
        raise AdapterError("invalid_adapter", f"{what} cannot be served on this base", self.all())


def short(value: object) -> str:
    """A value from a file, as JSON that is fit for a message."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
