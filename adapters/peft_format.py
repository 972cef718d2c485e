"""A stored peft folder becomes an `Adapter`: pairs its tensors, checks them against a layout, and reads them.

Knows nothing of archives, of names or of devices. `inspect_adapter` looks at the config and the header alone;
`read_adapter` and `scan_adapter` look at every value too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adapters.adapter import Adapter, Delta, Layout
from adapters.errors import AdapterError, Finding
from adapters.findings import Findings
from adapters.peft_config import CONFIG_BYTES, CONFIG_FILE, PeftConfig, parse_config
from adapters.peft_header import TENSOR_FILE, Placed, place
from adapters.tensor_file import DTYPES, Header, TensorFile, open_tensors

Keep = Callable[[Tensor, torch.dtype], Tensor]  # what becomes of a tensor of the mapped file

LARGEST = 65504.0  # float16's largest number: a trained weight is nowhere near it


@dataclass(frozen=True, slots=True)
class Outline:
    """An adapter and its base's name, as its config has it."""

    adapter: Adapter
    base_model: str


def inspect_adapter(
    folder: Path, generation: str, layout: Layout, dtype: torch.dtype, max_rank: int, keep: Keep
) -> Outline:
    """Check config, names and shapes; cheap, and blind to the values: tensors are on the meta device."""
    findings = Findings()
    config, _, placed = _examine(folder, layout, max_rank, findings)
    findings.raise_if_any("the adapter")
    deltas = tuple(
        Delta(
            item.site,
            item.member,
            keep(_weightless(item.pair.a), dtype),
            keep(_weightless(item.pair.b).t(), dtype),
            _scale(config, item),
        )
        for item in placed
    )
    return Outline(Adapter(generation, deltas), config.base_model if config else "")


def _weightless(header: Header) -> Tensor:
    """The tensor without its values."""
    return torch.empty(header.shape, dtype=DTYPES[header.dtype], device="meta")


def copied(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of its own, of the type that the device wants: copied on from there without a detour."""
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)


def mapped(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The file's own pages, as they are: the system's cache is the host memory, and can take it back.

    A mapping needs no descriptor, and outlives the file's name; it goes with its last tensor.
    """
    return values


def read_adapter(
    folder: Path, generation: str, layout: Layout, dtype: torch.dtype, max_rank: int, keep: Keep = copied
) -> Adapter:
    """Check everything, to the last value, and keep the weights."""
    return scan_adapter(folder, generation, layout, dtype, max_rank, keep).adapter


def scan_adapter(
    folder: Path, generation: str, layout: Layout, dtype: torch.dtype, max_rank: int, keep: Keep
) -> Outline:
    """`read_adapter`, with what else is known by then."""
    findings = Findings()
    config, file, placed = _examine(folder, layout, max_rank, findings)
    deltas: list[Delta] = []
    effective = False
    if file and placed:
        for item in placed:
            a, b = file.tensor(item.pair.a), file.tensor(item.pair.b)
            peaks = _peak(a, item.pair.a.name, findings), _peak(b, item.pair.b.name, findings)
            scale = _scale(config, item)
            effective = effective or (min(peaks) > 0 and scale != 0)
            deltas.append(Delta(item.site, item.member, keep(a, dtype), keep(b.t(), dtype), scale))
        if not effective and not findings:
            problem = "every delta is zero: a fresh adapter with B = 0 changes nothing"
            findings.invalid("zero", Finding(TENSOR_FILE, problem, "train it, then send it again"))
    findings.raise_if_any("the adapter")
    return Outline(Adapter(generation, tuple(deltas)), config.base_model if config else "")


def _examine(
    folder: Path, layout: Layout, max_rank: int, findings: Findings
) -> tuple[PeftConfig | None, TensorFile | None, list[Placed]]:
    """Everything that can be said without a tensor's values."""
    config = _read_config(folder / CONFIG_FILE, findings)
    try:
        file = open_tensors(folder / TENSOR_FILE)
    except AdapterError as error:
        findings.include(error)
        return config, None, []
    except OSError as error:
        findings.invalid("file", Finding(TENSOR_FILE, f"cannot be read: {error.strerror or error}"))
        return config, None, []
    return config, file, place(file.headers, config, layout, max_rank, findings)


def _read_config(path: Path, findings: Findings) -> PeftConfig | None:
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        findings.invalid("file", Finding(path.name, f"cannot be read: {error.strerror or error}"))
        return None
    if len(data) > CONFIG_BYTES:
        findings.invalid("file", Finding(path.name, f"has more than {CONFIG_BYTES} bytes"))
        return None
    return parse_config(data, findings)


def _scale(config: PeftConfig | None, item: Placed) -> float:
    """What the config makes of the module's alpha; without a config there is a finding, and no adapter."""
    return config.scale(item.trained) if config and item.trained else 0.0


def _peak(values: Tensor, name: str, findings: Findings) -> float:
    """The largest magnitude; NaN, infinity and absurd sizes are findings."""
    low, high = (float(bound) for bound in torch.aminmax(values))
    peak = max(-low, high)
    if low != low or high != high:
        findings.invalid("nan", Finding(name, "holds NaN", "send a checkpoint from before it diverged"))
    elif peak == float("inf"):
        findings.invalid("inf", Finding(name, "holds infinity", "send a checkpoint from before it diverged"))
    elif peak > LARGEST:
        problem = f"holds {peak:.3g}, and no trained weight is above {LARGEST:g}"
        findings.invalid("large", Finding(name, problem, "send a checkpoint from before it diverged"))
    return peak
