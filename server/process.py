"""The life of a serving process: bind, load on a thread, serve, drain, leave with an exit code.

Knows nothing of models: `server/startup.py` loads one into `Serving`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TextIO

import uvicorn

from adapters.lock import StoreLockedError
from server.api.app import create_app
from server.api.asgi import LAST_WORDS_SECONDS, OpenRequests
from server.api.auth import is_loopback
from server.api.connection import BoundedProtocol
from server.config import Settings, SettingsError
from server.serving import Serving
from server.version import VERSION

logger = logging.getLogger(__name__)

Load = Callable[[Settings, Serving], None]
FAILED, USAGE = 1, 2
# how long Python's lock may be kept from the engine, again and again in a step, by a thread that parses an upload, say
SWITCH_SECONDS = 1e-4
KEEP_ALIVE_SECONDS = 75  # longer than the 60 for which proxies keep theirs: who closes first must be who asks
TICK = 0.05  # seconds between looks at the load, the engine and the drain
STOP_SECONDS = 10.0  # for the engine to leave after its last sequence


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would stop at once and exit by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(settings: Settings, load: Load | None = None) -> int:
    """Serve until told to stop; the exit code says how it went."""
    _log_to_stderr(settings.log_level)
    try:
        listener = _bind(settings.host, settings.port)
    except OSError as error:
        print(f"loraplex serve: {_cannot_bind(settings, error)}", file=sys.stderr)
        return USAGE
    try:
        check_certificate(settings)
    except (OSError, ssl.SSLError) as error:
        listener.close()
        print(f"loraplex serve: --ssl-certfile and --ssl-keyfile: {error}", file=sys.stderr)
        return USAGE
    with listener:
        url = _url(settings, listener.getsockname()[1])
        print_banner(settings, url)
        life = Life(settings, url, load or _startup_load)
        with asyncio.Runner(loop_factory=life.loop_factory) as runner:
            return runner.run(life.live(listener))


def leave_steps_alone(loop: asyncio.AbstractEventLoop) -> None:
    """What keeps other threads from holding the engine's up, once all is loaded; from any thread."""
    from adapters.threads import compute_on  # which brings torch: only `serve` needs it, and it is here now

    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # a look through the libraries' half a million objects stops every thread for 0.25 s
    # torch gives every new thread the number that was set last; `adapters/loader.py` says what more than one would cost
    alone = ThreadPoolExecutor(None, "blocking", compute_on, (1,))
    loop.call_soon_threadsafe(loop.set_default_executor, alone)


class Life:
    """One process from its bound port to its exit code."""

    def __init__(self, settings: Settings, url: str, load: Load) -> None:
        self._settings = settings
        self._url = url
        self._load = load
        self._serving = Serving()
        app = create_app(settings, self._serving)
        self._requests: OpenRequests = app.state.requests
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            http=BoundedProtocol,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout + 2 * LAST_WORDS_SECONDS),
        )
        self._server = _Server(config)
        self.loop_factory = config.get_loop_factory()
        self._drains: asyncio.Task[None] | None = None  # set by the first signal
        self._ends: asyncio.Task[None] | None = None  # by the second
        self._failure = (FAILED, "")  # of a load: the exit code, and what to say
        self._exit_code = 0

    async def live(self, listener: socket.socket) -> int:
        """Load beside serving; return when the server has stopped.

        Loading has a thread that ends, and with it the OpenMP threads that computed for it: where a process has more of
        those than cores, the engine's sleep between operations, and waking one takes as long as a small product.
        """
        began = time.perf_counter()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loading = threading.Thread(target=self._load_model, args=(loop,), name="load", daemon=True)
        loading.start()
        watching = asyncio.create_task(self._watch(began))
        await self._server.serve(sockets=[listener])
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await self._close()
        if loading.is_alive():  # it cannot be told to stop, and the interpreter must not end under it
            os._exit(self._exit_code)
        return self._exit_code

    def _load_model(self, loop: asyncio.AbstractEventLoop) -> None:
        serving = self._serving
        try:
            self._load(self._settings, serving)
            leave_steps_alone(loop)  # not before: loading wants all threads
        except Exception as error:
            foreseen = _ours(error) or isinstance(error, OSError)  # its own line says what to do
            logger.log(logging.DEBUG if foreseen else logging.ERROR, "loading failed", exc_info=error)
            serving.detail = _reason(error)
            self._failure = _failure(error)
            serving.phase = "failed"

    async def _watch(self, began: float) -> None:
        """Report the load, then see to it that a dead engine ends the process and a signal drains it."""
        serving, shown = self._serving, ""
        while serving.phase == "loading":
            if serving.detail != shown:
                shown = serving.detail
                logger.info("loading detail=%r progress=%.0f%%", shown, serving.progress * 100)
            await asyncio.sleep(TICK)
        if serving.phase == "failed":
            code, what = self._failure
            self._leave(code, f"{what}{serving.detail}")
            return
        if serving.served is not None:  # also when a signal came in the tick in which it became ready
            seconds = time.perf_counter() - began
            _say("\n".join([*serving.plan, f"ready in {seconds:.1f} s at {self._url}/v1"]))
        while serving.phase == "ready" and not serving.dead:
            await asyncio.sleep(TICK)
        if serving.dead:
            await self._leave_without_engine()

    async def _leave_without_engine(self) -> None:
        """Said once, whoever of those that watch and drain sees it first."""
        await asyncio.sleep(TICK)  # lets the open streams say why they end
        if self._exit_code != FAILED:
            self._leave(FAILED, "the engine has stopped on an error; its log line has the reason")
        await self._requests.end()

    def _leave(self, code: int, reason: str) -> None:
        self._exit_code = code
        self._server.should_exit = True
        _say(f"loraplex serve: {reason}", sys.stderr)

    def _on_signal(self, number: int) -> None:
        """The first signal drains, the second ends at once, with a word on every stream, a third without."""
        if self._ends is not None:
            os._exit(128 + number)
        if self._drains is not None:
            self._ends = asyncio.get_running_loop().create_task(self._end(128 + number))
            _say("stopped at once by a second signal", sys.stderr)
            return
        self._serving.phase = "draining"
        self._server.should_exit = True
        self._drains = asyncio.get_running_loop().create_task(self._drain())
        _say(f"finishing running requests for up to {self._settings.shutdown_timeout:g} s")

    async def _drain(self) -> None:
        """Let requests end; when the time is over, whatever is still open ends with an error that clients see."""
        deadline = time.monotonic() + self._settings.shutdown_timeout
        while (served := self._serving.served) is not None and time.monotonic() < deadline:
            if not served.engine.healthy:
                await self._leave_without_engine()
                return
            await asyncio.sleep(TICK)
            if not self._requests.tasks:
                return
        await self._requests.end()

    async def _end(self, code: int) -> None:
        """Leave within a moment: a step of the engine, an upload and a slow reader are not waited for."""
        try:
            await self._requests.end()
        finally:
            os._exit(code)

    async def _close(self) -> None:
        """End what the load has started; nobody is being served any more."""
        if self._drains is not None:
            await self._drains
            _say("stopped")
        if (served := self._serving.served) is not None:
            await asyncio.to_thread(served.engine.stop, STOP_SECONDS)
            await asyncio.to_thread(served.loader.close)
            if served.copier is not None:
                await asyncio.to_thread(served.copier.close)
            served.registry.store.close()


def _startup_load(settings: Settings, serving: Serving) -> None:
    from server.libraries import quiet_libraries

    quiet_libraries()
    from server.startup import load  # imports torch: on the loading thread, while /health already answers

    load(settings, serving)


def _say(text: str, to: TextIO | None = None) -> None:
    """Write to the terminal. Where nobody reads any more, or the disk is full, the process goes on without."""
    stream = to or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # else this error, at the interpreter's end, would be the exit code
        os.close(nowhere)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def _cannot_bind(settings: Settings, error: OSError) -> str:
    where = f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}"
    return f"{where}; stop what uses it, or choose another with --port or --host"


def check_certificate(settings: Settings) -> None:
    """Raise what is wrong with the certificate or its key, if there is one."""
    if settings.ssl_certfile is not None and settings.ssl_keyfile is not None:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)


def _url(settings: Settings, port: int) -> str:
    scheme = "http" if settings.ssl_certfile is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}"


def print_banner(settings: Settings, url: str) -> None:
    """What is about to be served, from where, and to whom."""
    lines = [
        f"loraplex {VERSION}",
        f"base        {settings.base_name} from {settings.model}",
        f"store       {settings.store_folder}",
        f"keys        {_who_may(settings)}",
        f"listening   {url} (loading)",
    ]
    if not settings.api_key and not is_loopback(settings.host):
        lines.append(
            "warning     anyone who reaches this address may use the model; --api-key asks for a key"
        )
    _say("\n".join(lines))


def _who_may(settings: Settings) -> str:
    """What the keys, or their absence, allow."""
    asking = "an API key is required" if settings.api_key else "no API key is required"
    if settings.admin_api_key:
        return f"{asking}; adapters are changed with an admin key"
    if not is_loopback(settings.host):
        return f"{asking}; adapters cannot be changed over HTTP (403) unless --admin-api-key is set"
    changing = "with any API key" if settings.api_key else "by anyone on this machine"
    return f"{asking}; adapters are changed {changing}"


def _reason(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split()) or "no message"
    return text if _ours(error) else f"{type(error).__name__}: {text}"


def _failure(error: Exception) -> tuple[int, str]:
    """With which exit code a load that failed ends the process, and after which words."""
    if isinstance(error, SettingsError):
        return USAGE, ""  # it will fail again, however often it is started
    return FAILED, "" if isinstance(error, StoreLockedError) else "the model could not be loaded: "


def _ours(error: Exception) -> bool:
    return type(error).__module__.startswith(("server.", "adapters."))


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("uvicorn").setLevel("WARNING" if level == "info" else level.upper())
