"""A loraplex server as a child process: started, waited for, stopped.

Knows nothing of what is asked of it.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

START_SECONDS = 180.0  # a first start on a GPU compiles kernels
STOP_SECONDS = 30.0


class ServerFailedError(Exception):
    """The server did not come up; the message is what it said."""


@dataclass(frozen=True)
class ServerProcess:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(model: Path, *flags: str, port: int | None = None) -> Iterator[ServerProcess]:
    """A server on `port` (a free one if not given) with a store of its own, ready for requests; killed if still there.

    Raises `ServerFailedError` with the server's last words when it does not become ready.
    """
    chosen = port if port is not None else free_port()
    with tempfile.TemporaryDirectory(prefix="loraplex-") as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "server.cli", "serve", str(model), "--port", str(chosen)]
        command += ["--adapter-store", f"{folder}/store", *flags]
        with log.open("w") as output:
            process = subprocess.Popen(  # a session of its own: Ctrl-C is for whoever started it
                command, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        server = ServerProcess(f"http://127.0.0.1:{chosen}", process, log)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_until_ready(server: ServerProcess) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerFailedError(_last_words(server))
        try:
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.1)
    raise ServerFailedError(f"not ready after {START_SECONDS:.0f} s\n{_last_words(server)}")


def _last_words(server: ServerProcess) -> str:
    said = server.log.read_text().strip().splitlines()
    wrong = [line for line in said if line.startswith("loraplex serve:")]
    return "\n".join(wrong or said[-5:])
