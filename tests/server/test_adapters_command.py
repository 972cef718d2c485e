"""`loraplex adapters` against an app over fakes behind a real socket: what it sends, what it prints, how it ends."""

import json
import re
import shutil
import socket
import sys

import pytest

from adapters.errors import AdapterError, Finding
from adapters.sources import unpack
from server.api.app import create_app
from server.cli import main
from tests.server import fakes
from tests.server.live import listening

LEGAL, MEDICAL = fakes.ADAPTERS["legal"], fakes.ADAPTERS["medical"]


@pytest.fixture
def world(tmp_path):
    return fakes.world(tmp_path / "world")


@pytest.fixture
def live(world, monkeypatch):
    with listening(create_app(world.settings, world.serving)) as live:
        for name in ("LORAPLEX_ADMIN_API_KEY", "LORAPLEX_API_KEY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LORAPLEX_URL", live.url)
        yield live


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "tax"
    made.mkdir()
    (made / "adapter_config.json").write_text('{"r": 8}')
    (made / "adapter_model.safetensors").write_bytes(b"t" * 3000)
    return made


@pytest.fixture
def adapters(capsys):
    def run(*arguments):
        code = main(["adapters", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_list_is_a_table(live, adapters):
    code, out, _ = adapters("list")
    assert code == 0
    head, legal, medical = out.splitlines()
    assert head.split() == [
        *("NAME", "STATE", "RANK", "MODULES", "SIZE", "REVISION", "GENERATION", "REFERENCES")
    ]
    assert legal.split() == ["legal", "ready", "8", "q", "4.0", "KiB", "1", "1" * 12, "0"]
    assert medical.index("ready") == legal.index("ready") == head.index("STATE")
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_list_of_nothing_keeps_standard_output_for_adapters(live, world, adapters):
    world.registry.names.clear()
    code, out, errors = adapters("list")
    assert (code, out) == (0, "")
    assert "adapters put" in errors


@pytest.mark.parametrize("command", [["list"], ["show", "legal"], ["versions", "legal"]])
def test_json_is_what_the_server_answered(live, adapters, command):
    code, out, _ = adapters(*command, "--json")
    assert code == 0
    body = json.loads(out)
    assert body.get("generation", LEGAL) == LEGAL
    assert body["object"] == ("adapter" if command[0] == "show" else "list")


def test_show_tells_everything_and_the_findings(live, world, adapters):
    world.registry.names["odd"] = "3" * 64
    code, out, _ = adapters("show", "odd")
    assert code == 0
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert lines["state"] == "incompatible"
    assert lines["generation"] == "3" * 64
    assert lines["modules"] == "q_proj"
    assert lines["finding"] == "a: b"
    assert "in use by   0 running requests" in out


def test_put_sends_the_two_files_of_a_folder(live, world, adapters, folder, tmp_path):
    put_archive = world.registry.put_archive
    taken = tmp_path / "taken"

    def take(name, archive, if_match=None):
        shutil.rmtree(taken, ignore_errors=True)
        taken.mkdir()
        unpack(archive, taken, 10**6)
        return put_archive(name, archive, if_match)

    world.registry.put_archive = take
    code, out, errors = adapters("put", folder)
    assert (code, errors) == (0, ""), "no bar where nobody watches"
    assert re.fullmatch(r"tax is ready: revision 1, generation \w{12}, rank 8, 4\.0 KiB\n", out)
    assert {path.name: path.read_bytes() for path in taken.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert live.headers[-1]["content-length"].isdecimal()
    assert "transfer-encoding" not in live.headers[-1]
    code, out, _ = adapters("put", folder)
    assert code == 0
    assert "tax had this content already" in out


@pytest.mark.parametrize(
    ("name", "called"), [("tax.zip", "tax"), ("v1.2.tar.gz", "v1.2"), ("a.TAR", "a"), ("plain", "plain")]
)
def test_put_of_an_archive_calls_it_as_the_file(live, world, adapters, tmp_path, name, called):
    (tmp_path / name).write_bytes(b"PK\x03\x04 an archive")
    assert adapters("put", tmp_path / name)[0] == 0
    assert world.registry.names[called].startswith(b"PK\x03\x04 an archive".hex())
    assert adapters("put", "other", tmp_path / name)[0] == 0
    assert world.registry.names["other"] == world.registry.names[called]


def test_put_shows_a_bar_to_who_watches(live, adapters, folder, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, _, errors = adapters("put", folder)
    assert "tax: " in errors
    assert "B/s" in errors


def test_a_refusal_is_the_servers_words_and_a_line_for_each_finding(live, world, adapters, folder):
    findings = (Finding("q_proj", "has rank 7", "train with 8"), Finding("v_proj", "is all zeros"))
    world.registry.refused = AdapterError("invalid_adapter", "the adapter cannot be served", findings)
    code, out, errors = adapters("put", folder)
    assert (code, out) == (1, "")
    assert errors.splitlines() == [
        "loraplex adapters put: the adapter cannot be served",
        "  q_proj: has rank 7; train with 8",
        "  v_proj: is all zeros",
    ]


def test_what_is_too_large_hears_so_though_the_server_reads_no_further(
    tmp_path, adapters, folder, monkeypatch
):
    world = fakes.world(tmp_path / "small", max_upload_bytes=1000)
    (folder / "adapter_model.safetensors").write_bytes(bytes(30_000_000))
    with listening(create_app(world.settings, world.serving)) as live:
        monkeypatch.setenv("LORAPLEX_URL", live.url)
        code, _, errors = adapters("put", folder)
    assert code == 1
    assert errors == "loraplex adapters put: the upload is larger than 1000 bytes (--max-upload-bytes)\n"


def test_if_match_takes_the_beginning_that_the_table_shows(live, world, adapters, folder):
    code, _, errors = adapters("put", "legal", folder, "--if-match", MEDICAL[:12])
    assert code == 1
    assert "another generation" in errors
    assert world.registry.names["legal"] == LEGAL
    assert adapters("put", "legal", folder, "--if-match", LEGAL[:12])[0] == 0
    assert adapters("rm", "medical", "--if-match", LEGAL)[0] == 1
    assert adapters("rm", "medical", "--if-match", MEDICAL)[0] == 0
    assert set(world.registry.names) == {"legal"}


def test_rollback_by_revision_by_generation_and_by_its_beginning(live, world, adapters):
    code, out, _ = adapters("versions", "legal")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["REVISION", "GENERATION"],
        ["3", "1" * 12],
        ["1", "a" * 12],
    ]
    for to in ("1", "a" * 64, "aaaa"):
        world.registry.names["legal"] = LEGAL
        code, out, _ = adapters("rollback", "legal", to)
        assert (code, out) == (0, f"legal is at revision 1, generation {'a' * 12}\n")
        assert world.registry.names["legal"] == "a" * 64
    code, _, errors = adapters("rollback", "legal", "bbbb")
    assert code == 1
    assert "no version bbbb" in errors


def test_rm_removes_and_an_unknown_name_is_an_error(live, world, adapters):
    assert adapters("rm", "legal") == (0, "legal is removed\n", "")
    code, out, errors = adapters("rm", "legal")
    assert (code, out) == (1, "")
    assert errors == "loraplex adapters rm: no adapter legal\n"


def test_the_key_is_sent(live, adapters, monkeypatch):
    adapters("list")
    assert "authorization" not in live.headers[-1]
    monkeypatch.setenv("LORAPLEX_API_KEY", "user")
    adapters("list")
    assert live.headers[-1]["authorization"] == "Bearer user"
    monkeypatch.setenv("LORAPLEX_ADMIN_API_KEY", "admin")
    adapters("list")
    assert live.headers[-1]["authorization"] == "Bearer admin"
    adapters("list", "--api-key", "flag")
    assert live.headers[-1]["authorization"] == "Bearer flag"


def test_the_clients_own_address_of_the_server_does_too(live, adapters):
    assert adapters("list", "--url", f"{live.url}/v1/")[0] == 0


def test_a_server_that_is_not_there(adapters):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    code, out, errors = adapters("list", "--url", url)
    assert (code, out) == (1, "")
    assert errors.count("\n") == 1
    assert url in errors
    assert "loraplex serve MODEL" in errors


def test_a_server_that_is_not_ours(adapters):
    async def app(scope, receive, send):
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]}
        )
        await send({"type": "http.response.body", "body": b"<h1>hello</h1>"})

    with listening(app) as live:
        code, out, errors = adapters("list", "--url", live.url)
    assert (code, out) == (1, "")
    assert "does not answer as a loraplex server does (status 200, text/html)" in errors


def test_a_server_that_hangs_up(adapters):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})

    with listening(app) as live:
        code, _, errors = adapters("list", "--url", live.url)
    assert code == 1
    assert errors.startswith(f"loraplex adapters list: the connection to {live.url} broke")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["put"], "PATH"),
        (["list", "--jsno"], "did you mean --json?"),
        (["rm", "a", "--if-math", "x"], "did you mean --if-match?"),
        (["list", "--url", "localhost:8000"], "--url: must be like http://127.0.0.1:8000"),
        (["lits"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(capsys, arguments, words):
    try:
        code = main(["adapters", *arguments])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.count("\n") == 1
    assert words in printed.err
