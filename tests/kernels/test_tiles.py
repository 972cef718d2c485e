"""The tile table: every entry is one that Triton takes and that the kernel's sums rely on."""

import re
from pathlib import Path

import pytest

from kernels.tiles import BLOCK, BUCKETS, CROSSOVER_ROWS, FIXED_ROWS, bucket, tile_for

# (out, in) of Llama-3.1-8B, Llama-3.1-70B, Qwen2.5-7B and -0.5B: q, k and v joined, o, gate and up joined, down
SHAPES = [
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
    (4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944),
    (1152, 896), (896, 896), (9728, 896), (896, 4864), (77, 64),
]  # fmt: skip
CHIPS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)]
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227}  # KB that one program may take


@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_entry_is_one_that_triton_takes(shape, chip):
    out, width = shape
    for rows in (1, 16, 17, 32, 33, 64, 65, 128, CROSSOVER_ROWS):
        tile = tile_for(out, width, rows, chip)
        for size in (tile.rows, tile.columns, tile.blocks, tile.warps, tile.splits):
            assert size > 0
            assert size & (size - 1) == 0, "not a power of two"
        assert tile.rows >= 16, "less than a tensor core multiplies"
        assert tile.rows >= min(rows, BUCKETS[-1])
        blocks = width // BLOCK
        assert blocks % tile.blocks == 0, "a turn would read past a row"
        assert tile.splits * tile.blocks <= blocks, "a split without work"
        turn = tile.blocks * (tile.columns * 32 + tile.columns * 4 + tile.rows * BLOCK * 2)
        assert turn * tile.stages <= SHARED[chip] * 1024
        if chip[0] >= 9 and tile.rows >= 64:
            assert tile.order == "join", "a left operand in registers is unsafe on this chip"


def test_rows_of_a_bucket_share_their_tile():
    assert [bucket(rows) for rows in (1, 16, 17, 32, 33, 64, 65, 5000)] == [16, 16, 32, 32, 64, 64, 64, 64]
    for shape in SHAPES:
        assert tile_for(*shape, 17, (9, 0)) == tile_for(*shape, 32, (9, 0))
    assert FIXED_ROWS in BUCKETS
    assert CROSSOVER_ROWS % BUCKETS[-1] == 0


def test_decoding_keeps_every_processor_loading():
    for shape in SHAPES[:8]:
        for rows in BUCKETS:
            tile = tile_for(*shape, rows, (9, 0))
            programs = -(-shape[0] // tile.columns) * tile.splits
            assert programs >= tile.plenty * 132
            assert tile.splits == 1 or programs / 2 < tile.plenty * 132, "more sums to add up than needed"


def test_an_unknown_chip_of_a_known_kind_has_tiles():
    assert tile_for(4096, 4096, 16, (8, 7)).splits == tile_for(4096, 4096, 16, (8, 0)).splits


def test_the_table_in_the_docs_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| [\w, ]+ \| (\d+) x (\d+) \| sm_(\d)(\d) \| ([\d |]+) \|$", text, re.MULTILINE)
    assert len(found) == 8
    for out, width, major, minor, splits in found:
        chip = (int(major), int(minor))
        ours = [tile_for(int(out), int(width), rows, chip).splits for rows in (16, 32, 64, 128, 256)]
        assert [int(each) for each in splits.split("|")] == ours, (out, width, chip)
