"""Over real connections: what is read before a request is known has a bound."""

import contextlib
import json
import socket
import time

import pytest

from server.api.app import create_app
from server.api.connection import MAX_HEAD_BYTES
from tests.server.live import listening

HEAD = b"GET /version HTTP/1.1\r\nhost: a\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
def live(world):
    with listening(create_app(world.settings, world.serving)) as live:
        yield live


def connected(live):
    return socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10)


def sent(live, data):
    """All that is answered; the server may close before everything is sent."""
    received = b""
    with connected(live) as connection, contextlib.suppress(ConnectionError):
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return head.decode().lower(), body


def refused(answer):
    head, body = answer
    assert head.startswith("http/1.1 431 request header fields too large\r\n")
    assert "connection: close" in head
    assert f"content-length: {len(body)}" in head
    return json.loads(body)["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"x: " + b"y" * MAX_HEAD_BYTES,  # no end of it yet
        HEAD + b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n",
        HEAD + b"x: y\r\n" * (MAX_HEAD_BYTES // 6),
        HEAD + b"x" * MAX_HEAD_BYTES,
        b"GET /" + b"a" * MAX_HEAD_BYTES,
        CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * (MAX_HEAD_BYTES // 3),  # trailers
        CHUNKED + b"2;" + b"x" * 2 * MAX_HEAD_BYTES,
    ],
    ids=["unended", "ended", "many", "name", "path", "trailers", "extension"],
)
def test_a_head_too_large(live, data):
    assert refused(sent(live, data))
    head, body = sent(live, HEAD + b"connection: close\r\n\r\n")
    assert head.startswith("http/1.1 200 ")
    assert json.loads(body)["name"] == "loraplex"


def test_a_head_that_fits_and_a_second_on_the_same_connection(live):
    fill = b"x: " + b"y" * (MAX_HEAD_BYTES - len(HEAD) - 8) + b"\r\n\r\n"
    assert len(HEAD + fill) == MAX_HEAD_BYTES - 1
    with connected(live) as connection:
        for _ in range(3):
            connection.sendall(HEAD + fill)
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(65536)
            assert received.startswith(b"HTTP/1.1 200 ")


def test_a_body_is_bounded_by_its_route_and_not_with_the_head(live):
    body = json.dumps({"prompt": "a " * MAX_HEAD_BYTES}).encode()
    lengths = f"content-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    head, answer = sent(live, b"POST /tokenize HTTP/1.1\r\nhost: a\r\n" + lengths.encode() + body)
    assert head.startswith("http/1.1 200 ")
    assert json.loads(answer)["count"] > MAX_HEAD_BYTES
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:]))
    head, answer = sent(
        live, CHUNKED.replace(b"host: a", b"host: a\r\nconnection: close") + chunks + b"0\r\n\r\n"
    )
    assert json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])["count"] > MAX_HEAD_BYTES


@pytest.mark.parametrize(
    "data",
    [b"", b"GET / HTTP/1.1\r\nho", HEAD + b"\r\n", HEAD + b"\r\nG"],
    ids=["fresh", "half", "after", "next"],
)
def test_a_connection_on_which_no_more_comes_is_closed(world, data):
    app = create_app(world.settings, world.serving)
    with listening(app, keep_alive=1) as live, connected(live) as connection:
        connection.sendall(data)
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answers.count(b"HTTP/1.1 200 ") == data.count(b"\r\n\r\n")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_behind_an_offer_of_another_protocol_is_read(live, chunked, at_once):
    """Java's HttpClient offers HTTP/2 with every request."""
    body = b'{"prompt": "a b c"}'
    offer = b"host: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA"
    if chunked:
        head, body = CHUNKED.replace(b"host: a", offer), b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        length = b"content-length: %d" % len(body)
        head = CHUNKED.replace(b"host: a", offer).replace(b"transfer-encoding: chunked", length)
    with connected(live) as connection:
        for _ in range(2):  # on one connection
            for part in [head + body] if at_once else [head[:50], head[50:], body[:3], body[3:]]:
                connection.sendall(part)
                time.sleep(0.01)
            received = b""
            while not received.endswith(b"}") and (part := connection.recv(65536)):
                received += part
            assert received.startswith(b"HTTP/1.1 200 ")
            assert json.loads(received.partition(b"\r\n\r\n")[2])["count"] > 1


def test_offers_of_other_protocols_one_behind_another(live):
    offering = HEAD + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n"
    head, rest = sent(live, offering * 1500 + HEAD + b"connection: close\r\n\r\n")
    assert head.startswith("http/1.1 200 ")
    assert rest.count(b"HTTP/1.1 200 ") == 1500


@pytest.mark.parametrize(
    "first", [HEAD.replace(b"host", b"connection: close\r\nhost"), HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")]
)
def test_an_offer_on_a_connection_that_ends_is_answered(live, first):
    """Behind a head that asks to close, the parser that read it skips whatever comes."""
    offering = first + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n"
    head, _ = sent(live, offering)
    assert head.startswith("http/1.1 200 ")
    assert "connection: close" in head
    head, rest = sent(live, offering * 2)
    assert head.startswith("http/1.1 200 ")
    assert b"HTTP/1.1" not in rest  # what comes behind it is no request


def test_a_tunnel_is_refused(live):
    head, _ = sent(live, b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\nabc")
    assert head.startswith("http/1.1 4")


@pytest.mark.parametrize("stream", [True, False])
def test_an_older_client_is_sent_no_chunks(live, stream):
    """HTTP/1.0 does not know them: what has no length ends with the connection."""
    body = json.dumps({"model": "base", "prompt": "a", "stream": stream}).encode()
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    head, answer = sent(live, b"POST /v1/completions HTTP/1.0\r\n" + head + body)
    assert head.startswith("http/1.1 200 ")
    assert "connection: close" in head
    assert "transfer-encoding" not in head
    assert ("content-length" in head) is not stream
    if stream:
        *events, done, end = answer.split(b"\n\n")
        assert all(event.startswith(b"data: {") for event in events)
        assert (done, end) == (b"data: [DONE]", b"")
    else:
        assert json.loads(answer)["choices"]
