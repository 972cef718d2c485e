"""Which kernels a decode step's time goes to, by the device's own trace. Knows no bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu_model import Engine
from tests.bench.gpu_timing import synchronize

_WARM_UP, _STEPS, _NAME = 3, 5, 60


def kernel_seconds(engine: Engine, adapters: Sequence[int | None], context: int) -> dict[str, float]:
    """Seconds of a step by kernel, the longest first; launches of a kernel are added up."""
    serving = engine.serving(adapters, max(2, context - _WARM_UP))
    for _ in range(_WARM_UP):
        serving.step()
    synchronize(engine.servable.device)
    cuda = engine.servable.device.type == "cuda"  # elsewhere nothing is found, by the same code
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        for _ in range(_STEPS):
            serving.step()
        synchronize(engine.servable.device)
    found: Counter[str] = Counter()
    for event in trace.key_averages():  # long names may begin alike
        found[event.key[:_NAME]] += event.self_device_time_total / 1e6 / _STEPS
    return {name: seconds for name, seconds in found.most_common() if seconds}
