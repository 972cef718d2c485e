"""What the benchmarks say when a figure is short, and that every contestant has its turn."""

from collections import Counter

import pytest

from tests.bench.cpu import in_turn, popularity
from tests.bench.figures import Figure, Results


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
    assert capsys.readouterr().out.splitlines() == [str(good), str(good), str(short)]
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 3


def test_contestants_take_turns_and_give_medians():
    turns = []
    seconds = {"a": iter((3.0, 1.0, 2.0)), "b": iter((9.0, 9.0, 1.0))}

    def measure(name):
        turns.append(name)
        return next(seconds[name])

    assert in_turn({name: lambda name=name: measure(name) for name in "ab"}, 3, "") == {"a": 2.0, "b": 9.0}
    assert turns == list("ababab")


def test_popularity():
    assert popularity("base", 2) == [None, None]
    assert popularity("identical", 3) == [0, 0, 0]
    assert popularity("distinct", 3) == [0, 1, 2]
    drawn = Counter(popularity("zipf", 1000))
    assert drawn[0] > drawn[3] > drawn[20] > 0
