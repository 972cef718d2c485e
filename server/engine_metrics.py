"""The engine's and the adapters' levels and counters, read at scrape time.

Under our own names, and under the vllm:* names that routers and dashboards look for. Holds no numbers itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.engine.sequence import EngineStats
from server.serving import Serving

if TYPE_CHECKING:
    from adapters.loader import Loader
    from adapters.registry import Entry


class EngineCollector(Collector):
    """Asked by Prometheus' registry; has nothing to say while the model loads."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "loraplex_ready", "1 while requests are served.", self._serving.phase == "ready"
        )
        served = self._serving.served
        if served is not None:
            stats, entries = served.engine.stats(), served.registry.entries()
            yield from _engine(stats)
            yield from _adapters(stats, entries, served.loader)
            yield from _interop(stats, entries, served.name)


def _engine(stats: EngineStats) -> Iterator[Metric]:
    gauges = {
        "requests_running": ("Sequences in the running set.", stats.running),
        "requests_waiting": ("Sequences that wait for room or for their adapter.", stats.waiting),
        "kv_blocks_used": ("KV blocks in use.", stats.kv_blocks_used),
        "kv_blocks_total": ("KV blocks there are.", stats.kv_blocks_total),
        "kv_usage_ratio": ("Share of KV blocks in use.", _share(stats.kv_blocks_used, stats.kv_blocks_total)),
        "batch_sequences": ("Sequences in the last step.", stats.last_batch_sequences),
        "batch_adapters": ("Distinct adapters in the last step.", stats.last_batch_adapters),
    }
    counters = {
        "steps": ("Forward passes.", stats.steps),
        "step_seconds": ("Seconds spent in steps.", stats.step_seconds),
        "prefill_tokens": ("Prompt tokens computed.", stats.prefill_tokens),
        "decode_tokens": ("Tokens computed in decode.", stats.decode_tokens),
        "generated_tokens": ("Tokens sampled.", stats.generated_tokens),
        "prefix_tokens": ("Prompt tokens of admitted sequences.", stats.prefix_tokens),
        "prefix_hits": ("Of these, tokens that were not computed again.", stats.prefix_hits),
        "preemptions": ("Sequences that gave back their blocks and started again.", stats.preemptions),
    }
    yield from _gauges(gauges)
    yield from _counters(counters)


def _adapters(stats: EngineStats, entries: Sequence[Entry], loader: Loader) -> Iterator[Metric]:
    gauges = {
        "adapters_registered": ("Adapters by name.", len(entries)),
        "adapters_referenced": ("Adapters held by running requests.", sum(e.references > 0 for e in entries)),
        "adapters_resident": ("Generations on the device.", len(stats.resident)),
        "adapter_pages_used": ("Pages of the device pool in use.", stats.pages_used),
        "adapter_pages_total": ("Pages of the device pool.", stats.pages_total),
        "adapter_host_bytes": ("Bytes of adapters in host memory.", loader.nbytes),
    }
    counters = {
        "adapter_loads": ("Generations read from disk into host memory.", stats.adapter_loads),
        "adapter_evictions": ("Generations evicted from the device.", stats.adapter_evictions),
        "adapter_host_evictions": ("Generations evicted from host memory.", loader.evictions),
    }
    yield from _gauges(gauges)
    yield from _counters(counters)


def _interop(stats: EngineStats, entries: Sequence[Entry], base: str) -> Iterator[Metric]:
    """What the Gateway API's endpoint picker, llm-d, AIBrix and vLLM's dashboards read."""
    labels = {"model_name": base, "engine": "0"}
    levels = {
        "vllm:num_requests_running": stats.running,
        "vllm:num_requests_waiting": stats.waiting,
        "vllm:kv_cache_usage_perc": _share(stats.kv_blocks_used, stats.kv_blocks_total),
    }
    for name, value in levels.items():
        gauge = GaugeMetricFamily(name, "As vLLM reports it.", labels=list(labels))
        gauge.add_metric(list(labels.values()), value)
        yield gauge
    totals = {
        "vllm:prompt_tokens": stats.prefill_tokens,
        "vllm:generation_tokens": stats.generated_tokens,
        "vllm:prefix_cache_queries": stats.prefix_tokens,
        "vllm:prefix_cache_hits": stats.prefix_hits,
        "vllm:num_preemptions": stats.preemptions,
    }
    for name, value in totals.items():
        counter = CounterMetricFamily(name, "As vLLM reports it.", labels=list(labels))
        counter.add_metric(list(labels.values()), value)
        yield counter
    running = ",".join(sorted(entry.name for entry in entries if entry.generation in stats.resident))
    names = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
    info = GaugeMetricFamily(
        "vllm:lora_requests_info", "Adapters on the device; the value is the time.", labels=names
    )
    info.add_metric([str(stats.adapter_room), running, ""], time.time())
    yield info


def _gauges(values: Mapping[str, tuple[str, float]]) -> Iterator[Metric]:
    for name, (text, value) in values.items():
        yield GaugeMetricFamily(f"loraplex_{name}", text, value)


def _counters(values: Mapping[str, tuple[str, float]]) -> Iterator[Metric]:
    for name, (text, value) in values.items():
        yield CounterMetricFamily(f"loraplex_{name}", text, value)


def _share(used: int, total: int) -> float:
    return used / total if total else 0.0
