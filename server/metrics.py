"""Every counter and histogram, in one registry per app, and their text for Prometheus.

The edge feeds it request by request; the engine's and the adapters' levels are read when somebody asks
(`server/engine_metrics.py`). Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.engine_metrics import EngineCollector
from server.serving import Serving
from server.version import VERSION

Outcome = Literal["completed", "cancelled", "rejected", "failed"]
UploadResult = Literal["stored", "unchanged", "refused"]

MAX_ADAPTER_LABELS = 200
BASE, OTHER = "(base)", "(other)"  # labels that no adapter's name can equal

TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2, 4, 8, 15, 30, 60, 120, 300)
ITL_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600, 1800)


class TokenClock:
    """Times one sequence's tokens: the first against its start, each other against the one before."""

    def __init__(self, first: Histogram, between: Histogram) -> None:
        self._first = first
        self._between = between
        self._last = time.perf_counter()
        self._begun = False

    def tick(self) -> None:
        """A token has come."""
        now = time.perf_counter()
        (self._between if self._begun else self._first).observe(now - self._last)
        self._last, self._begun = now, True


class Metrics:
    """What one app counts."""

    def __init__(self, serving: Serving, max_adapter_labels: int = MAX_ADAPTER_LABELS) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self._max_adapter_labels = max_adapter_labels
        self._adapter_labels: set[str] = set()
        registry.register(EngineCollector(serving))
        Gauge("loraplex_build_info", "The running version.", ["version"], registry=registry).labels(
            VERSION
        ).set(1)
        self._http = Counter(
            "loraplex_http_requests",
            "HTTP requests by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self._requests = Counter(
            "loraplex_adapter_requests",
            "Generation requests that reached the engine, by adapter and outcome.",
            ["adapter", "outcome"],
            registry=registry,
        )
        self._tokens = Counter(
            "loraplex_adapter_tokens",
            "Tokens by adapter; direction is prompt or completion.",
            ["adapter", "direction"],
            registry=registry,
        )
        self._uploads = Counter(
            "loraplex_upload",
            "Adapter uploads by result; reason is the error's code.",
            ["result", "reason"],
            registry=registry,
        )
        self._ttft = Histogram(
            "loraplex_time_to_first_token_seconds",
            "From submission to a sequence's first token.",
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self._itl = Histogram(
            "loraplex_inter_token_latency_seconds",
            "Between tokens of a sequence.",
            buckets=ITL_BUCKETS,
            registry=registry,
        )
        self._e2e = Histogram(
            "loraplex_request_seconds",
            "From submission to the end of a generation request that completed.",
            buckets=E2E_BUCKETS,
            registry=registry,
        )

    def render(self) -> bytes:
        """All metrics in text format 0.0.4."""
        return generate_latest(self._registry)

    def token_clock(self) -> TokenClock:
        """A clock for one sequence, started now."""
        return TokenClock(self._ttft, self._itl)

    def http_request(self, route: str, status: int) -> None:
        """An HTTP request has been answered; `route` is the template, not the path."""
        self._http.labels(route, str(status)).inc()

    def generation(
        self, adapter: str | None, outcome: Outcome, prompt: int, completion: int, seconds: float
    ) -> None:
        """A generation request has ended."""
        label = self._adapter_label(adapter)
        self._requests.labels(label, outcome).inc()
        if outcome != "rejected":
            self._tokens.labels(label, "prompt").inc(prompt)
            self._tokens.labels(label, "completion").inc(completion)
        if outcome == "completed":
            self._e2e.observe(seconds)

    def upload(self, result: UploadResult, reason: str) -> None:
        """An upload has ended."""
        self._uploads.labels(result, reason).inc()

    def _adapter_label(self, adapter: str | None) -> str:
        """The adapter's name, as long as not too many have been seen: names come from users."""
        if adapter is None:
            return BASE
        if adapter not in self._adapter_labels and len(self._adapter_labels) >= self._max_adapter_labels:
            return OTHER
        self._adapter_labels.add(adapter)
        return adapter
