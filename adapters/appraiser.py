"""What a folder's adapter is worth on this base: its facts, or why it cannot be served.

Knows nothing of names, or of where the folder came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import Adapter, Layout
from adapters.entry import Facts
from adapters.errors import AdapterError, Finding
from adapters.peft_format import Keep, Outline, copied, inspect_adapter, read_adapter, scan_adapter


@dataclass(frozen=True, slots=True)
class Appraiser:
    """The base's layout, the server's limits, and `fits`, which raises AdapterError for what could never be admitted.

    `fits` is given an adapter whose tensors are on the meta device, of the type and size that `read` will keep. `keep`
    says whether weights that were read are copied out of their file.
    """

    layout: Layout
    dtype: torch.dtype
    max_rank: int
    fits: Callable[[Adapter], None]
    keep: Keep = copied

    def read(self, folder: Path, generation: str) -> Adapter:
        """The weights; AdapterError tells everything that is wrong with them."""
        return read_adapter(folder, generation, self.layout, self.dtype, self.max_rank, self.keep)

    def validate(self, folder: Path, generation: str) -> Facts:
        """Facts of an adapter of which every value was looked at and none kept; AdapterError if it cannot be served."""

        def weigh(values: Tensor, dtype: torch.dtype) -> Tensor:
            return self.keep(values.to("meta"), dtype)

        outline = scan_adapter(folder, generation, self.layout, self.dtype, self.max_rank, weigh)
        return self._facts(folder, outline)

    def inspect(self, folder: Path, generation: str) -> Facts:
        """Facts by the header and the config alone; what is wrong is among them."""
        try:
            outline = inspect_adapter(folder, generation, self.layout, self.dtype, self.max_rank, self.keep)
            return self._facts(folder, outline)
        except AdapterError as error:
            return Facts(findings=error.findings or (Finding(folder.name, error.message),))
        except OSError as error:
            return Facts(findings=(Finding(folder.name, f"cannot be read: {error.strerror or error}"),))

    def _facts(self, folder: Path, outline: Outline) -> Facts:
        adapter = outline.adapter
        self.fits(adapter)
        members = (self.layout.sites[delta.site].members[delta.member] for delta in adapter.deltas)
        return Facts(
            nbytes=sum(path.stat().st_size for path in folder.iterdir()),
            rank=adapter.rank,
            modules=tuple(sorted({member.module.rpartition(".")[2] for member in members})),
            base_model=outline.base_model,
        )
