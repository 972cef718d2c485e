"""What supervisors and balancers see in every phase."""

from server.version import VERSION
from tests.server.api.conftest import Client


def test_a_life(world):
    client, serving = Client(world), world.serving
    served, serving.served, serving.phase = serving.served, None, "loading"
    serving.progress, serving.detail = 0.4, "quantizing"
    assert client("GET", "/health").status_code == 200
    response = client("GET", "/ready")
    assert response.status_code == 503
    assert response.json() == {"status": "loading", "progress": 0.4, "detail": "quantizing"}
    assert "loraplex_ready 0.0" in client("GET", "/metrics").text

    serving.served, serving.phase = served, "ready"
    assert client("GET", "/health").json() == {"status": "ready"}
    assert client("GET", "/ready").json() == {"status": "ready"}

    serving.phase = "draining"
    assert client("GET", "/health").status_code == 200
    assert client("GET", "/ready").status_code == 503

    serving.phase, world.engine.healthy = "ready", False
    assert client("GET", "/health").status_code == 503
    assert client("GET", "/ready").json()["status"] == "failed"


def test_version(client):
    assert client("GET", "/version").json() == {"name": "loraplex", "version": VERSION}


def test_the_schema_can_be_made(client):
    paths = client("GET", "/openapi.json").json()["paths"]
    assert "/v1/completions" in paths
    assert paths["/v1/completions"]["post"]["requestBody"]


def test_metrics_are_old_text_whatever_is_accepted(client):
    headers = {"accept": "application/openmetrics-text;version=1.0.0"}
    response = client("GET", "/metrics", headers=headers)
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "\nvllm:num_requests_running{" in response.text
