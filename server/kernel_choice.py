"""Which kernels compute for a device, as asked for or as can be had; what cannot be had is refused, or said.

Knows nothing of what they are used for.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from kernels.cpu.library import load as load_library
from server.config import Settings, SettingsError
from server.model.kernel_set import Kernels, compiled, plain
from server.model.load import experts_of

logger = logging.getLogger(__name__)

_TRITON_NEEDS = "(it compiles C when it runs: install gcc and Python's headers, python3-dev on Debian)"


def choose_kernels(settings: Settings, device: torch.device) -> Kernels:
    """The device's own kernels; their absence is said once, and plain PyTorch serves.

    With `--linear-backend bitsandbytes` they do all but the products of quantized weights. Raises `SettingsError`
    where `--cpu-math int8` cannot be had: it is never exchanged for something else.
    """
    if settings.cpu_math == "int8" and not (
        device.type == "cpu" and settings.linear_backend == "exact" and settings.quantization == "nf4"
    ):
        raise SettingsError(
            "--cpu-math int8 cannot be served: it is for NF4 weights on the CPU's own kernels"
        )
    if settings.batch_invariant and settings.linear_backend == "bitsandbytes":
        raise SettingsError(
            "--batch-invariant cannot be had with --linear-backend bitsandbytes: its products depend on the batch"
        )
    return _cuda_kernels(settings, device) if device.type == "cuda" else _cpu_kernels(settings)


def refuse_varying_products(settings: Settings, kernels: Kernels, model: PreTrainedModel) -> None:
    """Raise `SettingsError` where a GPU's batch-invariant kernels would not have all of the model's products."""
    if settings.batch_invariant and kernels.planned and (experts := experts_of(model)):
        raise SettingsError(
            f"--batch-invariant cannot be had on a GPU with {type(model).__name__}: how its experts' products "
            f"({experts[0]} and {len(experts) - 1} more) are summed depends on the rows of each expert"
        )


def _cuda_kernels(settings: Settings, device: torch.device) -> Kernels:
    """Triton's; with `--linear-backend bitsandbytes` for all but the products with quantized weights."""
    try:
        from kernels.portable import check_launches

        check_launches()
    except Exception as error:  # no Triton, or whatever it misses: it compiles at run time
        why = str(error) if isinstance(error, ImportError) else f"{error} {_TRITON_NEEDS}"
        if settings.batch_invariant:
            raise SettingsError(f"--batch-invariant cannot be had on a GPU without Triton: {why}") from error
        logger.warning("no Triton kernels, so plain PyTorch serves, much slower: %s", why)
        return plain()
    from server.model.cuda import cuda_kernels

    return cuda_kernels(device, fixed=settings.batch_invariant)


def _cpu_kernels(settings: Settings) -> Kernels:
    try:
        library = load_library(math=settings.cpu_math)
    except ValueError as error:
        raise SettingsError(f"--cpu-math int8 cannot be served: {error}; leave it at fp32") from error
    if library is None and settings.cpu_math == "int8":
        raise SettingsError(
            "--cpu-math int8 cannot be served: the kernels were not compiled; install with a C compiler to have them"
        )
    if library is None:
        logger.warning(
            "no compiled CPU kernels, so plain PyTorch serves; install with a C compiler to have them"
        )
        return plain()
    return compiled(library)
