"""docs/performance.md holds the newest complete runs, and what was not measured is said in words."""

import json
from pathlib import Path

import pytest

report = pytest.importorskip("tests.bench.report", reason="matplotlib is not here: the bench extra has it")

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
RUN = {"commit": "abc", "machine": "cpu x2", "command": "make bench-cpu", "seed": 0}
TIMED = {"name": "decode", "case": ["fp32", 16], "seconds": 0.1}
QUALITY = {
    "tokens": 9,
    "perplexity_fp32": 2.0,
    "perplexity_int8": 2.01,
    "agreement": 0.99,
    "logit_error": 0.0123,
}


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """Keeps lines as a run's."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path)

    def keep(file, run, *lines):
        with (tmp_path / f"{file}.jsonl").open("a") as kept:
            kept.writelines(json.dumps({**RUN, "run": run, **line}) + "\n" for line in lines)

    return keep


def figure(value, why=None):
    status = "unmeasured" if value is None else "ok"
    return {"name": "f", "value": value, "bound": 1.3, "status": status, "why": why}


def test_the_newest_run_that_came_to_its_end(keep, tmp_path):
    keep("cpu", "one", TIMED, figure(5.5))
    keep("cpu", "two", TIMED | {"seconds": 0.2}, figure(6.5))
    keep("cpu", "cut", TIMED | {"seconds": 0.4})
    page = report.rewritten(PAGE.read_text())
    assert "two, seed 0" in page
    assert "| fp32 | 80.0 |" in page
    assert "| `f` | 1.3 | 6.5 |" in page
    assert (tmp_path / "performance-cpu.svg").exists()


def test_the_picture_has_a_contestant_with_and_without_adapters(keep, tmp_path):
    keep("cpu", "one", TIMED | {"case": ["fp32", 1]}, TIMED | {"name": "mixed"}, figure(5.5))
    report.rewritten(PAGE.read_text())
    drawn = (tmp_path / "performance-cpu.svg").read_text()
    assert "<!-- fp32 -->" in drawn
    assert "<!-- fp32, own adapters -->" in drawn


def test_a_column_for_each_machine(keep):
    old, new = {"machine": "old x2"}, {"machine": "new x2"}
    short = figure(1.2) | {"status": "short"}
    keep("cpu", "one", figure(9) | old)
    keep("cpu", "two", short | old, figure(None, "this CPU has no VNNI") | old | {"name": "g"})
    keep("cpu", "three", TIMED | new, figure(5) | new | {"bound": 1.4}, figure(2) | new | {"name": "g"})
    page = report.rewritten(PAGE.read_text())
    assert "| figure | bound | new x2 | old x2 |" in page
    assert "| `f` | 1.4 | 5 | **1.2 of 1.3** |" in page
    assert "| `g` | 1.3 | 2 | this CPU has no VNNI |" in page


def test_a_gpu_by_the_newest_that_was_said_of_each_thing(keep):
    card = [{"name": "gpu", "gpu": "NVIDIA H200"}, {"name": "bandwidth", "gb_per_s": 4000}]
    step = {"name": "decode", "case": ["base", 32], "seconds": 0.004, "floor_seconds": 0.002}
    product = {"name": "linears", "case": ["ours", 16], "seconds": 0.003}
    keep(
        "h200-bench", "one", *card, product, step | {"seconds": 0.009}, figure(9) | {"name": "g"}, figure(5.5)
    )
    kernel = {"name": "kernel", "case": ["base", "_linear"], "seconds": 0.002}
    keep("h200-bench", "two", *card, kernel, step | {"commit": "def"}, figure(6.5) | {"commit": "def"})
    keep("h200-bench", "cut", step | {"seconds": 0.001})
    page = report.rewritten(PAGE.read_text())
    listed = page.count("- From `make bench-cpu` at commit")
    assert listed == 3, "the first run, and the second at both commits"
    assert "| ours | 3 |" in page
    assert "| `_linear` | 2 |" in page
    assert "| base | 4 (2.00) |" in page
    assert "| `g` | 9 | 1.3 | ok | abc |" in page
    assert "| `f` | 6.5 | 1.3 | ok | def |" in page


def test_a_whole_run_of_a_gpu_hides_what_was_before_it(keep):
    card = [{"name": "gpu", "gpu": "NVIDIA H200"}, {"name": "bandwidth", "gb_per_s": 4000}]
    step = {"name": "decode", "case": ["base", 32], "seconds": 0.004, "floor_seconds": 0.002}
    whole, gone = (
        {"command": "make gpu-bench"},
        {"name": "kernel", "case": ["base", "_gone"], "seconds": 0.002},
    )
    keep("h200-bench", "one", *card, step, gone, figure(5))
    keep("h200-bench", "two", *(line | whole for line in (*card, step, figure(6))))
    keep("h200-bench", "three", step | {"seconds": 0.006}, figure(7))
    page = report.rewritten(PAGE.read_text())
    assert "_gone" not in page
    assert "| base | 6 (3.00) |" in page
    assert "| `f` | 7 |" in page


def test_what_int8_costs(keep):
    keep(
        "int8",
        "one",
        {"name": "demo", "model": "legal"} | QUALITY,
        {"name": "random", "model": "adapter"} | QUALITY,
    )
    page = report.rewritten(PAGE.read_text())
    assert "| demo, legal | 9 | 2.0000 | 2.0100 | 99.00% | 1.23% |" in page
    assert "| 1.1 billion random weights, adapter | 9 |  |  | 99.00% | 1.23% |" in page


def test_what_was_never_run_says_so_and_the_rest_of_the_page_stays(keep):
    page = report.rewritten(PAGE.read_text())
    assert page.count("Not run yet.") == 3
    assert page.partition("<!-- cpu")[0] == PAGE.read_text().partition("<!-- cpu")[0]
    assert report.rewritten(page) == page
