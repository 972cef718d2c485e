"""The GPU's benchmark from its first line to its last, on tiny shapes under the interpreter: it must not rot unseen."""

import torch

from tests.bench import gpu, gpu_delta_tiles
from tests.bench.gpu_model import TINY


def test_a_dry_run_goes_through_every_part(capsys):
    """Its numbers mean nothing, so that figures are short; but every part runs and every figure is there."""
    assert gpu.main(["--dry-run"]) == 1
    lines = capsys.readouterr().out.splitlines()
    figures = {line.split()[1]: line.split()[2] for line in lines if line.startswith("figure ")}
    assert not [name for name in figures if name.endswith("_ran")], "a part failed"
    assert {name.rstrip("0123456789") for name in figures} >= {
        "linears_rows_1_to_16_vs_floor",
        "linears_rows_1_to_16_vs_cublas",
        "linears_rows_1_vs_bitsandbytes",
        "deltas_unused_vs_none",
        "decode_2_distinct_vs_floor",
        "decode_2_distinct_vs_bitsandbytes_loop",
        "decode_2_distinct_vs_peft",
        "upload_moves_p99_itl_by",
        "upload_tokens_timed",
    }
    assert all(float(value) == float(value) for value in figures.values()), "a figure is no number"
    assert any(line.startswith("batch-invariant: ") for line in lines)


def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_products_with_adapters_are_timed_for_every_tile(monkeypatch):
    every = gpu_delta_tiles.candidates
    monkeypatch.setattr(gpu_delta_tiles, "candidates", lambda *given: every(*given)[:3])
    found = list(gpu_delta_tiles.timed(TINY, 2, (0, 2), torch.device("cpu")))
    assert len(found) == 4 * 3 * 2
    assert len({tile for _, tile, _, _ in found}) > 3
    assert all(seconds > 0 for *_, seconds in found)
