"""The metrics' text: names, labels, and bounds; and the dashboard that reads them."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import MAX_ADAPTER_LABELS, Metrics
from server.serving import Serving
from tests.generate_docs import exercised
from tests.server import fakes
from tests.server.api.conftest import Client

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
LABELS = (("engine", "0"), ("model_name", "base"))


def samples(metrics):
    """Sample name and labels to value."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_engines_levels_under_our_names_and_vllms(tmp_path):
    world = fakes.world(tmp_path)
    found = samples(Metrics(world.serving))
    assert found["loraplex_ready",] == 1
    assert found["loraplex_kv_usage_ratio",] == 0.25
    assert found["loraplex_adapter_pages_total",] == 16
    assert found["loraplex_adapters", ("state", "registered")] == 2
    assert found["loraplex_adapters", ("state", "device")] == 1
    assert found["loraplex_adapters", ("state", "waiting")] == 1
    assert found["loraplex_steps_total",] == 7
    assert found["loraplex_step_seconds_total", ("phase", "prefill")] == 0.2
    assert found["loraplex_step_seconds_total", ("phase", "decode")] == pytest.approx(0.3)
    assert found["loraplex_adapter_store_bytes",] == 8192
    assert found["vllm:num_requests_running", *LABELS] == 0
    assert found["vllm:kv_cache_usage_perc", *LABELS] == 0.25
    assert found["vllm:prompt_tokens_total", *LABELS] == 50, "cached tokens included, each prompt once"
    assert found["vllm:cache_config_info", ("block_size", "16"), ("num_gpu_blocks", "8")] == 1
    (info,) = [dict(key[1:]) for key in found if key[0] == "vllm:lora_requests_info"]
    assert info["max_lora"] == "4"
    assert info["running_lora_adapters"] == "legal"  # the one on the device
    assert info["waiting_lora_adapters"] == "medical"


def test_loads_by_tier_and_their_seconds(tmp_path):
    found = samples(Metrics(fakes.world(tmp_path).serving))
    host, device = ("tier", "host"), ("tier", "device")
    assert found["loraplex_adapter_loads_total", ("result", "ok"), host] == 1
    assert found["loraplex_adapter_loads_total", ("result", "failed"), host] == 1
    assert found["loraplex_adapter_loads_total", ("result", "ok"), device] == 1
    assert found["loraplex_adapter_load_seconds_sum", host] == 0.3
    assert found["loraplex_adapter_load_seconds_bucket", ("le", "0.25"), host] == 0
    assert found["loraplex_adapter_load_seconds_bucket", ("le", "0.5"), host] == 1
    assert found["loraplex_adapter_load_seconds_bucket", ("le", "+Inf"), device] == 1


def test_everything_of_a_served_base_is_there_at_zero(tmp_path):
    """A rate over a counter that begins at 1 misses its first."""
    found = samples(Metrics(fakes.world(tmp_path).serving))
    for reason in ("stop", "length", "abort", "error"):
        key = sorted([*LABELS, ("finished_reason", reason)])
        assert found["vllm:request_success_total", *key] == 0
    assert found["vllm:time_to_first_token_seconds_count", *LABELS] == 0
    assert found["vllm:admission_rejections_total", *LABELS, ("reason", "queue_full")] == 0


def test_while_loading_there_is_no_engine_to_ask():
    found = samples(Metrics(Serving()))
    assert found["loraplex_ready",] == 0
    assert not any(key[0].startswith("vllm:") for key in found)


def test_the_number_of_adapter_labels_is_bounded():
    metrics = Metrics(Serving())
    for index in range(MAX_ADAPTER_LABELS + 50):
        for _ in range(2):
            metrics.generation(f"a{index}", "completed", 2, 3, 0.1)
    metrics.generation(None, "completed", 1, 1, 0.1)
    found = samples(metrics)
    adapters = {dict(key[1:])["adapter"] for key in found if key[0] == "loraplex_adapter_requests_total"}
    assert len(adapters) == MAX_ADAPTER_LABELS + 2
    assert {"(other)", "(base)"} <= adapters
    other = (("adapter", "(other)"), ("direction", "completion"))
    assert found["loraplex_adapter_tokens_total", *other] == 50 * 2 * 3


def test_removed_adapters_leave_their_labels_to_others(tmp_path, monkeypatch):
    world, now = fakes.world(tmp_path), 100.0
    monkeypatch.setattr("server.metrics.time.monotonic", lambda: now)
    metrics, names = Metrics(world.serving, max_adapter_labels=2), world.registry.names

    def served(*adapters):
        for adapter in adapters:
            names.setdefault(adapter, "a" * 64)
            metrics.token_clock(adapter, 5)
            metrics.generation(adapter, "completed", 5, 2, 0.1)
        found = samples(metrics)
        return {dict(key[1:])["adapter"] for key in found if "adapter" in dict(key[1:])}

    assert served("a", "b", "c") == {"a", "b", "(other)"}
    del names["a"]
    assert served("c") == {"a", "b", "(other)"}  # the look of a moment ago
    now += 1
    assert served("c") == {"b", "c", "(other)"}
    now += 1
    assert served("d") == {"b", "c", "(other)"}
    assert samples(metrics)["loraplex_adapter_tokens_total", ("adapter", "b"), ("direction", "prompt")] == 5


def test_outcomes(tmp_path):
    metrics = Metrics(fakes.world(tmp_path).serving)
    metrics.generation("a", "rejected", 5, 0, 0.1)
    metrics.generation("a", "completed", 5, 2, 0.1)
    metrics.upload("stored", "")
    metrics.http_request("/v1/models/{id:path}", 200)
    found = samples(metrics)
    assert found["loraplex_adapter_request_seconds_count", ("adapter", "a")] == 1
    assert found["loraplex_adapter_tokens_total", ("adapter", "a"), ("direction", "prompt")] == 5
    assert found["loraplex_adapter_requests_total", ("adapter", "a"), ("outcome", "rejected")] == 1
    assert found["vllm:admission_rejections_total", *LABELS, ("reason", "queue_full")] == 1
    assert found["loraplex_upload_total", ("reason", ""), ("result", "stored")] == 1
    assert found["loraplex_http_requests_total", ("route", "/v1/models/{id:path}"), ("status", "200")] == 1


def test_the_times_of_one_sequence(tmp_path):
    metrics = Metrics(fakes.world(tmp_path).serving)
    with patch("server.metrics.time.perf_counter") as clock:
        clock.return_value = 100.0
        one = metrics.token_clock("a", 7)
        for at in (103.0, 103.5, 104.5):
            clock.return_value = at
            one.tick(1.0)
        clock.return_value = 105.0
        one.end("length")
    found = samples(metrics)
    sums = {
        "time_to_first_token_seconds": 3.0,
        "request_queue_time_seconds": 1.0,
        "request_prefill_time_seconds": 2.0,
        "inter_token_latency_seconds": 1.5,
        "request_decode_time_seconds": 1.5,
        "request_time_per_output_token_seconds": 0.75,
        "e2e_request_latency_seconds": 5.0,
        "request_prompt_tokens": 7,
        "request_generation_tokens": 3,
    }
    assert {name: found[f"vllm:{name}_sum", *LABELS] for name in sums} == sums
    assert found["vllm:inter_token_latency_seconds_count", *LABELS] == 2
    assert found["loraplex_adapter_time_to_first_token_seconds_sum", ("adapter", "a")] == 3.0
    assert found["vllm:request_success_total", LABELS[0], ("finished_reason", "length"), LABELS[1]] == 1


def test_a_request_counts_each_of_its_sequences_by_its_end(tmp_path):
    world = fakes.world(tmp_path)
    client = Client(world)
    client.complete(max_tokens=50, n=2)
    client.complete(max_tokens=50, stop="grants", stream=True)
    world.engine.fail_after = 1
    client.complete()
    world.engine.max_open = 0
    client.complete()
    found = samples(client.app.state.edge.metrics)
    ended = {
        reason: found["vllm:request_success_total", LABELS[0], ("finished_reason", reason), LABELS[1]]
        for reason in ("length", "stop", "error", "abort")
    }
    assert ended == {"length": 2, "stop": 1, "error": 1, "abort": 0}
    assert found["vllm:time_to_first_token_seconds_count", *LABELS] == 4
    assert found["vllm:request_queue_time_seconds_sum", *LABELS] == pytest.approx(0.04)
    assert found["vllm:admission_rejections_total", *LABELS, ("reason", "queue_full")] == 1


def test_a_sequence_without_a_token_has_no_times(tmp_path):
    metrics = Metrics(fakes.world(tmp_path).serving)
    metrics.token_clock(None, 7).end("abort")
    found = samples(metrics)
    for name in ("time_to_first_token", "request_queue_time", "request_decode_time", "e2e_request_latency"):
        assert found[f"vllm:{name}_seconds_count", *LABELS] == 0
    assert found["vllm:request_success_total", LABELS[0], ("finished_reason", "abort"), LABELS[1]] == 1


def test_no_label_is_looked_up_for_a_token(tmp_path):
    clock = Metrics(fakes.world(tmp_path).serving).token_clock("a", 1)
    with patch("prometheus_client.metrics.MetricWrapperBase.labels", side_effect=AssertionError):
        for _ in range(3):
            clock.tick(0.0)


def test_there_are_no_created_times(tmp_path):
    metrics = Metrics(fakes.world(tmp_path).serving)
    metrics.generation("a", "completed", 5, 2, 0.1)
    assert "_created" not in metrics.render().decode()


def test_what_the_dashboard_asks_for_is_there():
    """Every metric of every panel, with the labels it selects and sums by."""
    text = exercised().decode()
    there = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if line[0] != "#"}
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    for expression in expressions:
        asked = re.findall(r"((?:vllm:|loraplex_)\w+)\{([^}]*)\}", expression)
        assert asked
        summed = {label for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(", ")}
        for name, selected in asked:
            assert name in there, expression
            wanted = summed | set(re.findall(r"(\w+)=", selected))
            assert wanted - {"instance"} <= labels[name], expression
    assert len(expressions) > 30


def test_every_metric_has_help(tmp_path):
    text = Metrics(fakes.world(tmp_path).serving).render().decode()
    for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE):
        assert re.search(rf"^# HELP {re.escape(name)} \S", text, re.MULTILINE), name
