"""One server on the demo for all clients, and the official one."""

from pathlib import Path

import openai
import pytest

from loadtests.server_process import serving

DEMO = Path(__file__).parents[2] / "demo"
ADAPTERS = ("medical", "legal", "finance")


@pytest.fixture(scope="session")
def server():
    """The demo with its adapters, served by a process of its own."""
    modules = [flag for name in ADAPTERS for flag in ("--lora-modules", f"{name}={DEMO}/adapters/{name}")]
    with serving(DEMO / "base", "--served-model-name", "base", *modules) as server:
        yield server


@pytest.fixture(scope="session")
def url(request):
    """Where the demo is served."""
    return request.config.getoption("--served-at") or request.getfixturevalue("server").url


@pytest.fixture(scope="session", autouse=True)
def _the_client_that_was_asked_for(request):
    wanted = request.config.getoption("--openai")
    assert wanted in (None, openai.VERSION.partition(".")[0]), f"this is openai {openai.VERSION}"


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client
