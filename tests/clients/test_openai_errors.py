"""What the official client makes of refusals that are seldom met: its own classes, and when it tries again."""

import openai
import pytest

from adapters.errors import AdapterError
from server.api.app import create_app
from tests.server import fakes
from tests.server.live import listening


@pytest.fixture
def world(tmp_path):
    return fakes.world(tmp_path)


@pytest.fixture
def live(world):
    with listening(create_app(world.settings, world.serving)) as live:
        yield live


@pytest.fixture
def ask(live):
    """One completion; `tries` is how often the client asks at most."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none") as client:

        def ask(tries=1, **given):
            asking = client.with_options(max_retries=tries - 1)
            return asking.completions.create(**{"model": "base", "prompt": "a", "max_tokens": 4} | given)

        yield ask


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_rate_limit(ask, world, stream):
    world.engine.max_open = 0
    with pytest.raises(openai.RateLimitError) as caught:
        ask(stream=stream)
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) > 0


def test_a_full_queue_is_tried_again_when_the_server_says(ask, live, world, monkeypatch):
    world.engine.max_open = 0
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        world.engine.max_open = 100

    monkeypatch.setattr("time.sleep", sleep)
    assert ask(tries=2).choices[0].finish_reason == "length"
    assert slept == [1.0]
    assert len(live.headers) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{"model": "odd"}, {"extra_body": {"adapter": "odd"}}])
def test_an_adapter_that_does_not_fit_is_a_conflict_told_once(ask, live, world, stream, fields):
    world.registry.names["odd"] = "3" * 64
    with pytest.raises(openai.ConflictError) as caught:
        ask(tries=3, stream=stream, **fields)
    assert (caught.value.code, caught.value.body["details"][0]["problem"]) == ("adapter_incompatible", "b")
    assert len(live.headers) == 1


@pytest.mark.parametrize(
    ("key", "path", "refusal", "code"),
    [
        ("wrong", "/completions", openai.AuthenticationError, "invalid_api_key"),
        ("asked", "/adapters/new", openai.PermissionDeniedError, "insufficient_scope"),
    ],
)
def test_keys_are_refused_by_the_clients_own_classes(tmp_path, key, path, refusal, code):
    world = fakes.world(tmp_path, api_key=["asked"], admin_api_key=["admin"])
    with (
        listening(create_app(world.settings, world.serving)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=3) as client,
    ):
        send = client.put if path.startswith("/adapters") else client.post
        with pytest.raises(refusal) as caught:
            send(path, body={"model": "base", "prompt": "a"}, cast_to=object)
        assert caught.value.code == code
        assert len(live.headers) == 1
    assert world.quiet()


@pytest.mark.parametrize("phase", ["loading", "draining"])
def test_a_server_that_is_not_ready_is_an_internal_server_error(ask, world, phase):
    world.serving.phase = phase
    with pytest.raises(openai.InternalServerError) as caught:
        ask()
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")


def test_a_dead_engine_too(ask, world):
    world.engine.healthy = False
    with pytest.raises(openai.InternalServerError) as caught:
        ask()
    assert (caught.value.status_code, caught.value.code) == (503, "engine_dead")


def test_what_breaks_in_mid_stream_is_an_api_error(ask, world):
    world.engine.fail_after = 2
    with pytest.raises(openai.APIError) as caught:
        list(ask(stream=True))
    assert "secret" not in str(caught.value)


def test_an_unsent_stream_that_breaks_is_an_internal_server_error(ask, world):
    world.engine.fail_after = 0
    with pytest.raises(openai.InternalServerError) as caught:
        ask(stream=True)
    assert caught.value.status_code == 500


def test_a_full_disk_is_not_tried_again(live, world):
    world.registry.refused = AdapterError("store_full", "the disk is full")
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=3) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.put(
            "/adapters/new", body={}, cast_to=object, options={"headers": {"Content-Type": "application/zip"}}
        )
    assert (caught.value.status_code, caught.value.code) == (507, "store_full")
    assert len(live.headers) == 1


def test_a_server_that_is_gone_is_a_connection_error():
    with (
        openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIConnectionError),
    ):
        client.models.list()
