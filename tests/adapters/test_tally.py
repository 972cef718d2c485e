"""The lock-free histogram: where a value falls, and what Prometheus is told."""

from adapters.tally import BOUNDS, Tally


def test_a_bound_belongs_to_what_is_below_it():
    tally = Tally()
    for value in (0.0, 0.5, 0.50001, 1000.0):
        tally.add(value)
    found = dict(tally.cumulative())
    assert found["0.25"] == 1
    assert found["0.5"] == 2
    assert found["1.0"] == found["30.0"] == 3
    assert found["+Inf"] == tally.count == 4
    assert tally.total == 1001.00001
    assert len(found) == len(BOUNDS) + 1
