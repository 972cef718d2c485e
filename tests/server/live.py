"""An app behind a real socket, on a thread of this process, so that a test can see both ends."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from server.api.connection import BoundedProtocol


@dataclass
class Live:
    """Where it listens, the loop it runs in, and the headers of every request."""

    url: str
    loop: asyncio.AbstractEventLoop
    headers: list

    def tasks(self) -> set:
        """What runs in the loop, seen from inside."""

        async def look():
            return asyncio.all_tasks() - {asyncio.current_task()}

        return asyncio.run_coroutine_threadsafe(look(), self.loop).result(10)


@contextmanager
def listening(app, keep_alive: int = 5) -> Iterator[Live]:
    headers, loop = [], asyncio.new_event_loop()

    async def seen(scope, receive, send):
        headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await app(scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            seen,
            log_config=None,
            access_log=False,
            lifespan="off",
            http=BoundedProtocol,
            timeout_keep_alive=keep_alive,
        )
    )
    thread = threading.Thread(target=loop.run_until_complete, args=[server.serve(sockets=[listener])])
    thread.start()
    try:
        yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", loop, headers)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        loop.close()
