"""A large upload as a form, sent piece by piece: what the server keeps of it in memory."""

import random
import re
from pathlib import Path

import httpx


def test_a_large_form_takes_no_memory(server):
    """128 MiB arrive, are written, and turn out to be nothing; the server's peak hardly moves."""

    def peak() -> int:
        (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
        return int(line) // 1024

    noise = random.Random(1).randbytes(1024 * 1024)
    head = b'--line\r\nContent-Disposition: form-data; name="name"\r\n\r\nlarge\r\n--line\r\n'
    head += b'Content-Disposition: form-data; name="file"; filename="large.zip"\r\n\r\n'

    def body():
        yield head
        for _ in range(128):
            yield noise
        yield b"\r\n--line--\r\n"

    before = peak()
    headers = {"content-type": "multipart/form-data; boundary=line"}
    reply = httpx.post(f"{server.url}/v1/adapters", content=body(), headers=headers, timeout=60)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_archive")
    assert peak() - before < 24, "MiB"
