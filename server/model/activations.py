"""Activations whose result for an element does not depend on where it lies in memory.

torch computes SiLU and GELU with a vector path and a scalar path for what is left over at the end of each thread's
share; the two round differently, so on the CPU a row's bits would depend on how many rows stand beside it and on the
number of threads. The forms here are made of operations whose two paths agree. Knows nothing of which layer uses them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class SteadySiLU(nn.Module):
    """`x / (1 + exp(-x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


class SteadyGELUTanh(nn.Module):
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`."""

    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + torch.tanh(inner))


class SteadyGELU(nn.Module):
    """`x / 2 * (1 + erf(x / sqrt(2)))`."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def install_steady_activations(model: nn.Module) -> None:
    """Replace the activations above wherever the model has them; others stay as they are."""
    steady = {
        type(ACT2FN["silu"]): SteadySiLU,
        nn.SiLU: SteadySiLU,
        type(ACT2FN["gelu_pytorch_tanh"]): SteadyGELUTanh,
        type(ACT2FN["gelu_new"]): SteadyGELUTanh,
        type(ACT2FN["gelu"]): SteadyGELU,
    }
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in steady:
                setattr(parent, name, steady[type(child)]())
