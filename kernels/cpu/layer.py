"""What one call of the compiled library needs to run decoder layers: structures as layer.c has them.

`LayerCalls` are made once, a `StepCall` once per step. Both hold addresses, and beside them what lies there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.cpu.operations import ACTIVATIONS, Activation, Deltas, Kind, PackedWeight, run
from kernels.segments import FlatSegments, Spans

_KINDS: tuple[Kind, ...] = ("nf4", "int8", "bf16", "f32", "bf16_dot")  # in the order of layer.c's products


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


_ADDRESS, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Site(ctypes.Structure):
    _fields_ = [
        *_fields(_ADDRESS, "packed bias"),
        *_fields(_SIZE, "kind in_ out"),
        *_fields(_ADDRESS, "a b scale"),
        *_fields(_SIZE, "bf16 members"),
        ("widths", _ADDRESS),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(_Site, "qkv out gate_up down"),
        *_fields(_ADDRESS, "attention_norm mlp_norm k_cache v_cache"),
        *_fields(_SIZE, "cache_bf16 block_size heads kv_heads width window activation"),
        *_fields(_FLOAT, "attention_epsilon mlp_epsilon scale"),
    ]


class _Segments(ctypes.Structure):
    _fields_ = [
        ("segments", _ADDRESS),
        ("count", _SIZE),
        *_fields(_ADDRESS, "page_ids weights"),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *_fields(_SIZE, "rows attending"),
        *_fields(_ADDRESS, "cos sin kv_index spans"),
        ("span_count", _SIZE),
        ("blocks", _ADDRESS),
        ("segments", _Segments * 4),
        *_fields(_ADDRESS, "normed heads turned attended added both inner"),
    ]


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """Sibling linears' weights, and the pages of their adapters if there are any."""

    weight: PackedWeight
    bias: Tensor | None
    deltas: Deltas | None

    def address(self) -> _Site:
        out, inside = self.weight.shape
        found = _Site(
            packed=self.weight.data.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            kind=_KINDS.index(self.weight.kind),
            in_=inside,
            out=out,
        )
        if self.deltas is not None:
            found.a, found.b, found.scale = self.deltas.addresses
            found.bf16, width, total, found.members, found.widths = self.deltas.shape
            assert (width, total) == (inside, out)
        return found


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Heads of one width, and how they attend."""

    heads: int
    kv_heads: int
    width: int
    window: int | None
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """A layer's weights and caches."""

    held: tuple[object, ...]
    shape: AttentionShape
    inner: int  # columns inside the MLP
    struct: _Layer

    @classmethod
    def of(
        cls,
        sites: Sequence[SiteWeights],  # q k v, o, gate up, down
        # attention's and the MLP's: weight [hidden] and epsilon
        norms: tuple[tuple[Tensor, float], tuple[Tensor, float]],
        caches: tuple[Tensor, Tensor],  # keys and values [positions, kv heads, width]
        block_size: int,
        shape: AttentionShape,
        activation: Activation,
    ) -> LayerCall:
        keys, values = caches
        assert keys.dtype is values.dtype
        assert keys.shape == values.shape
        assert keys.shape[1:] == (shape.kv_heads, shape.width)
        assert sites[0].weight.shape[0] == (shape.heads + 2 * shape.kv_heads) * shape.width
        assert all(tensor.is_contiguous() for tensor in (*caches, *(weight for weight, _ in norms)))
        struct = _Layer(
            *(site.address() for site in sites),
            attention_norm=norms[0][0].data_ptr(),
            mlp_norm=norms[1][0].data_ptr(),
            k_cache=keys.data_ptr(),
            v_cache=values.data_ptr(),
            cache_bf16=keys.dtype is torch.bfloat16,
            block_size=block_size,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            width=shape.width,
            window=shape.window or 0,
            activation=ACTIVATIONS.index(activation),
            attention_epsilon=norms[0][1],
            mlp_epsilon=norms[1][1],
            scale=shape.scale,
        )
        return cls((tuple(sites), norms, caches), shape, sites[3].weight.shape[1], struct)


@dataclass(frozen=True, slots=True, eq=False)
class LayerCalls:
    """Layers that are run one after another."""

    each: tuple[LayerCall, ...]
    addresses: ctypes.Array[ctypes.c_void_p]

    @classmethod
    def of(cls, each: Iterable[LayerCall]) -> LayerCalls:
        held = tuple(each)
        return cls(held, (_ADDRESS * len(held))(*(ctypes.addressof(layer.struct) for layer in held)))


@dataclass(frozen=True, slots=True, eq=False)
class StepCall:
    """A step's rows, and room for what a layer makes of them."""

    held: tuple[object, ...]
    struct: _Step

    @classmethod
    def of(
        cls,
        layer: LayerCall,  # any of those that it is for: they are alike
        hidden: int,
        cos: Tensor,  # [rows, width] float32
        sin: Tensor,  # [rows, width] float32
        kv_index: Tensor,  # [rows] int64
        spans: Spans,
        segments: Sequence[FlatSegments | None],  # of the sites
    ) -> StepCall:
        cos, sin = cos.contiguous(), sin.contiguous()
        rows, shape = len(cos), layer.shape
        assert cos.shape == sin.shape == (rows, shape.width)
        assert cos.dtype is sin.dtype is torch.float32
        assert kv_index.dtype is torch.int64
        turned = (shape.heads + shape.kv_heads) * shape.width
        attended = shape.heads * shape.width
        columns = (
            hidden,
            turned + shape.kv_heads * shape.width,
            turned,
            attended,
            hidden,
            2 * layer.inner,
            layer.inner,
        )
        room = torch.empty(rows * sum(columns))
        places = [room.data_ptr() + 4 * rows * sum(columns[:i]) for i in range(len(columns))]
        flat = spans.flat()
        struct = _Step(
            rows,
            spans.rows,
            cos.data_ptr(),
            sin.data_ptr(),
            kv_index.data_ptr(),
            *flat.addresses,
            (_Segments * 4)(
                *(_Segments() if each is None else _Segments(*each.addresses) for each in segments)
            ),
            *places,
        )
        return cls((cos, sin, kv_index, flat, tuple(segments), room), struct)


def run_layers(
    library: Library,
    layers: LayerCalls,
    step: StepCall,
    x: Tensor,  # [1, rows, hidden] float32
) -> Tensor:  # [1, rows, hidden]
    """`y = x + attention(norm(x))`, then `y += mlp(norm(y))`, of each layer in turn, the step's adapters included."""
    x = x.contiguous()
    assert x.dtype is torch.float32
    y = torch.empty_like(x)
    run(
        library,
        "layers",
        ctypes.addressof(layers.addresses),
        len(layers.each),
        ctypes.addressof(step.struct),
        x.data_ptr(),
        y.data_ptr(),
    )
    return y
