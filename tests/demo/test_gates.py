"""The shipped weights do what the README says of them."""

import os

import pytest
import torch

from demo.evaluate import Measures, measure
from demo.make import SHIPPED
from demo.report import cells, read_table


@pytest.fixture(scope="module")
def measures() -> Measures:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # large batches: here threads pay
    try:
        return measure(SHIPPED)
    finally:
        torch.set_num_threads(before)


def test_every_gate_is_met(measures: Measures) -> None:
    assert measures.failures() == []


def number(cell: str) -> float:
    return float(cell.rstrip("%"))


def test_the_readme_prints_what_is_measured(measures: Measures) -> None:
    """Perplexities within 3 %, rates within 3 points: other machines round differently."""
    printed, measured = read_table(SHIPPED / "README.md"), cells(measures)
    assert printed.keys() == measured.keys()
    for name, row in measured.items():
        for told, found in zip(printed[name][:-1], row[:-1], strict=True):
            assert bool(told) == bool(found), name
            if told:
                close = (
                    pytest.approx(number(found), abs=3.0)
                    if "%" in found
                    else pytest.approx(number(found), rel=0.03)
                )
                assert number(told) == close, name
