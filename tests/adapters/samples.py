"""A small base's layout, and adapters for it, in memory and as files."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.adapter import Adapter, Delta, Layout, Member, Site
from adapters.errors import AdapterError

HIDDEN, KV, INNER, LAYERS = 16, 8, 24, 2
QKV, OUT, GATE_UP, DOWN = (
    "self_attn.q_proj+k_proj+v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj+up_proj",
    "mlp.down_proj",
)


def make_layout(layers: int = LAYERS, home: str = "model.") -> Layout:
    sites: list[Site] = []
    for layer in range(layers):
        at = f"{home}layers.{layer}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        qkv = (
            Member(f"{attention}.q_proj", HIDDEN),
            Member(f"{attention}.k_proj", KV),
            Member(f"{attention}.v_proj", KV),
        )
        gate_up = (Member(f"{mlp}.gate_proj", INNER), Member(f"{mlp}.up_proj", INNER))
        sites += [
            Site(QKV, HIDDEN, qkv),
            Site(OUT, HIDDEN, (Member(f"{attention}.o_proj", HIDDEN),)),
            Site(GATE_UP, HIDDEN, gate_up),
            Site(DOWN, INNER, (Member(f"{mlp}.down_proj", HIDDEN),)),
        ]
    return Layout(tuple(sites))


def shapes(layout: Layout, module: str) -> tuple[int, int]:
    """(in, out) of a module."""
    site, member = layout.modules[module]
    return layout.sites[site].in_features, layout.sites[site].members[member].out_features


def make_adapter(layout: Layout, generation: str, ranks: Mapping[str, int], seed: int = 0) -> Adapter:
    """Random deltas on the modules that end with one of the keys of `ranks`."""
    generator = torch.Generator().manual_seed(seed)
    deltas: list[Delta] = []
    for module, (site, member) in layout.modules.items():
        rank = next((rank for tail, rank in ranks.items() if module.endswith(tail)), 0)
        if rank:
            inside, outside = shapes(layout, module)
            a = torch.randn(rank, inside, generator=generator)
            b = torch.randn(rank, outside, generator=generator)
            deltas.append(Delta(site, member, a, b, 0.25 + len(deltas)))
    return Adapter(generation, tuple(deltas))


def make_tensors(
    modules: Iterable[str] = ("q_proj", "v_proj"), rank: int = 4, seed: int = 0, layout: Layout | None = None
) -> dict[str, Tensor]:
    """What peft saves: `base_model.model.<module>.lora_A.weight` and its B."""
    layout = layout or make_layout()
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for module in layout.modules:
        if module.endswith(tuple(modules)):
            inside, outside = shapes(layout, module)
            found[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inside, generator=generator)
            found[f"base_model.model.{module}.lora_B.weight"] = torch.randn(
                outside, rank, generator=generator
            )
    return found


def make_config(**settings: object) -> dict[str, object]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "some/base", **settings}


def write_folder(folder: Path, config: object = None, tensors: Mapping[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(make_config() if config is None else config))
    save_file(dict(make_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder


def write_zip(path: Path, entries: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def adapter_files(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }


def problems(error: AdapterError) -> str:
    """Everything a client is told."""
    return str(error)
