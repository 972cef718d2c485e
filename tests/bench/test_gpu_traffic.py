"""A benchmark on a machine that is paid by the minute ends when the device does."""

import asyncio
from types import SimpleNamespace

import pytest

from server.engine.sequence import Token
from tests.bench.gpu_traffic import _Case


class FailsMidStream:
    """An engine whose device gives up on one stream; the others wait for tokens that never come."""

    async def stream(self, submit):
        yield Token(submit.request_id, 3)
        if submit.request_id.endswith("-1"):
            raise RuntimeError("an illegal memory access was encountered")
        await asyncio.Event().wait()


def test_a_failure_of_the_device_ends_an_upload_that_waits_for_tokens():
    case = _Case(SimpleNamespace(engine=FailsMidStream()), None, 0, streams=3, tokens=10)

    async def once():
        async with asyncio.timeout(10):
            await case.once("new", None)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(once())
    assert raised.group_contains(RuntimeError, match="illegal memory access")
