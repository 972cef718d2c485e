"""The engine's and the adapters' levels and counters, read at scrape time.

Under our own names, and under the vllm:* names that routers and dashboards look for. Holds no numbers itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.engine.sequence import EngineStats
from server.serving import Served, Serving

if TYPE_CHECKING:
    from adapters.entry import Entry

Values = Mapping[str, tuple[str, float]]  # name to (what it is, value)


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
            yield from _adapters(stats, entries, served)
            yield from _interop(stats, served.name)
            yield _lora_info(stats, entries)


def _engine(stats: EngineStats) -> Iterator[Metric]:
    yield from _gauges(
        {
            "requests_running": ("Sequences in the running set.", stats.running),
            "requests_waiting": ("Sequences that wait for room or for their adapter.", stats.waiting),
            "kv_blocks_used": ("KV blocks in use.", stats.kv_blocks_used),
            "kv_blocks_total": ("KV blocks there are.", stats.kv_blocks_total),
            "kv_usage_ratio": ("Share of KV blocks in use.", _kv_share(stats)),
            "batch_sequences": ("Sequences in the last step.", stats.counts.last_sequences),
            "batch_adapters": ("Distinct adapters in the last step.", stats.counts.last_adapters),
        }
    )
    yield from _counters(
        {
            "steps": ("Forward passes.", stats.counts.steps),
            "prefill_steps": ("Forward passes with prompt tokens in them.", stats.counts.prefill_steps),
            "prefill_tokens": (
                "Prompt tokens computed, also again after a preemption.",
                stats.counts.prefill_tokens,
            ),
            "decode_tokens": (
                "Output tokens computed, also again after a preemption.",
                stats.counts.decode_tokens,
            ),
            "generated_tokens": ("Tokens sampled.", stats.counts.generated_tokens),
            "prefix_tokens": ("Prompt tokens of admitted sequences, each prompt once.", stats.prefix_tokens),
            "prefix_hits": ("Of these, tokens taken up from KV blocks that were there.", stats.prefix_hits),
            "preemptions": ("Sequences that gave back their blocks and started again.", stats.preemptions),
        }
    )
    seconds = CounterMetricFamily(
        "loraplex_step_seconds",
        "Seconds spent in steps; phase is prefill with prompt tokens in them, else decode.",
        labels=["phase"],
    )
    seconds.add_metric(["prefill"], stats.counts.prefill_seconds)
    seconds.add_metric(["decode"], stats.counts.seconds - stats.counts.prefill_seconds)
    yield seconds


def _adapters(stats: EngineStats, entries: Sequence[Entry], served: Served) -> Iterator[Metric]:
    loader = served.loader
    states = {
        "registered": len(entries),
        "incompatible": sum(entry.state == "incompatible" for entry in entries),
        "referenced": sum(entry.references > 0 for entry in entries),
        "host": loader.cached,
        "device": len(stats.resident),
        "waiting": len(stats.waiting_for),
    }
    adapters = GaugeMetricFamily(
        "loraplex_adapters",
        "Adapters by state: names that are registered, incompatible with the base or held by requests; "
        "generations in host memory, on the device, or waited for.",
        labels=["state"],
    )
    for state, count in states.items():
        adapters.add_metric([state], count)
    yield adapters
    yield from _gauges(
        {
            "adapter_pages_used": ("Pages of the device pool in use.", stats.pages_used),
            "adapter_pages_total": ("Pages of the device pool.", stats.pages_total),
            "adapter_host_bytes": ("Bytes of adapters in host memory.", loader.nbytes),
            "adapter_store_bytes": ("Bytes of generations on disk.", served.registry.stored_bytes),
        }
    )
    yield from _counters(
        {
            "adapter_cache_hits": (
                "Sequences that started with their adapter on the device already.",
                stats.adapter_hits,
            ),
            "adapter_cache_misses": (
                "Sequences whose adapter was copied there for them.",
                stats.adapter_misses,
            ),
        }
    )
    yield from _counters(
        {"upload_bytes": ("Bytes of the adapters that uploads stored.", served.registry.uploaded_bytes)}
    )
    yield from _loads(stats, served)


def _loads(stats: EngineStats, served: Served) -> Iterator[Metric]:
    """Moves between the tiers; `tier` is where a generation came to, or was evicted from."""
    loader = served.loader
    loads = CounterMetricFamily(
        "loraplex_adapter_loads",
        "Generations brought into a tier: read from disk to the host, or copied to the device.",
        labels=["tier", "result"],
    )
    loads.add_metric(["host", "ok"], loader.load_seconds.count)
    loads.add_metric(["host", "failed"], loader.failures)
    loads.add_metric(["device", "ok"], stats.adapter_copies.count)
    evictions = CounterMetricFamily(
        "loraplex_adapter_evictions", "Generations evicted from a tier to make room.", labels=["tier"]
    )
    evictions.add_metric(["host"], loader.evictions)
    evictions.add_metric(["device"], stats.adapter_evictions)
    seconds = HistogramMetricFamily(
        "loraplex_adapter_load_seconds", "Seconds that a load into a tier took.", labels=["tier"]
    )
    for tier, tally in {"host": loader.load_seconds, "device": stats.adapter_copies}.items():
        seconds.add_metric([tier], tally.cumulative(), tally.total)
    yield from (loads, evictions, seconds)


def _interop(stats: EngineStats, base: str) -> Iterator[Metric]:
    """What the Gateway API's endpoint picker, llm-d, AIBrix and vLLM's dashboards read."""
    labels = {"model_name": base, "engine": "0"}
    levels = {
        "vllm:num_requests_running": stats.running,
        "vllm:num_requests_waiting": stats.waiting,
        "vllm:kv_cache_usage_perc": _kv_share(stats),
    }
    for name, value in levels.items():
        gauge = GaugeMetricFamily(name, "As vLLM reports it.", labels=list(labels))
        gauge.add_metric(list(labels.values()), value)
        yield gauge
    totals = {
        "vllm:prompt_tokens": stats.prefix_tokens,
        "vllm:generation_tokens": stats.counts.generated_tokens,
        "vllm:prefix_cache_queries": stats.prefix_tokens,
        "vllm:prefix_cache_hits": stats.prefix_hits,
        "vllm:num_preemptions": stats.preemptions,
    }
    for name, value in totals.items():
        counter = CounterMetricFamily(name, "As vLLM reports it.", labels=list(labels))
        counter.add_metric(list(labels.values()), value)
        yield counter
    cache = GaugeMetricFamily(
        "vllm:cache_config_info", "The KV cache's shape; always 1.", labels=["block_size", "num_gpu_blocks"]
    )
    cache.add_metric([str(stats.kv_block_size), str(stats.kv_blocks_total)], 1)
    yield cache


def _lora_info(stats: EngineStats, entries: Sequence[Entry]) -> Metric:
    """One sample per scrape: routers send a request where its adapter is on the device, or on its way there."""

    def names(generations: tuple[str, ...]) -> str:
        return ",".join(sorted(entry.name for entry in entries if entry.generation in generations))

    info = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Adapters on the device and adapters waited for; the value is the time.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    info.add_metric([str(stats.adapter_room), names(stats.resident), names(stats.waiting_for)], time.time())
    return info


def _gauges(values: Values) -> Iterator[Metric]:
    for name, (text, value) in values.items():
        yield GaugeMetricFamily(f"loraplex_{name}", text, value)


def _counters(values: Values) -> Iterator[Metric]:
    for name, (text, value) in values.items():
        yield CounterMetricFamily(f"loraplex_{name}", text, value)


def _kv_share(stats: EngineStats) -> float:
    return stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
