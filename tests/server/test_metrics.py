"""The metrics' text: names, labels, and bounds."""

import re

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import MAX_ADAPTER_LABELS, Metrics
from server.serving import Serving
from tests.server import fakes


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
    assert found["loraplex_adapters_registered",] == 2
    assert found["loraplex_steps_total",] == 7
    labels = (("engine", "0"), ("model_name", "base"))
    assert found["vllm:num_requests_running", *labels] == 0
    assert found["vllm:kv_cache_usage_perc", *labels] == 0.25
    assert found["vllm:prompt_tokens_total", *labels] == 70
    (info,) = [dict(key[1:]) for key in found if key[0] == "vllm:lora_requests_info"]
    assert info["max_lora"] == "4"
    assert info["running_lora_adapters"] == "legal"  # the one on the device
    assert info["waiting_lora_adapters"] == ""


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


def test_outcomes_and_times():
    metrics = Metrics(Serving())
    clock = metrics.token_clock()
    for _ in range(3):
        clock.tick()
    metrics.generation("a", "rejected", 5, 0, 0.1)
    metrics.generation("a", "completed", 5, 2, 0.1)
    metrics.upload("stored", "")
    metrics.http_request("/v1/models/{id:path}", 200)
    found = samples(metrics)
    assert found["loraplex_time_to_first_token_seconds_count",] == 1
    assert found["loraplex_inter_token_latency_seconds_count",] == 2
    assert found["loraplex_request_seconds_count",] == 1
    assert found["loraplex_adapter_tokens_total", ("adapter", "a"), ("direction", "prompt")] == 5
    assert found["loraplex_adapter_requests_total", ("adapter", "a"), ("outcome", "rejected")] == 1
    assert found["loraplex_upload_total", ("reason", ""), ("result", "stored")] == 1
    assert found["loraplex_http_requests_total", ("route", "/v1/models/{id:path}"), ("status", "200")] == 1


def test_every_metric_has_help(tmp_path):
    text = Metrics(fakes.world(tmp_path).serving).render().decode()
    for name in re.findall(r"^# TYPE (\S+)", text, re.MULTILINE):
        assert re.search(rf"^# HELP {re.escape(name)} \S", text, re.MULTILINE), name
