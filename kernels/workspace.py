"""Device memory that kernels share: float32 planes of unfinished sums, counters, and a scratch matrix.

Layers run one after the other on one stream, so one workspace serves them all; work on a second stream at the same
time needs a workspace of its own. Knows nothing of what is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Grows to the largest request and keeps what it outgrew, because captured graphs hold its addresses.

    Nothing can grow while a graph is captured: run the step once before, at the largest sizes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._planes = torch.empty(0, dtype=torch.float32, device=self._device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=self._device)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=self._device)
        self._outgrown: list[Tensor] = []

    @property
    def held(self) -> int:
        """Bytes held, with what was outgrown."""
        tensors = (self._planes, self._counters, self._scratch, *self._outgrown)
        return sum(tensor.nbytes for tensor in tensors)

    def planes(self, floats: int) -> Tensor:  # [at least floats] float32
        """Sums in progress; whoever reads a place has written it in the same launch."""
        if floats > self._planes.numel():
            self._retire(self._planes)
            self._planes = torch.empty(floats, dtype=torch.float32, device=self._device)
        return self._planes

    def counters(self, count: int) -> Tensor:  # [at least count] int32
        """Zero at rest: a kernel that counts sets its counters back before it ends."""
        if count > self._counters.numel():
            self._retire(self._counters)
            self._counters = torch.zeros(count, dtype=torch.int32, device=self._device)
        return self._counters

    def scratch(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:  # [rows, columns]
        """A matrix that lasts until the next call."""
        nbytes = rows * columns * dtype.itemsize
        if nbytes > self._scratch.numel():
            self._retire(self._scratch)
            self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return self._scratch[:nbytes].view(dtype).view(rows, columns)

    def check(self) -> None:
        """Every counter is at rest."""
        assert not self._counters.any(), "a kernel left its counters behind"

    def _retire(self, tensor: Tensor) -> None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the workspace would grow inside a captured graph: run the step once before")
        if tensor.numel():
            self._outgrown.append(tensor)
