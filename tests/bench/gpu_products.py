"""The base's products and the deltas alone, in CUDA graphs over more weights than caches hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.plans import AttentionPlan, AttentionSize, DeltaPlan
from kernels.segments import Segment, Spans
from kernels.workspace import Workspace
from server.model.context import ForwardContext, StepPlans, forward_context
from server.model.cuda import TritonLinear
from tests.bench.gpu_model import Engine, nf4_linear
from tests.bench.gpu_timing import captured, copies_of, rotating
from tests.bench.random_llama import Shape

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Product:
    """One of a layer: siblings joined, `members` their widths."""

    name: str
    width: int
    members: tuple[int, ...]

    @property
    def out(self) -> int:
        return sum(self.members)


def products(shape: Shape) -> list[Product]:
    """Those of a layer."""
    groups = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    }
    widths = shape.widths
    return [
        Product(name, widths[members[0]][0], tuple(widths[member][1] for member in members))
        for name, members in groups.items()
    ]


def joined_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(in, out) of the products of a layer."""
    return {product.name: (product.width, product.out) for product in products(shape)}


@torch.inference_mode()
def product_seconds(
    shape: Shape, rows: tuple[int, ...], device: torch.device, *, fixed: bool = False, others: bool = True
) -> dict[tuple[str, str, int], float]:
    """(contender, product, rows) to seconds of one product."""
    found = {}
    for name, (inside, out) in joined_shapes(shape).items():
        copies = copies_of(inside * out // 2) if device.type == "cuda" else 1
        modules = [nf4_linear(inside, out, device) for _ in range(copies)]
        workspace = Workspace(device)
        ours = [TritonLinear.of(workspace, fixed, [module], torch.bfloat16) for module in modules]
        contenders: dict[str, list[Callable[[Tensor], Tensor]]] = {"ours": list(ours)}
        if others:
            dense = [torch.randn(out, inside, device=device).bfloat16() for _ in range(max(2, copies // 4))]
            contenders["bitsandbytes"] = list(modules)
            contenders["cublas"] = [partial(torch.nn.functional.linear, weight=weight) for weight in dense]
        for count in rows:
            x = torch.randn(count, inside, device=device).bfloat16()
            for who, kinds in contenders.items():
                walk = rotating(lambda copy, kinds=kinds, x=x: kinds[copy](x), len(kinds))  # type: ignore[misc]
                found[who, name, count] = captured(walk, device) / len(kinds)
    return found


def all_layers(seconds: Mapping[tuple[str, str, int], float], who: str, rows: int, layers: int) -> float:
    """Seconds of the products of all layers."""
    return layers * sum(value for (name, _, count), value in seconds.items() if (name, count) == (who, rows))


class Linears:
    """All adapted linears of an engine's first layers, called as a step calls them, without what is between."""

    def __init__(self, engine: Engine, layers: int) -> None:
        per_layer = len(engine.servable.layout.groups)
        self.engine = engine
        self.layers = layers
        self.groups = engine.servable.groups[: per_layer * layers]
        self.device = engine.servable.device

    @torch.inference_mode()
    def seconds(self, rows: int, distinct: int, *, fixed: bool = False) -> float:
        """Of one pass with so many adapters spread evenly over the rows; 0 is a step without any."""
        plan = plan_of(rows, distinct, self.device, fixed) if distinct else None
        deltas = {} if plan is None else dict.fromkeys(self.engine.servable.layout.groups, plan)
        plans = StepPlans(_no_attention(self.device), deltas)
        context = ForwardContext(
            kv_index=torch.zeros(rows, dtype=torch.int64, device=self.device),
            spans=Spans((), 16, self.device),
            segments={},
            kv_caches=(),
            kernels=self.engine.servable.kernels,
            plans=plans,
        )
        inputs = {
            width: torch.randn(rows, width, device=self.device).to(self.engine.servable.dtype)
            for width in {group.site.in_features for group in self.groups}
        }

        def work() -> None:
            with forward_context(context):
                for group in self.groups:
                    x = inputs[group.site.in_features]
                    for member in range(len(group.widths)):
                        group.output(x, member)

        return captured(work, self.device)


def plan_of(rows: int, distinct: int, device: torch.device, fixed: bool) -> DeltaPlan:
    """So many adapters of a page each, spread evenly over the rows."""
    edges = np.linspace(0, rows, distinct + 1).astype(int).tolist()
    segments = [Segment(edges[i], edges[i + 1], (i,), (1.0,)) for i in range(distinct)]
    host = np.zeros(DeltaPlan.sizes(rows, 1), np.int32)
    DeltaPlan.fill(host, segments, rows, fixed=fixed)
    return DeltaPlan.view(torch.from_numpy(host).to(device), rows, 1, fixed=fixed)


def _no_attention(device: torch.device) -> AttentionPlan:
    none = torch.zeros(1, dtype=torch.int32, device=device)
    return AttentionPlan.view(none, 0, 1, 0, 16, AttentionSize(0, 0, 0))
