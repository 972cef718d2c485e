"""NF4 products against their twin, with and without adapters' deltas, whatever the tile."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch

from kernels import nf4
from kernels.nf4 import linear
from kernels.nf4_decode import NF4Weight, dequantize
from kernels.tiles import CROSSOVER_ROWS, Tile, tile_for
from kernels.workspace import Workspace
from tests.kernels.naive import relative_error
from tests.triton.nf4_case import DTYPES, ROWS, Adapted, weight_of

SHAPES = {"one block": (16, 64), "odd": (77, 192), "two tiles": (160, 512), "uneven splits": (24, 320)}
TILES = {
    "one pass": Tile(16, 32, 1, 4, 2, "split"),
    "two blocks a turn": Tile(16, 64, 2, 4, 3, "split"),
    "split in 4": Tile(16, 32, 1, 4, 4, "split", splits=4),
    "a page a turn": Tile(16, 32, 1, 4, 2, "split", jobs=1),
    "joined": Tile(64, 32, 1, 4, 3, "join", splits=2),
    "more splits than blocks": Tile(16, 64, 1, 4, 2, "join", splits=8),
}


@pytest.fixture
def workspace():
    held = Workspace(torch.get_default_device())
    yield held
    held.check()


@pytest.mark.parametrize("rows", [1, 21, 40])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_twin(dtype, shape, rows, workspace):
    weight, exact = weight_of(*shape)
    x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    assert relative_error(linear(x, weight, bias, workspace), x.double() @ exact.T + bias) < DTYPES[dtype]


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize(("shape", "rows"), [((77, 320), 5), ((40, 128), 70)], ids=["odd", "tall"])
def test_any_tile_gives_the_product(tile, shape, rows, workspace):
    weight, exact = weight_of(*shape)
    if shape[1] // 64 % tile.blocks:
        tile = replace(tile, blocks=1)
    x, bias = torch.randn(rows, shape[1]), torch.randn(shape[0])
    results = []
    for _ in range(2):  # the second finds the counters where the first left them
        y = x.new_empty(rows, shape[0])
        nf4.launch(y, x, weight, bias, workspace, tile, (0, rows))
        results.append(y)
    assert relative_error(results[0], x.double() @ exact.T + bias) < 1e-6
    assert torch.equal(*results)


def test_many_rows_multiply_by_the_dequantized_weight(workspace):
    weight, exact = weight_of(24, 64)
    x, bias = torch.randn(CROSSOVER_ROWS + 1, 64), torch.randn(24)
    assert relative_error(linear(x, weight, bias, workspace), x.double() @ exact.T + bias) < 1e-6
    assert torch.equal(linear(x, weight, None, workspace), torch.mm(x, dequantize(weight, x.dtype).t()))
    assert nf4.folds(CROSSOVER_ROWS, fixed=False)
    assert not nf4.folds(len(x), fixed=False)
    assert nf4.folds(len(x), fixed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (45, 320)], ids=str)
def test_dequantizes_exactly(shape, dtype):
    weight, exact = weight_of(*shape)
    assert torch.equal(dequantize(weight, dtype), exact.to(torch.float32).to(dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_reads_what_bitsandbytes_wrote(nested, workspace):
    original = torch.randn(96, 192)
    packed, state = bnb.quantize_4bit(original, quant_type="nf4", compress_statistics=nested)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    weight = NF4Weight.of(packed, absmax, (96, 192))
    assert torch.equal(weight.code, state.code)
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(dequantize(weight, torch.float32), theirs)
    x = torch.randn(3, 192)
    assert relative_error(linear(x, weight, None, workspace), x.double() @ theirs.T.double()) < 1e-6


def test_bytes_of_another_shape_are_refused():
    packed, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(ValueError, match="no multiple of 64"):
        NF4Weight.of(packed, absmax, (4, 32))
    with pytest.raises(ValueError, match="given 64 and 2"):
        NF4Weight.of(packed, absmax, (4, 64))
    assert NF4Weight.of(packed.view(torch.bfloat16), absmax, (2, 64)).packed.dtype is torch.uint8


@pytest.mark.parametrize("widths", [(64, 128), (70, 30, 21)], ids=["pure", "straddling"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folds_the_deltas_in(dtype, widths, workspace):
    adapted = Adapted(ROWS, widths, 128, dtype)
    assert relative_error(adapted.ours(workspace), adapted.naive()) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_folds_the_deltas_in_with_any_tile(tile, workspace):
    adapted = Adapted(ROWS, (70, 30, 21), 128, torch.float32)
    got = adapted.ours(workspace, tile=tile)
    assert relative_error(got, adapted.naive()) < 2e-6
    assert torch.equal(got, adapted.ours(workspace, tile=tile)), (
        "something was left for the next launch to find"
    )


def test_makes_v_in_the_same_launch_or_before_it(workspace, monkeypatch):
    """Several chunks of the inputs, and more sums than programs."""
    adapted, tile = Adapted(ROWS, (70, 58), 2112, torch.float32), TILES["split in 4"]
    apart = adapted.ours(workspace, tile=tile, apart=True)
    assert relative_error(apart, adapted.naive()) < 2e-6
    for most in (132, 5):
        monkeypatch.setattr(nf4, "processors", lambda capability, most=most: most)
        assert torch.equal(adapted.ours(workspace, tile=tile), apart)


def test_a_step_of_base_rows_waits_for_nothing(workspace):
    adapted = Adapted([(3, (), ())], (16, 16), 128, torch.float32)
    assert torch.equal(adapted.ours(workspace), linear(adapted.x, adapted.weight, None, workspace))


def test_takes_no_jobs_where_it_dequantizes(workspace):
    adapted = Adapted([(CROSSOVER_ROWS + 1, (3,), (1.0,))], (16,), 64, torch.float32)
    with pytest.raises(AssertionError, match="add_deltas"):
        adapted.ours(workspace)


def test_base_rows_have_the_bits_of_the_base_product(workspace):
    adapted = Adapted(ROWS, (70, 30, 21), 128, torch.bfloat16, fixed=True)
    base = linear(adapted.x, adapted.weight, None, workspace, fixed=True)
    assert torch.equal(adapted.ours(workspace)[3:5], base[3:5])


def test_fixed_rows_have_the_same_bits_in_any_number(workspace):
    """Every sum cancels to nothing but its roundings, which another order of summing would change."""
    block = torch.randint(0, 256, (24, 32), dtype=torch.uint8)
    weight = NF4Weight.of(block.repeat(1, 4), torch.rand(24, 1).repeat(1, 4) + 0.1, (24, 256))
    parts = torch.randint(-40, 41, (CROSSOVER_ROWS + 9, 3, 64)) / 16
    x = torch.cat((parts.flatten(1), -parts.sum(dim=1)), dim=1).bfloat16()
    whole = linear(x, weight, None, workspace, fixed=True)
    assert 0 < whole.abs().max() < 1e-4
    for rows in range(1, 71):
        assert torch.equal(linear(x[:rows], weight, None, workspace, fixed=True), whole[:rows]), rows
    last = linear(x[-9:].contiguous(), weight, None, workspace, fixed=True)
    assert torch.equal(last, whole[-9:])


def test_fixed_rows_with_deltas_have_the_same_bits_alone(workspace):
    adapted = Adapted(ROWS, (70, 58), 512, torch.float32, fixed=True)  # whose bits no rounding hides
    assert tile_for(128, 512, 16, (9, 0)).splits > 1
    whole = adapted.ours(workspace)
    for row in (0, 2, 3, 5, 21, 22, 24, 27):
        assert torch.equal(adapted.ours(workspace, row, row + 1), whole[row : row + 1]), row
    assert torch.equal(adapted.ours(workspace, 7, 25), whole[7:25])
