"""The command as a process: help, mistakes, and the life of a server over a fake model."""

import contextlib
import json
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import httpx
import pytest

from server.cli import build_parser, main
from server.config import Settings, flag
from server.process import print_banner
from server.version import VERSION

CERTIFICATE = str(Path(__file__).parent / "localhost.pem")

LIFE = """
import gc, sys, time
from pathlib import Path
from server.config import Settings, SettingsError
from server.process import run
from tests.server import fakes

def load(settings, serving):
    if settings.base_name == "broken":
        raise OSError("no such\\nfolder")
    if settings.base_name == "missettled":
        raise SettingsError("--chat-template x: cannot be read")
    if settings.base_name == "mistaken":
        raise TypeError("not subscriptable")
    serving.detail, serving.progress = "reading weights", 0.5
    time.sleep({loading})
    if settings.base_name == "frozen":
        import adapters.threads  # and torch, as every load does
    world = fakes.world(Path(sys.argv[2]))
    world.engine.reply = lambda submit: world.tokenizer.encode("slow " * 4)
    world.engine.delay, world.engine.first = {delay}, {first}
    serving.plan = ("memory      a little",)
    serving.served = world.serving.served
    serving.phase = "ready"
    if settings.base_name == "dying":
        time.sleep(1)
        world.engine.healthy = False

settings = Settings(
    model="m", port=int(sys.argv[1]), shutdown_timeout={timeout}, served_model_name={name!r}, **{more!r}
)
status = run(settings, load)
if settings.base_name == "frozen":
    print(f"left out of collections: {{gc.get_freeze_count()}} objects")
sys.exit(status)
"""


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def start(port, tmp_path):
    """Starts a server over fakes."""
    running = []

    def begin(loading=0.0, delay=0.0, timeout=5.0, name=None, first=None, **more):
        script = LIFE.format(loading=loading, delay=delay, timeout=timeout, name=name, first=first, more=more)
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(port), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError:
        return 0, {}


def until(port, path, status, seconds=30.0):
    deadline = time.monotonic() + seconds
    while (answer := get(port, path))[0] != status:
        assert time.monotonic() < deadline, answer
        time.sleep(0.02)
    return answer[1]


def stream(port):
    """An open stream, after its first event."""
    body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 40}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    response = urllib.request.urlopen(request, timeout=20)
    assert response.readline().startswith(b"data: {")
    return response


ADAPTERS = ("put", "list", "show", "versions", "rollback", "rm")


@pytest.mark.parametrize(
    "words", [[], ["serve"], ["adapters"], *(["adapters", name] for name in ADAPTERS)], ids=str
)
def test_help_comes_at_once_and_without_heavy_imports(words):
    heavy = ["torch", "transformers", "fastapi", "uvicorn", "httpx", "numpy", "safetensors"]
    code = (
        "import sys, contextlib\nfrom server.cli import main\n"
        f"with contextlib.suppress(SystemExit): main({[*words, '--help']})\n"
        f"print(sorted(set({heavy}) & set(sys.modules)))"
    )
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("-c", code)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: loraplex")
    assert done.stdout.endswith("[]\n")
    # seconds of a processor, so that a busy machine does not count; a third of one on a quiet machine
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 1


def test_every_setting_is_a_flag_with_help():
    text = re.sub(r"\s+", " ", build_parser()._subparsers._group_actions[0].choices["serve"].format_help())
    for name, field in Settings.model_fields.items():
        assert flag(name) in text
        assert field.description in text


def test_version():
    for spelling in ("version", "--version"):
        assert command("-m", "server.cli", spelling).stdout == f"loraplex {VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve"], "MODEL is missing"),
        (["serve", "m", "--prot", "1"], "did you mean --port?"),
        (["serve", "m", "--port", "99999"], "--port: must be"),
        (["serve", "m", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["serve", "m", "--port"], "expected one argument"),
        (
            ["serve", "m", "--tensor-parallel-size", "2"],
            "--tensor-parallel-size: a server runs on one device",
        ),
        (["serve", "m", "--load-format=bitsandbytes"], "--load-format: a checkpoint's own format is read"),
        (["serve", "m", "-tp", "2"], "-tp: a server runs on one device"),
        (["serve", "m", "--no-enable-lora"], "cannot be turned off"),
        (["serve", "m", "--context-lenght", "5"], "did you mean --context-length?"),
        (["serve", "m", "--context-length", "x"], "--context-length: must be"),
        (["serve", "--served-model-name", "base", "./m"], "put it first"),
        (["serve", "m", "--lora-modules", "a=/x", "n"], "--lora-modules: must be given as name=path, got n"),
        (["sevre"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.count("\n") == 1
    assert words in printed.err


@pytest.mark.parametrize(
    ("arguments", "model", "modules"),
    [
        (["m", "--lora-modules", "a=/x", "b=/y"], "m", ["a", "b"]),
        (["--lora-modules", "a=/x", "b=/y", "m"], "m", ["a", "b"]),
        (["--lora-modules", "a=/x", "m", "--lora-modules", "b=/y", "--enable-lora"], "m", ["a", "b"]),
        (["--lora-paths", '{"name": "a", "path": "/x"}', "m"], "m", ["a"]),
        (["--model-path", "m", "--lora-modules", "a=/x"], "m", ["a"]),
        (["m", "--served-model-name", "one", "two", "-q", "bitsandbytes"], "m", []),
    ],
)
def test_commands_as_people_bring_them(arguments, model, modules, monkeypatch):
    """Written for vLLM or SGLang: several values behind a flag, and the base before or behind it."""
    started = []
    monkeypatch.setattr("server.process.run", lambda settings: started.append(settings) or 0)
    assert main(["serve", *arguments]) == 0
    (settings,) = started
    assert settings.model == model
    assert [module.name for module in settings.lora_modules] == modules


def test_a_busy_port_is_one_line(start, port):
    with socket.create_server(("127.0.0.1", port)):
        process = start()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert f"port {port}" in errors
    assert "--port" in errors


def test_from_start_to_drained_stop(start, port):
    process = start(loading=1.0, delay=0.02)
    until(port, "/health", 200)
    assert until(port, "/ready", 503)["status"] == "loading"
    until(port, "/ready", 200)
    with stream(port) as response:
        process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
    assert '"finish_reason":"length"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    lines = output.splitlines()
    assert lines[0] == f"loraplex {VERSION}"
    assert "memory      a little" in lines
    assert any(re.fullmatch(rf"ready in \d+\.\d s at http://127.0.0.1:{port}/v1", line) for line in lines)
    assert lines[-1] == "stopped"


def test_what_does_not_end_in_time_gets_an_error_even_if_the_engine_hangs(start, port):
    process = start(delay=8.0, first=0.0, timeout=0.5)
    until(port, "/ready", 200)
    with stream(port) as response:
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
    assert time.monotonic() - began < 4
    assert '"code":"not_ready"' in rest
    assert rest.endswith("data: [DONE]\n\n")
    process.communicate(timeout=30)
    assert process.returncode == 0


def asked(port, **fields):
    """A connection on which a completion was asked for."""
    body = json.dumps({"prompt": "a", **fields}).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: a\r\n{kind}".encode() + body)
    return connection


def all_of(connection):
    received = b""
    while data := connection.recv(65536):
        received += data
    return received.decode()


def uploading(port, nbytes):
    """A connection on which the beginning of an upload was sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(
        f"PUT /v1/adapters/a HTTP/1.1\r\nhost: a\r\ncontent-length: {nbytes}\r\n\r\nPK".encode()
    )
    time.sleep(0.3)
    return connection


def test_an_upload_may_end_while_the_server_drains(start, port):
    process = start(timeout=20.0)
    until(port, "/ready", 200)
    with uploading(port, 4) as connection:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        connection.sendall(b"\x03\x04")
        assert all_of(connection).startswith("HTTP/1.1 201 ")
    process.communicate(timeout=5)
    assert process.returncode == 0


def test_bodies_that_do_not_end_in_time_get_an_error(start, port):
    process = start(timeout=0.5)
    until(port, "/ready", 200)
    with (
        uploading(port, 1000) as connection,
        socket.create_connection(("127.0.0.1", port), timeout=10) as other,
    ):
        other.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
        )
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        for answer in (all_of(connection), all_of(other)):
            assert answer.startswith("HTTP/1.1 503 ")
            assert '"code":"not_ready"' in answer
        _, errors = process.communicate(timeout=10)
    assert time.monotonic() - began < 4
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_an_engine_that_dies_while_the_server_drains_ends_it(start, port):
    process = start(name="dying", delay=30.0, first=0.0, timeout=60.0)
    until(port, "/ready", 200)
    with stream(port) as response, uploading(port, 1000) as connection:
        process.send_signal(signal.SIGTERM)
        assert '"code":"not_ready"' in response.read().decode()
        assert all_of(connection).startswith("HTTP/1.1 503 ")
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "the engine has stopped" in errors


def test_a_second_signal_ends_at_once_with_a_word_to_everybody(start, port):
    process = start(delay=8.0, first=0.0, timeout=60.0)
    until(port, "/ready", 200)
    with (
        asked(port) as whole,
        asked(port, stream=True, n=3) as several,
        stream(port) as response,
        socket.create_connection(("127.0.0.1", port)) as upload,
    ):
        upload.sendall(b"PUT /v1/adapters/a HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nPK")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = response.read().decode()
        answer, events = all_of(whole), all_of(several)
        _, errors = process.communicate(timeout=5)
        assert time.monotonic() - began < 3
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped at once" in errors
    assert "Traceback" not in errors
    (event,) = [json.loads(line[6:]) for line in rest.splitlines() if line.startswith("data: {")]
    assert event["error"]["code"] == "not_ready"
    assert rest.endswith("data: [DONE]\n\n")
    assert answer.startswith("HTTP/1.1 503 ")
    assert '"code":"not_ready"' in answer
    assert '"code":"not_ready"' in events
    assert "data: [DONE]\n\n" in events


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "no API key is required; adapters are changed by anyone on this machine"),
        ({"api_key": ["hush"]}, "an API key is required; adapters are changed with any API key"),
        (
            {"api_key": ["hush"], "admin_api_key": ["psst"], "host": "0.0.0.0"},
            "an API key is required; adapters are changed with an admin key",
        ),
        (
            {"host": "0.0.0.0"},
            "no API key is required; adapters cannot be changed over HTTP (403) unless --admin",
        ),
    ],
)
def test_start_up_says_who_may_do_what_and_no_key(more, words, capsys):
    settings = Settings(model="m", **more)
    print_banner(settings, "http://here")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"keys        {words}")]
    warned = [line for line in lines if line.startswith("warning     anyone who reaches this address")]
    assert bool(warned) is ("host" in more and "api_key" not in more)
    assert not [line for line in lines if "hush" in line or "psst" in line]


def test_a_connection_is_kept_while_idle_and_its_heads_are_bounded(start, port):
    start()
    until(port, "/ready", 200)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for idle in (5.5, 0):  # many servers close after 5 s
            connection.sendall(b"HEAD /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(idle)
        connection.sendall(b"HEAD /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 65536)
        assert connection.recv(65536).startswith(b"HTTP/1.1 431 ")


def test_a_stop_while_loading_is_at_once(start, port):
    process = start(loading=60.0)
    until(port, "/health", 200)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 0


def test_a_model_that_cannot_be_loaded(start):
    process = start(name="broken")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "loraplex serve: the model could not be loaded: OSError: no such folder"
    assert "Traceback" not in errors


def test_a_wrong_setting_that_loading_finds(start):
    process = start(name="missettled")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.splitlines()[-1] == "loraplex serve: --chat-template x: cannot be read"


def test_a_server_whose_output_nobody_reads_any_more_stops_when_told(start, port):
    process = start()
    until(port, "/ready", 200)
    process.stdout.close()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)
    assert process.returncode == 0


def test_a_mistake_of_ours_while_loading_has_a_traceback(start):
    process = start(name="mistaken")
    _, errors = process.communicate(timeout=60)
    assert "Traceback (most recent call last)" in errors
    assert errors.splitlines()[-1].endswith("the model could not be loaded: TypeError: not subscriptable")


def test_an_engine_that_dies_ends_the_process(start):
    process = start(name="dying")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the engine has stopped" in errors


def test_https_and_a_line_for_each_request(start, port):
    process = start(enable_log_requests=True, ssl_certfile=CERTIFICATE, ssl_keyfile=CERTIFICATE)
    trusting = ssl.create_default_context(cafile=CERTIFICATE)
    with httpx.Client(base_url=f"https://localhost:{port}", verify=trusting) as client:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/ready").status_code == 200:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        reply = client.post("/v1/completions", json={"prompt": "secret"}, headers={"x-request-id": "mine"})
        assert reply.status_code == 200
        assert client.get("/v1/models/no%0Dbody").status_code == 404
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert f"at https://127.0.0.1:{port}/v1" in output
    first, second = [
        line.partition("request id=")[2] for line in errors.splitlines() if "request id=" in line
    ]
    assert re.fullmatch(r"mine method=POST path=/v1/completions status=200 seconds=\d+\.\d{3}", first)
    assert r"path=/v1/models/no\rbody status=404" in second
    assert "secret" not in errors


def test_a_certificate_that_is_none(start):
    process = start(ssl_certfile=CERTIFICATE, ssl_keyfile="nowhere.key")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.count("\n") == 1
    assert "--ssl-certfile and --ssl-keyfile" in errors


def test_what_a_start_made_is_left_out_of_collections(port, start):
    """To go through it stops every thread: a quarter of a second with torch and transformers."""
    process = start(name="frozen")
    until(port, "/ready", 200)
    time.sleep(1)  # that is done once it is ready
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    (count,) = re.findall(r"left out of collections: (\d+) objects", said)
    assert int(count) > 10_000
