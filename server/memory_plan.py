"""How much memory the KV cache and the adapters get, decided once at start and printed as a plan.

Knows nothing of how the memory is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adapters.adapter import Layout
from adapters.pages import PAGE_RANK, page_nbytes, plan_pages
from kernels.segments import KV_TILE
from server.config import GIB, Settings, SettingsError, size_text
from server.model.kv_cache import position_nbytes
from server.model.servable import ServableModel

_CPU_KV_MOST = 4 * GIB
_CPU_KV_SHARE = 0.25  # of the memory that is free
_CUDA_KV_SHARE = 0.85  # of what the device has left after weights and adapters


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Blocks of the KV cache, pages of the adapter pool, and the longest sequence that fits."""

    kv_blocks: int  # the padding block included
    block_nbytes: int
    pages: dict[str, int]
    page_nbytes: dict[str, int]
    adapter_dtype: torch.dtype
    max_model_len: int

    def lines(self) -> tuple[str, ...]:
        """The plan as a person reads it."""
        pages = next(iter(self.pages.values()))
        adapters = sum(self.page_nbytes[group] * count for group, count in self.pages.items())
        dtype = str(self.adapter_dtype).removeprefix("torch.")
        return (
            f"KV cache    {size_text(self.kv_blocks * self.block_nbytes)} in {self.kv_blocks - 1} blocks, "
            f"sequences of up to {self.max_model_len} tokens",
            f"adapters    {size_text(adapters)} for {pages} pages of rank {PAGE_RANK} in {dtype}",
        )


def plan_memory(settings: Settings, servable: ServableModel) -> MemoryPlan:
    """Divide the memory; raises `SettingsError` when what was asked for cannot hold one sequence or one adapter."""
    _refuse_impossible(settings, servable)
    adapter_dtype = _adapter_dtype(settings, servable.device)
    pages = _plan_adapter_pages(settings, servable.layout, adapter_dtype)
    each = page_nbytes(servable.layout, adapter_dtype)
    block = position_nbytes(servable.attention, servable.dtype) * settings.block_size
    budget = settings.kv_cache_memory_bytes or _kv_budget(
        servable.device, sum(each[g] * n for g, n in pages.items())
    )
    most = settings.max_num_seqs * -(-servable.max_model_len // settings.block_size)
    blocks = min(budget // block, most) + 1
    length = min(servable.max_model_len, (blocks - 1) * settings.block_size)
    wanted = settings.max_model_len or min(settings.block_size, servable.max_model_len)
    if length < wanted:
        need = -(-wanted // settings.block_size) * block
        raise SettingsError(
            f"--kv-cache-memory-bytes: {size_text(budget)} hold {length} tokens, less than one sequence of {wanted}; "
            f"give {size_text(need)} or more, or lower --max-model-len"
        )
    return MemoryPlan(blocks, block, pages, each, adapter_dtype, length)


def _refuse_impossible(settings: Settings, servable: ServableModel) -> None:
    if (settings.max_model_len or 0) > servable.max_model_len:
        raise SettingsError(
            f"--max-model-len {settings.max_model_len}: the model was made for {servable.max_model_len} tokens; "
            "give that or fewer, or leave the flag out"
        )
    if KV_TILE % settings.block_size:
        raise SettingsError(f"--block-size {settings.block_size}: must divide {KV_TILE}, such as 16 or 32")


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


def _kv_budget(device: torch.device, adapters: int) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int((free - adapters) * _CUDA_KV_SHARE)
    return min(_CPU_KV_MOST, int(_free_memory() * _CPU_KV_SHARE))


def _free_memory() -> int:
    """Bytes that can be had without swapping; without /proc, as much as lets the bound above decide."""
    try:
        with open("/proc/meminfo") as lines:
            found = dict(line.split(":") for line in lines)
    except OSError:
        return _CPU_KV_MOST * 4
    return int(found["MemAvailable"].split()[0]) * 1024
