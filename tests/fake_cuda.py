"""Stands for `torch.cuda` where there is none: streams, events and graphs that note what was asked of them, in order.

Work runs at once, on the CPU. A graph notes the calls made while it was captured and makes them again when replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


class FakeCuda:
    """Takes the place of the module's name `cuda`; `log` is what was asked, as tuples."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.current: Any = "the engine's stream"
        cuda = self

        class Event:
            def __init__(self, **given: Any) -> None:
                self.recorded_on: Any = None

            def record(self, stream: Any = None) -> None:
                self.recorded_on = stream or cuda.current
                cuda.log.append(("record", self, self.recorded_on))

            def query(self) -> bool:
                return True

            def synchronize(self) -> None:
                cuda.log.append(("synchronize", self))

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.device = device

            def wait_event(self, event: Event) -> None:
                assert event.recorded_on is not None, "a stream waits for an event that was never recorded"
                cuda.log.append(("wait", self, event))

            def wait_stream(self, other: Any) -> None:
                cuda.log.append(("wait", self, other))

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[Callable[[], None]] = []

            def replay(self) -> None:
                cuda.log.append(("replay", self))
                for each in self.work:
                    each()

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, CUDAGraph
        self.capturing: CUDAGraph | None = None

    def is_available(self) -> bool:
        return False

    def current_stream(self, device: Any = None) -> Any:
        return self.current

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, 1)

    def synchronize(self, device: Any = None) -> None:
        self.log.append(("synchronize", "device"))

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Any, **given: Any) -> Iterator[None]:
        """What is done within goes to the log; the captured calls are those given to `captured`."""
        assert self.capturing is None, "a graph is captured inside another"
        self.log.append(("capture", graph))
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


@contextmanager
def fake_device() -> Iterator[FakeCuda]:
    """The server's code for a GPU runs on the CPU: what a graph captures is run again when it is replayed."""
    from server.model.graphs import Graphs

    fake, step = FakeCuda(), Graphs._step

    def noted(graphs: Graphs, layout: Any) -> None:
        if fake.capturing is not None:
            fake.capturing.work.append(lambda: step(graphs, layout))
        step(graphs, layout)

    with (
        patch("server.model.device_runner.cuda", fake),
        patch("server.model.graphs.cuda", fake),
        patch("adapters.side_stream.cuda", fake),
        patch.object(Graphs, "_step", noted),
        patch("kernels.plans.FILL", 4),  # programs; as many as fill a GPU take the interpreter seconds
    ):
        yield fake
