"""What the assembler makes of every kernel for sm_80 and sm_90: no spills, no unsafe products, few instructions.

Bounds are what Triton 3.6 gave, and a little. A kernel that goes over one has lost its layout, not just some time.
"""

from dataclasses import dataclass, replace

import pytest

from kernels import lora
from kernels.lookup import CONSTRAINTS, assembly
from kernels.tiles import BUCKETS, Tile, tile_for
from tests.triton.machine_code import Machine, Request, machine_code

CHIPS = [80, 90]
TILES = [(capability, rows) for capability in CHIPS for rows in BUCKETS]
MOST_PER_WEIGHT = {  # instructions of the main loop, all threads'; the prototype's were 4.7, 5.8 and 5.7 on sm_90
    (80, 16): 4.1, (80, 32): 5.0, (80, 64): 7.0,
    (90, 16): 4.8, (90, 32): 5.9, (90, 64): 6.8,
}  # fmt: skip
MOST_BY_LOOKUP = {"permute": 5.1, "shuffle": 4.0}  # at 16 rows on sm_90, whose tile takes "mixed"
MOST_PER_JOB = {  # instructions of a job, four of which are a turn of their loop; the prototype's were 66, at 16 rows
    (80, 16): 66, (80, 32): 73, (80, 64): 88,
    (90, 16): 41, (90, 32): 49, (90, 64): 67,
}  # fmt: skip
MOST_OF_SHRINK = 95  # of a turn of its loop, 128 inputs of a page by two warps


@dataclass(frozen=True)
class Compiled:
    requests: dict[str, Request]
    machines: dict[str, Machine]


def tile_of(capability: int, rows: int) -> Tile:
    return tile_for(6144, 4096, rows, (capability // 10, capability % 10))


def linear(tile: Tile, capability: int, half: str, *, near: bool = False, early: bool = False) -> Request:
    """With bias, splits and jobs: all that it can hold at once."""
    pointers = dict.fromkeys(
        ("y", "x", "bias", "a", "v", "b"), {"bfloat16": "*bf16", "float16": "*fp16"}[half]
    )
    pointers |= dict.fromkeys(("absmax_t", "code", "scale", "planes"), "*fp32")
    pointers |= {"packed": "*u8", "plan": "*i32", "counters": "*i32"}
    numbers = {"first": "i32", "end": "i32", "out": "i32:16", "row_bytes": "i32:16"}
    numbers |= {"programs": "i32", "granules": "i32", "hidden": "i32:16", "plan_rows": "i32"}
    constants = {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCKS": tile.blocks,
        "SPLITS": tile.splits,
        "STAGES": tile.stages,
        "JOBS": tile.jobs,
        "ORDER": tile.order,
        "ASSEMBLY": assembly(tile.lookup, half),
        "CONSTRAINTS": CONSTRAINTS,
        "LANES": tile.splits,
        "STARTS": [0, 4096, 5120, 6144],
        "PURE": True,
        "ROW_TILES": 1,
        "COLUMN_TILES": -(-6144 // tile.columns),
        "CHUNK": lora.CHUNK,
        "CHUNKS": 4,
        "STEP": lora.STEP,
        "EVEN": True,
        "NEAR": near,
        "EARLY": early,
    }
    return Request("kernels.nf4:_linear_kernel", pointers | numbers, constants, tile.warps, 3, capability)


def dequantize(capability: int) -> Request:
    pointers = {"packed": "*u8", "absmax_t": "*fp32", "code": "*fp32", "dense": "*bf16"}
    numbers = {"out": "i32:16", "row_bytes": "i32:16"}
    constants = {"ROWS": 32, "BLOCKS": 4}
    return Request("kernels.nf4_decode:_dequantize_kernel", pointers | numbers, constants, 4, 3, capability)


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    requests = {}
    for capability in CHIPS:
        requests[f"dequantize {capability}"] = dequantize(capability)
        for rows in BUCKETS:
            requests[f"linear {capability} {rows}"] = linear(
                tile_of(capability, rows), capability, "bfloat16"
            )
    requests["half"] = linear(tile_of(80, 16), 80, "float16")
    requests["early"] = linear(tile_of(90, 16), 90, "bfloat16", early=True)
    requests["near"] = linear(tile_of(90, 16), 90, "bfloat16", near=True)
    for lookup in MOST_BY_LOOKUP:
        requests[lookup] = linear(replace(tile_of(90, 16), lookup=lookup), 90, "bfloat16")
    return Compiled(requests, dict(zip(requests, machine_code(list(requests.values())), strict=True)))


def test_nothing_spills_and_no_product_is_unsafe(compiled):
    for name, machine in compiled.machines.items():
        assert machine.spills == 0, name
        assert machine.wgmma_from_registers == 0, name


def per_weight(machine: Machine, tile: Tile) -> float:
    weights = tile.columns * tile.blocks * 64 / (tile.warps * 32)  # of one thread, in a turn of the loop
    return sum(machine.main_loop.values()) / weights


@pytest.mark.parametrize(("capability", "rows"), TILES)
def test_instructions_per_weight(compiled, capability, rows):
    machine = compiled.machines[f"linear {capability} {rows}"]
    assert per_weight(machine, tile_of(capability, rows)) <= MOST_PER_WEIGHT[capability, rows]


def test_launched_early_it_waits_before_it_touches_memory(compiled):
    assert not compiled.machines["early"].touched_before_waiting
    assert compiled.machines["linear 90 16"].touched_before_waiting, "it never waits"


def test_few_rows_can_go_through_the_first_cache(compiled):
    one, many = compiled.machines["near"], compiled.machines["linear 90 16"]
    assert one.main_loop["LDGSTS"] == many.main_loop["LDGSTS"] + 2 * 2, "eight bytes at a time, of two blocks"
    assert per_weight(one, tile_of(90, 16)) <= MOST_PER_WEIGHT[90, 16]


def test_other_look_ups_stay_possible(compiled):
    for lookup, most in MOST_BY_LOOKUP.items():
        assert per_weight(compiled.machines[lookup], tile_of(90, 16)) <= most


@pytest.mark.parametrize(("capability", "rows"), TILES)
def test_weights_are_read_ahead_and_looked_up_in_registers(compiled, capability, rows):
    tile, machine = tile_of(capability, rows), compiled.machines[f"linear {capability} {rows}"]
    assert machine.main_loop["LDGSTS"] >= 3 * tile.blocks, (
        "codes, absmax and x go to shared memory by themselves"
    )
    assert "LDG" not in machine.main_loop
    shuffled = {"shuffle": 1, "mixed": 2}[tile.lookup]  # every weight, or one of two
    assert machine.main_loop["SHFL"] == tile.columns * tile.blocks * 64 // (tile.warps * 32 * shuffled)
    assert (machine.wgmma > 0) == (capability == 90 and rows == 64)


@pytest.mark.parametrize(("capability", "rows"), TILES)
def test_a_job_costs_little(compiled, capability, rows):
    machine = compiled.machines[f"linear {capability} {rows}"]
    shuffling = [loop for loop in machine.loops if "SHFL" in loop]
    shrinking, jobs = (
        loop for loop in machine.loops if {"HMMA", "HGMMA"} & loop.keys() and "SHFL" not in loop
    )
    assert len(shuffling) == 1
    assert sum(jobs.values()) / tile_of(capability, rows).jobs <= MOST_PER_JOB[capability, rows]
    assert sum(shrinking.values()) <= MOST_OF_SHRINK


def test_programs_fit_beside_each_other(compiled):
    """As many on a processor of Hopper as the table counts on."""
    for rows in BUCKETS:
        tile, machine = tile_of(90, rows), compiled.machines[f"linear 90 {rows}"]
        assert (machine.registers + 7) // 8 * 8 * 32 * tile.warps * tile.plenty <= 65536
        assert (machine.shared + 1024) * tile.plenty <= 227 * 1024


def test_dequantizing_is_short(compiled):
    for capability in CHIPS:
        loop = compiled.machines[f"dequantize {capability}"].main_loop
        assert sum(loop.values()) <= 12 * 32 * 64 / 128
