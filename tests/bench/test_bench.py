"""What the benchmarks say of short and absent figures, that everyone has a turn, and a whole run over a tiny shape."""

import json
from collections import Counter
from contextlib import ExitStack

import pytest
import torch

from demo.grammar import ADAPTERS
from kernels.cpu.library import load
from server.model.linear import LoRALinear, ModuleLinear
from tests.bench import int8_quality
from tests.bench.contestants import Ours
from tests.bench.cpu import Bench, Plan, in_turn, int8_reason, popularity
from tests.bench.figures import Figure, Results
from tests.bench.random_llama import Shape, checkpoint

TINY = Shape(layers=2, hidden=128, intermediate=192, heads=4, kv_heads=2, vocabulary=320)


@pytest.mark.parametrize(
    ("value", "want", "line"),
    [
        (1.31, "at least", "figure f 1.31 1.3 ok"),
        (1.29, "at least", "figure f 1.29 1.3 short"),
        (1.29, "at most", "figure f 1.29 1.3 ok"),
        (1.31, "at most", "figure f 1.31 1.3 short"),
    ],
)
def test_a_figure_says_whether_it_is_short(value, want, line):
    assert str(Figure("f", value, 1.3, want)) == line


def test_a_run_fails_when_any_figure_is_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.bench.figures.RESULTS", tmp_path)
    good, short = Figure("a", 2, 1, "at least"), Figure("b", 2, 1, "at most")
    assert Results("x", "make x", 0).close([good]) == 0
    assert Results("x", "make x", 0).close([good, short]) == 1
    ends = ["1 ok, 0 short, 0 unmeasured", "1 ok, 1 short, 0 unmeasured"]
    assert capsys.readouterr().out.splitlines() == [str(good), ends[0], str(good), str(short), ends[1]]
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 3


def test_a_run_that_is_cut_leaves_its_lines_in_both_places(tmp_path, monkeypatch):
    kept, copied = tmp_path / "kept", tmp_path / "copied"
    for folder in (kept, copied):
        folder.mkdir()
    monkeypatch.setattr("tests.bench.figures.RESULTS", kept)
    results = Results("x", "make x", 0, copy=copied)
    for seconds in (1, 2):
        results.add(name="step", seconds=seconds)
        lines = (copied / "x.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["seconds"] == len(lines) == seconds
        assert lines == (kept / "x.jsonl").read_text().splitlines()


def test_what_could_not_be_measured_is_neither_ok_nor_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.bench.figures.RESULTS", tmp_path)
    absent = Figure("c", None, 2.8, "at least", "this CPU has no VNNI")
    assert Results("x", "make x", 0).close([absent]) == 0
    lines = ["figure c - 2.8 unmeasured (this CPU has no VNNI)", "0 ok, 0 short, 1 unmeasured"]
    assert capsys.readouterr().out.splitlines() == lines
    (kept,) = map(json.loads, (tmp_path / "x.jsonl").read_text().splitlines())
    assert (kept["value"], kept["status"]) == (None, "unmeasured")


def test_contestants_take_turns_and_give_medians():
    turns = []
    seconds = {"a": iter((3.0, 1.0, 2.0, 2.0)), "b": iter((9.0, 9.0, 1.0, 9.0)), "slow": iter((7.0, 5.0))}
    rounds = {"a": 4, "b": 4, "slow": 2}

    def measure(name):
        turns.append(name)
        return next(seconds[name])

    measures = {name: lambda name=name: measure(name) for name in rounds}
    assert in_turn(measures, rounds.__getitem__, "") == {"a": 2.0, "b": 9.0, "slow": 6.0}
    assert "".join(name[0] for name in turns) == "abs" + "ab" + "abs" + "ab"


def test_popularity():
    assert popularity("base", 2, 32) == [None, None]
    assert popularity("identical", 3, 32) == [0, 0, 0]
    assert popularity("distinct", 3, 32) == [0, 1, 2]
    drawn = Counter(popularity("zipf", 1000, 32))
    assert drawn[0] > drawn[3] > drawn[20] > 0
    assert set(popularity("zipf", 1000, 4)) == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoint(TINY, tmp_path_factory.mktemp("bench"))


FIGURES = {
    *(
        "decode_fp32_batch1_vs_bitsandbytes",
        "decode_fp32_batch16_vs_bitsandbytes",
        "prefill_fp32_vs_bitsandbytes",
    ),
    *("decode_batch1_vs_memory_floor", "tax_16_distinct", "tax_one_adapter", "http_vs_offline"),
    *("mixed_fp32_batch8_vs_peft", "mixed_fp32_batch16_vs_peft"),
}
INT8 = {
    *("decode_int8_batch16_vs_bitsandbytes", "prefill_int8_vs_bitsandbytes"),
    *("mixed_int8_batch8_vs_peft", "mixed_int8_batch16_vs_peft"),
}


def test_a_run_over_a_tiny_shape_gives_every_figure(made, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.bench.figures.RESULTS", tmp_path)
    monkeypatch.setattr("tests.bench.timing.READ_FLOATS", 10_000)
    with ExitStack() as stack:
        results = Results("cpu", "make bench-cpu", 0)
        bench = Bench(made, tmp_path, Plan(1, 1, 4, 3, 1, 8, (1, 16), 16), results, stack)
        bench.run()
    status = {figure.name: figure.status for figure in bench.figures}
    assert len(status) == len(bench.figures)
    assert status.keys() == FIGURES | INT8
    unmeasured = {name for name, found in status.items() if found == "unmeasured"}
    assert unmeasured == (INT8 if int8_reason() else set())
    lines = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    timed = {(line["name"], *line["case"]) for line in lines if "case" in line}
    assert {
        ("decode", "memory", 1),
        ("decode", "fp32", 1),
        ("decode", "bitsandbytes-float32", 16),
        ("adapters", "zipf", 16),
    } <= timed
    assert all(line["seconds"] > 0 for line in lines if "case" in line)


def test_bitsandbytes_multiplies_in_the_dtype_that_was_chosen(made, tmp_path):
    ours = Ours(made, tmp_path, 0, linear_backend="bitsandbytes")
    ours.multiply_in(torch.bfloat16)
    try:
        assert ours.prefill(5) > 0
        linears = [m for m in ours.engine.runner.model.modules() if isinstance(m, LoRALinear)]
        assert all(isinstance(linear.group.base, ModuleLinear) for linear in linears)
        members = {member.compute_dtype for linear in linears for member in linear.group.base.members}
        assert members == {torch.bfloat16}
        assert ours.engine.runner.model.dtype is torch.float32
    finally:
        ours.close()


def test_int8_quality_is_measured_where_there_are_no_byte_instructions(made, tmp_path, monkeypatch):
    """The portable kernels stand in; what is measured is small, and not nothing."""
    monkeypatch.setattr("tests.bench.figures.RESULTS", tmp_path)
    libraries = load("portable"), load("portable", "int8")
    if None in libraries:
        pytest.skip("the kernels are not built here")
    int8_quality.demo(Results("int8", "test", 0), libraries, turns=4)
    int8_quality.random_shape(Results("int8", "test", 0), libraries, made, tokens=40)
    lines = [json.loads(line) for line in (tmp_path / "int8.jsonl").read_text().splitlines()]
    assert [(line["name"], line["model"]) for line in lines] == [
        *(("demo", name) for name in ("base", *ADAPTERS)),
        *(("random", name) for name in ("base", "adapter")),
    ]
    for line in lines:
        assert 1e-4 < line["logit_error"] < 0.1, line
        assert 0.8 <= line["agreement"] <= 1, line
        assert line["perplexity_int8"] == pytest.approx(line["perplexity_fp32"], rel=0.05)
    for line in lines[1:5]:
        assert line["perplexity_fp32"] < lines[0]["perplexity_fp32"] / 2, "an adapter knows its own texts"


def test_int8_quality_sees_a_difference_and_only_that():
    logits = torch.tensor([[2.0, 0.0, -2.0], [0.0, 1.0, -1.0]])
    same, other = int8_quality.Difference(), int8_quality.Difference()
    same.add(logits, logits, torch.tensor([0, 1]))
    other.add(logits, logits.roll(1, 1), torch.tensor([0, 1]))
    assert (same.line()["agreement"], same.line()["logit_error"]) == (1, 0)
    assert same.line()["perplexity_fp32"] == same.line()["perplexity_int8"]
    assert other.line()["agreement"] == 0
    assert other.line()["perplexity_int8"] > other.line()["perplexity_fp32"]
