"""How much memory the KV cache and the adapters get, decided once at start and printed as a plan.

Knows nothing of how the memory is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.adapter import Layout
from adapters.pages import PAGE_RANK, page_nbytes, plan_pages
from server.config import Settings, SettingsError
from server.config_values import GIB, size_text
from server.container import ROOT, memory_left
from server.model.kv_cache import position_nbytes
from server.model.servable import ServableModel

_CPU_KV_MOST = 4 * GIB
_CPU_KV_SHARE = 0.25  # of the memory that is free
_CUDA_KV_SHARE = 0.85  # of what the device has left after weights and adapters


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes that can be had, and whose bound that is if not the machine's."""

    nbytes: int
    within: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Blocks of the KV cache, pages of the adapter pool, and the longest sequence that fits."""

    kv_blocks: int  # the padding block included
    block_size: int
    block_nbytes: int
    pages: dict[str, int]
    page_nbytes: dict[str, int]
    adapter_dtype: torch.dtype
    host_nbytes: int  # of adapters, at most
    max_model_len: int
    kv_reason: str  # why the KV cache is as large as it is
    free: Free  # before any of it was taken

    def lines(self) -> tuple[str, ...]:
        """The plan as a person reads it."""
        pages = next(iter(self.pages.values()))
        adapters = sum(self.page_nbytes[group] * count for group, count in self.pages.items())
        dtype = str(self.adapter_dtype).removeprefix("torch.")
        block_size = self.block_size
        return (
            f"memory      {size_text(self.free.nbytes)} free{self.free.within} before what follows is taken",
            f"KV cache    {size_text(self.kv_blocks * self.block_nbytes)}: {self.kv_reason}; "
            f"{self.kv_blocks - 1} blocks of {block_size} tokens, sequences of up to {self.max_model_len} tokens "
            "(--kv-cache-memory-bytes)",
            f"adapters    {size_text(adapters)}: {pages} pages of rank {PAGE_RANK} in {dtype} "
            "(--adapter-memory-bytes or --max-loras)",
            f"host        up to {size_text(self.host_nbytes)} of adapters that wait for a page "
            "(--adapter-host-memory-bytes or --max-cpu-loras)",
        )


def plan_memory(settings: Settings, servable: ServableModel) -> MemoryPlan:
    """Divide the memory; raises `SettingsError` when what was asked for cannot hold one sequence or one adapter."""
    adapter_dtype = _adapter_dtype(settings, servable.device)
    pages = _plan_adapter_pages(settings, servable.layout, adapter_dtype)
    each = page_nbytes(servable.layout, adapter_dtype)
    block = position_nbytes(servable.attention, servable.dtype) * settings.block_size
    free, total = free_memory(servable.device)
    adapters = sum(each[group] * count for group, count in pages.items())
    budget = _kv_budget(settings, servable.device, free.nbytes, total, adapters)
    most = settings.max_num_seqs * -(-servable.max_model_len // settings.block_size)
    blocks = min(budget.nbytes // block, most) + 1
    length = min(servable.max_model_len, (blocks - 1) * settings.block_size)
    wanted = settings.max_model_len or min(settings.block_size, servable.max_model_len)
    if length < wanted:
        need = -(-wanted // settings.block_size) * block
        raise SettingsError(
            f"{budget.flag}: {size_text(budget.nbytes)} hold {length} tokens, less than one sequence of {wanted}; "
            f"give {size_text(need)} or more, or lower --max-model-len"
        )
    reason = budget.reason
    if blocks - 1 == most:
        reason = f"all that {settings.max_num_seqs} sequences (--max-num-seqs) can fill"
    host = settings.adapter_host_memory_bytes
    if settings.max_cpu_loras is not None:
        host = settings.max_cpu_loras * sum(each.values())
    return MemoryPlan(
        kv_blocks=blocks,
        block_size=settings.block_size,
        block_nbytes=block,
        pages=pages,
        page_nbytes=each,
        adapter_dtype=adapter_dtype,
        host_nbytes=host,
        max_model_len=length,
        kv_reason=reason,
        free=free,
    )


def _plan_adapter_pages(settings: Settings, layout: Layout, dtype: torch.dtype) -> dict[str, int]:
    if settings.max_loras is not None:
        return dict.fromkeys(layout.groups, settings.max_loras)
    try:
        return plan_pages(layout, dtype, settings.adapter_memory_bytes)
    except ValueError as error:
        raise SettingsError(f"--adapter-memory-bytes: {error}") from error


def _adapter_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.adapter_dtype != "auto":
        return torch.float32 if settings.adapter_dtype == "float32" else torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@dataclass(frozen=True, slots=True)
class _Budget:
    """Bytes for the KV cache, why so many, and the flag that says otherwise."""

    nbytes: int
    reason: str
    flag: str = "--kv-cache-memory-bytes"


def _kv_budget(settings: Settings, device: torch.device, free: int, total: int, adapters: int) -> _Budget:
    """`free` and `total` are the device's memory; what `adapters` take comes out of what is free."""
    if settings.kv_cache_memory_bytes is not None:
        return _Budget(settings.kv_cache_memory_bytes, "as asked for")
    share = settings.gpu_memory_utilization
    if device.type == "cuda":
        if share is None:
            left = max(0, int((free - adapters) * _CUDA_KV_SHARE))
            return _Budget(left, f"{_CUDA_KV_SHARE:.0%} of what weights and adapters leave on the GPU")
        left = max(0, int(total * share) - (total - free) - adapters)
        flag = f"--gpu-memory-utilization {share:g}"
        return _Budget(left, f"what is left of {flag} after weights and adapters", flag)
    if share is not None:
        raise SettingsError(
            f"--gpu-memory-utilization {share:g}: the model runs on the CPU; give --kv-cache-memory-bytes instead"
        )
    if free * _CPU_KV_SHARE < _CPU_KV_MOST:
        return _Budget(int(free * _CPU_KV_SHARE), f"{_CPU_KV_SHARE:.0%} of the memory that is free")
    return _Budget(_CPU_KV_MOST, "the most that is taken unasked")


def free_memory(device: torch.device, root: Path = ROOT) -> tuple[Free, int]:
    """What is free of the device's memory, and all of it; on the CPU no more than a container's limit leaves."""
    if device.type == "cuda":
        nbytes, total = torch.cuda.mem_get_info(device)
        return Free(nbytes), total
    try:
        with open(root / "proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
    except OSError:  # no Linux: as much as lets the bound above decide
        return Free(4 * _CPU_KV_MOST), 4 * _CPU_KV_MOST
    available, total = (int(found[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    left = memory_left(root)
    if left is not None and left < available:
        return Free(left, " within the container's limit"), total
    return Free(available), total
