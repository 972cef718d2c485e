"""Every counter and histogram, in one registry per app, and their text for Prometheus.

The edge feeds it request by request; the engine's and the adapters' levels are read when somebody asks
(`server/engine_metrics.py`). Knows nothing of HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.engine_metrics import EngineCollector
from server.serving import Serving
from server.version import VERSION

Outcome = Literal["completed", "cancelled", "rejected", "failed"]
UploadResult = Literal["stored", "unchanged", "refused"]
Ending = Literal["stop", "length", "abort", "error"]
ENDINGS: tuple[Ending, ...] = ("stop", "length", "abort", "error")

MAX_ADAPTER_LABELS = 200
LOOK_SECONDS = 1.0  # between two looks for labels of removed adapters, when all are taken
BASE, OTHER = "(base)", "(other)"  # labels that no adapter's name can equal

# Both ends are in use: a 5 M parameter base on a CPU, and a long queue before a GPU.
TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2, 4, 8, 15, 30, 60, 120, 300)
ITL_BUCKETS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600, 1800)
PHASE_BUCKETS = (0.001, 0.005, 0.02, *E2E_BUCKETS)
TOKEN_BUCKETS = tuple(2.0**power for power in range(18))
ADAPTER_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)  # few: once per adapter


class Interop:
    """The vllm:* histograms and counters of one base, with their labels looked up once."""

    def __init__(self, registry: CollectorRegistry, base: str) -> None:
        labels = {"model_name": base, "engine": "0"}

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"vllm:{name}", text, [*labels], buckets=buckets, registry=registry).labels(
                **labels
            )

        self.first_token = histogram(
            "time_to_first_token_seconds", "From submission to a sequence's first token.", TTFT_BUCKETS
        )
        self.between = histogram("inter_token_latency_seconds", "Between tokens of a sequence.", ITL_BUCKETS)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "A sequence's mean time between its tokens.", ITL_BUCKETS
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From submission to a sequence's end.", E2E_BUCKETS
        )
        self.queue = histogram(
            "request_queue_time_seconds", "From arrival in the engine to the first step.", PHASE_BUCKETS
        )
        self.prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", PHASE_BUCKETS
        )
        self.decode = histogram(
            "request_decode_time_seconds", "From the first token to the last.", PHASE_BUCKETS
        )
        self.prompt = histogram("request_prompt_tokens", "A sequence's prompt tokens.", TOKEN_BUCKETS)
        self.generated = histogram(
            "request_generation_tokens", "A sequence's generated tokens.", TOKEN_BUCKETS
        )
        ended = Counter(
            "vllm:request_success",
            "Sequences by how they ended.",
            [*labels, "finished_reason"],
            registry=registry,
        )
        self.ended = {reason: ended.labels(**labels, finished_reason=reason) for reason in ENDINGS}
        self.rejected = Counter(
            "vllm:admission_rejections", "Requests refused.", [*labels, "reason"], registry=registry
        ).labels(**labels, reason="queue_full")


class TokenClock:
    """Times one sequence: its first token against its start, each other against the one before, and its end."""

    def __init__(self, to: Interop, adapter_first: Histogram, prompt: int) -> None:
        self._to = to
        self._adapter_first = adapter_first
        self._prompt = prompt
        self._began = self._first = self._last = time.perf_counter()
        self._count = 0

    def tick(self, queued: float) -> None:
        """A token has come, of a sequence that waited so many seconds for its first step."""
        now = time.perf_counter()
        if self._count:
            self._to.between.observe(now - self._last)
        else:
            self._first = now
            self._to.first_token.observe(now - self._began)
            self._adapter_first.observe(now - self._began)
            self._to.queue.observe(queued)
            self._to.prefill.observe(max(0.0, now - self._began - queued))
        self._last = now
        self._count += 1

    def end(self, ending: Ending) -> None:
        """The sequence has ended, or will not be read any further."""
        self._to.ended[ending].inc()
        self._to.prompt.observe(self._prompt)
        self._to.generated.observe(self._count)
        if ending in ("stop", "length"):
            self._to.whole.observe(time.perf_counter() - self._began)
        if self._count:
            self._to.decode.observe(self._last - self._first)
        if self._count > 1:
            self._to.per_token.observe((self._last - self._first) / (self._count - 1))


class Metrics:
    """What one app counts."""

    def __init__(self, serving: Serving, max_adapter_labels: int = MAX_ADAPTER_LABELS) -> None:
        self._serving = serving
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self._max_adapter_labels = max_adapter_labels
        self._adapter_labels: set[str] = set()
        self._look_again = 0.0  # for removed ones, by the monotonic clock
        self._making = threading.Lock()
        self._made: Interop | None = None
        registry.register(EngineCollector(serving))
        Gauge("loraplex_build_info", "The running version.", ["version"], registry=registry).labels(
            VERSION
        ).set(1)

        def counter(name: str, text: str, labels: Sequence[str]) -> Counter:
            return Counter(f"loraplex_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"loraplex_{name}", text, ["adapter"], buckets=buckets, registry=registry)

        self._http = counter("http_requests", "HTTP requests by route and status.", ["route", "status"])
        self._requests = counter(
            "adapter_requests",
            "Generation requests that reached the engine, by adapter and outcome.",
            ["adapter", "outcome"],
        )
        self._tokens = counter(
            "adapter_tokens",
            "Tokens by adapter; direction is prompt or completion.",
            ["adapter", "direction"],
        )
        self._uploads = counter(
            "upload", "Adapter uploads by result; reason is the error's code.", ["result", "reason"]
        )
        self._first_token = histogram(
            "adapter_time_to_first_token_seconds",
            "From submission to a sequence's first token, by adapter.",
            ADAPTER_BUCKETS,
        )
        self._e2e = histogram(
            "adapter_request_seconds",
            "From submission to the end of a generation request that completed, by adapter.",
            ADAPTER_BUCKETS,
        )

    def render(self) -> bytes:
        """All metrics in text format 0.0.4."""
        if self._serving.served is not None:
            self._interop()  # at zero from the start: a dashboard's rate() misses what begins at 1
        return generate_latest(_WithoutCreated(self._registry))

    def token_clock(self, adapter: str | None, prompt: int) -> TokenClock:
        """A clock for one sequence, started now; `prompt` is its number of tokens."""
        return TokenClock(self._interop(), self._first_token.labels(self._adapter_label(adapter)), prompt)

    def http_request(self, route: str, status: int) -> None:
        """An HTTP request has been answered; `route` is the template, not the path."""
        self._http.labels(route, str(status)).inc()

    def generation(
        self, adapter: str | None, outcome: Outcome, prompt: int, completion: int, seconds: float
    ) -> None:
        """A generation request has ended."""
        label = self._adapter_label(adapter)
        self._requests.labels(label, outcome).inc()
        if outcome == "rejected":
            self._interop().rejected.inc()
            return
        self._tokens.labels(label, "prompt").inc(prompt)
        self._tokens.labels(label, "completion").inc(completion)
        if outcome == "completed":
            self._e2e.labels(label).observe(seconds)

    def upload(self, result: UploadResult, reason: str) -> None:
        """An upload has ended."""
        self._uploads.labels(result, reason).inc()

    def _interop(self) -> Interop:
        """Made when the base has a name, by the first thread that asks."""
        with self._making:
            if self._made is None:
                served = self._serving.served
                self._made = Interop(self._registry, served.name if served else "")
            return self._made

    def _adapter_label(self, adapter: str | None) -> str:
        """The adapter's name, as long as there are not too many: names come from users."""
        if adapter is None:
            return BASE
        if adapter in self._adapter_labels:
            return adapter
        if len(self._adapter_labels) >= self._max_adapter_labels:
            self._make_room()
        if len(self._adapter_labels) >= self._max_adapter_labels:
            return OTHER
        self._adapter_labels.add(adapter)
        return adapter

    def _make_room(self) -> None:
        """End the series of adapters that have been removed; looked for once in a while."""
        served = self._serving.served
        if served is None or time.monotonic() < self._look_again:
            return
        self._look_again = time.monotonic() + LOOK_SECONDS
        for name in [name for name in self._adapter_labels if name not in served.registry]:
            for metric in (self._requests, self._tokens, self._first_token, self._e2e):
                metric.remove_by_labels({"adapter": name})
            self._adapter_labels.remove(name)


class _WithoutCreated(Collector):
    """Leaves out the `_created` times: a third of all series, which nobody reads in this format."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
