"""Steps on a GPU: decodes replay captured graphs, all others run as they come. Same questions as `Runner`.

While the device runs, nothing here waits for it: inputs go over from pinned memory, and logits stay where they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, cuda

from kernels.segments import Spans
from server.model.context import ForwardContext, forward_context
from server.model.graphs import Graphs
from server.model.kv_cache import KVCache
from server.model.runner import StepInputs
from server.model.servable import ServableModel
from server.model.step_tables import StepLayout, StepTensors


class _Outgoing:
    """A buffer in pinned memory, and the event after which it may be written again."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.int32)
        self.sent = cuda.Event()

    def of(self, size: int) -> NDArray[np.int32]:
        """Room for so many numbers, as soon as the device has fetched what was there."""
        self.sent.synchronize()
        if size > len(self.memory):
            self.memory = torch.empty(2 * size, dtype=torch.int32, pin_memory=cuda.is_available())
        room: NDArray[np.int32] = self.memory[:size].numpy()
        return room


class DeviceRunner:
    """Runs steps of a servable model over one KV cache, on a GPU with planned kernels."""

    def __init__(
        self,
        servable: ServableModel,
        cache: KVCache,
        *,
        layouts: Sequence[StepLayout] = (),  # of the steps to capture; all others run as they come
        fixed: bool = False,
    ) -> None:
        self.model = servable.model
        self.device = servable.device
        self.cache = cache
        self.kernels = servable.kernels
        self.fixed = fixed
        self.group = servable.query_group
        self._outgoing = itertools.cycle((_Outgoing(), _Outgoing()))
        self._graphs = Graphs(self._run, layouts, servable.vocab_size, self.device) if layouts else None

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Capture every graph; `progress` is told how many of how many are done."""
        if self._graphs is not None:
            self._graphs.capture(progress)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> Tensor:  # [wanted, vocabulary] float32
        """Logits of `inputs.logits_rows`, in that order, on the device; a replay's last until the next one."""
        graph = self._graphs.find(inputs) if self._graphs is not None else None
        layout = (
            graph.layout if graph else StepLayout.of(inputs, self.cache.block_size, self.group, self.fixed)
        )
        outgoing: _Outgoing = next(self._outgoing)
        filled = layout.fill(outgoing.of(layout.size), inputs)
        host = outgoing.memory[: filled.size]
        if graph:
            logits = graph.replay(host, outgoing.sent)
        else:
            buffer = host.to(self.device, non_blocking=True)
            outgoing.sent.record()
            logits = self._run(layout.view(buffer, filled)).float()
        return logits[: len(inputs.logits_rows)]

    def _run(self, step: StepTensors) -> Tensor:  # [wanted, vocabulary] in the model's dtype
        context = ForwardContext(
            kv_index=step.kv_index,
            spans=Spans((), self.cache.block_size, self.device),
            segments={},
            kv_caches=self.cache.layers,
            kernels=self.kernels,
            plans=step.plans,
        )
        with forward_context(context):
            output = self.model(
                input_ids=step.token_ids[None],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=0 if step.logits_rows is None else step.logits_rows,
            )
        logits: Tensor = output.logits[0]
        return logits
