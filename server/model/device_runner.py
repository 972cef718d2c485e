"""Steps on a GPU: those of a captured size are replayed, all others run as they come. Same questions as `Runner`.

While the device runs, nothing here waits for it: inputs go over from pinned memory, where the next step is written
meanwhile if it is known, and logits stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, cuda

from kernels.segments import Spans
from server.model.context import ForwardContext, forward_context
from server.model.graphs import Graph, Graphs
from server.model.kv_cache import KVCache
from server.model.runner import StepInputs
from server.model.servable import ServableModel
from server.model.step_tables import Filled, StepLayout, StepTensors


class _Outgoing:
    """A step in pinned memory, and the event after which another may be written there."""

    def __init__(self) -> None:
        self.inputs: StepInputs | None = None  # that are written and not sent
        self.graph: Graph | None = None
        self.layout: StepLayout | None = None
        self.filled: Filled | None = None
        self.sent = cuda.Event()
        self._memory = torch.empty(0, dtype=torch.int32)

    def write(self, inputs: StepInputs, layout: StepLayout, graph: Graph | None) -> None:
        """As soon as the device has fetched what was there; what of that is still right is left."""
        self.sent.synchronize()
        before, self.filled = self.filled if layout is self.layout else None, None
        if layout.size > len(self._memory):
            self._memory = torch.empty(2 * layout.size, dtype=torch.int32, pin_memory=cuda.is_available())
            before = None
        self.filled = layout.fill(self._memory.numpy(), inputs, before)
        self.inputs, self.layout, self.graph = inputs, layout, graph

    def take(self) -> Tensor:  # [used] int32
        """The step, its token ids as they are now; it is sent once."""
        assert self.inputs is not None
        assert self.filled is not None
        self._memory.numpy()[: len(self.inputs.token_ids)] = self.inputs.token_ids
        self.inputs = None
        return self._memory[: self.filled.size]


class DeviceRunner:
    """Runs steps of a servable model over one KV cache, on a GPU with planned kernels."""

    def __init__(
        self,
        servable: ServableModel,
        cache: KVCache,
        *,
        layouts: Sequence[StepLayout] = (),  # of the steps to capture; all others run as they come
        stand_ins: Sequence[StepInputs] = (),  # for those: whatever kernel a step may need, one of them needs
        fixed: bool = False,
    ) -> None:
        self.model = servable.model
        self.device = servable.device
        self.cache = cache
        self.kernels = servable.kernels
        self.fixed = fixed
        self._stand_ins, self._layouts = stand_ins, layouts
        self.heads = servable.heads
        self._outgoing = [_Outgoing(), _Outgoing()]  # to be written and sent; on its way
        self._graphs = Graphs(self._run, layouts, servable.vocab_size, self.device) if layouts else None

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Run all stand-ins, so that no request waits for the compiler, and capture every graph.

        `progress` is told how many of how many are done.
        """
        before = len(self._stand_ins)
        for done, inputs in enumerate(self._stand_ins):
            self.forward(inputs)
            cuda.synchronize(self.device)  # whose fault it is shows here
            progress(done + 1, before + len(self._layouts))
        if self._graphs is not None:
            self._graphs.capture(lambda done, total: progress(before + done, before + total))

    def prepare(self, inputs: StepInputs) -> bool:
        """Write a step to the buffer it goes from; `forward` of the same inputs sends it, and their token ids with it.

        Whether that is all that `forward` has left to do.
        """
        return self._write(inputs).graph is not None

    @torch.inference_mode()
    def forward(self, inputs: StepInputs) -> Tensor:  # [wanted, vocabulary] float32
        """Logits of `inputs.logits_rows`, in that order, on the device; a replay's last until the next one."""
        outgoing = self._outgoing[0]
        if outgoing.inputs is not inputs:
            self._write(inputs)
        host = outgoing.take()
        self._outgoing.reverse()
        if outgoing.graph:
            logits = outgoing.graph.replay(host, outgoing.sent)
        else:
            assert outgoing.layout is not None
            buffer = host.to(self.device, non_blocking=True)
            outgoing.sent.record()
            logits = self._run(outgoing.layout.view(buffer, outgoing.filled)).float()
        return logits[: len(inputs.logits_rows)]

    def _write(self, inputs: StepInputs) -> _Outgoing:
        outgoing = self._outgoing[0]
        graph = self._graphs.find(inputs) if self._graphs is not None else None
        layout = (
            graph.layout if graph else StepLayout.of(inputs, self.cache.block_size, self.heads, self.fixed)
        )
        outgoing.write(inputs, layout, graph)
        return outgoing

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
