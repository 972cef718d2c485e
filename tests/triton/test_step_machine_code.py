"""What the assembler makes of deltas, attention and rows: no spills, no unsafe products, few instructions.

Bounds are what Triton 3.6 gave, and a little.
"""

from dataclasses import dataclass, replace
from typing import Literal

import pytest

from kernels import lora
from kernels.attention import turns
from tests.triton.machine_code import Machine, Request, machine_code

CHIPS = [80, 90]
HEIGHTS = [16, 64]
SMALLEST_SHARED = 99 * 1024  # bytes a program may have on the Ampere and Ada chips that have the least
# rows of a tile, whether programs may share its keys, keys of a part at a fixed place
DECODE, FILLED, PROMPT = (16, True, 0), (16, False, 0), (32, False, 0)
FEW, FIXED = (32, True, 0), (32, True, 256)
ATTENTIONS = [
    (128, DECODE, 80), (128, FILLED, 80), (128, PROMPT, 80), (128, FEW, 80), (256, DECODE, 80), (256, FIXED, 80),
    (64, DECODE, 90), (128, DECODE, 90), (128, FILLED, 90), (128, PROMPT, 90), (128, FEW, 90), (128, FIXED, 90),
    (256, PROMPT, 90),
]  # fmt: skip
FLOAT32_ATTENTIONS = [
    (64, DECODE, 90), (128, PROMPT, 80), (128, PROMPT, 90), (256, DECODE, 90), (256, PROMPT, 80), (256, PROMPT, 90),
    (256, FIXED, 90), (512, PROMPT, 80), (512, FIXED, 90),
]  # fmt: skip


def shrink(height: int, capability: int) -> Request:
    arguments = {
        "x": "*bf16",
        "a": "*bf16",
        "scale": "*fp32",
        "v": "*bf16",
        "plan": "*i32",
        "planes": "*fp32",
    }
    arguments |= {"counters": "*i32", "room": "i32:16", "granules": "i32"}
    arguments |= {"inside": "i32:16", "v_width": "i32:16"}
    constants = {"MEMBERS": 3, "HEIGHT": height, "STEP": lora.STEP, "CHUNK": 1024}
    constants |= {"CHUNKS": 4, "SPLIT": height == 16, "EVEN": True}
    constants |= {"STAGES": lora._STAGES[height], "EARLY": False}
    return Request("kernels.lora:_shrink_kernel", arguments, constants, 4, 3, capability)


def expand(height: int, capability: int) -> Request:
    arguments = {"y": "*bf16", "v": "*bf16", "b": "*bf16", "plan": "*i32"}
    arguments |= {"granules": "i32", "v_width": "i32:16"}
    constants = {"STARTS": [0, 4096, 5120, 6144], "HEIGHT": height}
    constants |= {
        "WIDTH": 128,
        "PURE": True,
        "JOBS": lora._EXPAND_JOBS,
        "STAGES": lora._EXPAND_STAGES,
        "EARLY": False,
    }
    return Request("kernels.lora:_expand_kernel", arguments, constants, 4, 3, capability)


def attention(
    width: int, tile: tuple[int, bool, int], capability: int, dtype: Literal["bf16", "fp32"] = "bf16"
) -> Request:
    height, shared, part = tile
    keys, warps, stages = turns(height, width, width, {"bf16": 2, "fp32": 4}[dtype])
    arguments = dict.fromkeys(("out", "q", "k_cache", "v_cache"), f"*{dtype}")
    arguments |= {"plan": "*i32", "planes": "*fp32", "counters": "*i32", "scale": "fp32", "softcap": "fp32"}
    arguments |= {"q_row": "i32:16", "q_head": "i32:16", "room": "i32"}
    constants = {"sinks": None, "KV_HEADS": 8, "GROUP": 4, "HEADS": 4, "HEIGHT": height}
    constants |= {"QUERIES": 1 if height == 16 else 8, "K_WIDTH": width, "V_WIDTH": width, "K_ROOM": width}
    constants |= {"V_ROOM": width, "BLOCK_SIZE": 16, "KEYS": keys, "PART": part, "SHARED": shared}
    constants |= {"WINDOW": 0, "CAPPED": False, "STAGES": stages, "EARLY": False}
    return Request("kernels.attention:_attention_kernel", arguments, constants, warps, stages, capability)


def norm(capability: int) -> Request:
    arguments = dict.fromkeys(("y", "total", "x", "residual", "weight"), "*bf16") | {"epsilon": "fp32"}
    arguments |= {"rows": "i32", "inner": "i32", "outer_stride": "i32:16", "inner_stride": "i32:16"}
    constants = {"WIDTH": 4096, "ROOM": 4096, "HEIGHT": 1, "EARLY": False}
    return Request("kernels.rows:_rms_norm_kernel", arguments, constants, 4, 3, capability)


def gate(capability: int) -> Request:
    arguments = dict.fromkeys(("y", "x", "up"), "*bf16") | {"x_stride": "i32:16", "up_stride": "i32:16"}
    constants = {"WIDTH": 14336, "ROOM": 1024, "KIND": "silu", "EARLY": False}
    return Request("kernels.rows:_gate_kernel", arguments, constants, 4, 3, capability)


def heads(capability: int, q_heads: int = 32, kv_heads: int = 8) -> Request:
    """Of a rotation and write; without queries of a write alone, without keys of a rotation alone."""
    absent = (() if q_heads else ("y", "q", "cos", "sin")) + (
        () if kv_heads else ("k", "v", "k_cache", "v_cache")
    )
    names = ("y", "q", "k", "v", "k_cache", "v_cache", "cos", "sin")
    arguments = dict.fromkeys((name for name in names if name not in absent), "*bf16")
    arguments |= dict.fromkeys(("q_row", "q_head", "k_row", "k_head", "v_row", "v_head"), "i32:16")
    arguments |= {"kv_index": "*i64"} if kv_heads else {}
    constants = dict.fromkeys((*absent, *(() if kv_heads else ("kv_index",))))
    constants |= {"Q_HEADS": q_heads, "KV_HEADS": kv_heads, "WIDTH": 128, "V_WIDTH": 128}
    constants |= {"HALF_ROOM": 64, "V_ROOM": 128, "EARLY": False}
    return Request("kernels.rows:_heads_kernel", arguments, constants, 1, 3, capability)


@dataclass(frozen=True)
class Compiled:
    requests: dict[tuple[object, ...], Request]
    machines: dict[tuple[object, ...], Machine]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    requests: dict[tuple[object, ...], Request] = {}
    for chip in CHIPS:
        for height in HEIGHTS:
            requests["shrink", height, chip] = shrink(height, chip)
            requests["expand", height, chip] = expand(height, chip)
    for case in ATTENTIONS:
        requests["attention", *case] = attention(*case)
    for case in FLOAT32_ATTENTIONS:
        requests["attention", *case, "fp32"] = attention(*case, "fp32")
    requests["norm", 90], requests["gate", 90], requests["heads", 90] = norm(90), gate(90), heads(90)
    requests["write", 90], requests["rotate", 90] = heads(90, q_heads=0), heads(90, kv_heads=0)
    for name in list(requests):
        if name[-1] == 90:
            constants = requests[name].constants | {"EARLY": True}
            requests["early", *name] = replace(requests[name], constants=constants)
    return Compiled(requests, dict(zip(requests, machine_code(list(requests.values())), strict=True)))


def test_launched_early_they_wait_before_they_touch_memory(compiled):
    early = {name for name in compiled.machines if name[0] == "early"}
    assert {name[1] for name in early} == {
        "shrink",
        "expand",
        "attention",
        "norm",
        "gate",
        "heads",
        "write",
        "rotate",
    }
    for name, machine in compiled.machines.items():
        assert machine.touched_before_waiting == (name not in early), name


def test_nothing_spills_and_no_product_is_unsafe(compiled):
    for name, machine in compiled.machines.items():
        assert machine.spills == 0, name
        assert machine.wgmma_from_registers == 0, name
        assert machine.shared <= SMALLEST_SHARED, name
        high = name[-2:] == (64, 90) and name[-3] in ("shrink", "expand")
        assert (machine.wgmma > 0) == high, name


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("height", HEIGHTS)
def test_factors_are_read_ahead(compiled, height, chip):
    shrinking = compiled.machines["shrink", height, chip].main_loop
    assert shrinking["LDGSTS"] == lora.STEP * (16 + height) * 2 // 16 // 128, (
        "sixteen bytes at a time, and nothing else"
    )
    assert "LDG" not in shrinking
    assert sum(shrinking.values()) <= 152
    jobs = [loop for loop in compiled.machines["expand", height, chip].loops if "LDGSTS" in loop]
    assert len(jobs) == 1
    assert "LDG" not in jobs[0]
    assert sum(jobs[0].values()) / lora._EXPAND_JOBS <= 95


@pytest.mark.parametrize(("width", "tile", "chip"), ATTENTIONS)
def test_keys_and_values_are_read_ahead(compiled, width, tile, chip):
    request = compiled.requests["attention", width, tile, chip]
    loop = compiled.machines["attention", width, tile, chip].main_loop
    keys = request.constants["KEYS"]
    assert loop["LDGSTS"] >= 2 * keys * width * 2 // 16 // (request.warps * 32)
    # of all threads, for a number of a key and its value
    assert sum(loop.values()) * request.warps * 32 / (keys * width) <= {16: 10, 32: 15}[tile[0]]


@pytest.mark.parametrize(("width", "together"), [(64, 3), (128, 2)])
def test_decodes_have_company(compiled, width, together):
    """Several programs on a processor of Hopper, of 128 keys a turn: enough loads in flight."""
    machine = compiled.machines["attention", width, DECODE, 90]
    assert (machine.registers + 7) // 8 * 8 * 128 * together <= 65536
    assert (machine.shared + 1024) * together <= 227 * 1024
