"""The frontier's figures: what is compared with what."""

import pytest

from benchmarks.frontier import ORIGINAL, SAME_COST, Grid, cost_of, distance, doubling, interval, mean_curve, tables
from benchmarks.search_lab import Record

GRID = Grid({"digits": ("configs/digits/base.yaml", ())}, "Ours", (), {100: (0, 1), 400: (0, 1)})


def record(cost: float, best: float) -> Record:
    return Record("", "", 0, "", best, 0.0, 0.0, cost, 0.0, 0, {}, [], [], [])


def found() -> dict:
    """Ours costs half and ends where Original does; Original at half the cost is two points lower in seed 1."""
    cells = {}
    for length, base in ((100, 80.0), (400, 90.0)):
        for seed in (0, 1):
            cells["digits", length, seed, ORIGINAL] = record(length, base + seed)
            cells["digits", length, seed, GRID.name] = record(length / 2, base + seed)
            cells["digits", length, seed, SAME_COST] = record(length / 2, base - seed)
    return cells


def test_a_cost_lies_between_two_lengths_by_the_logarithm() -> None:
    curve = [(100.0, 80.0), (400.0, 90.0)]
    assert cost_of(85.0, curve) == pytest.approx(200)
    assert cost_of(80.0, curve) == 100
    assert cost_of(70.0, curve) == 100
    assert cost_of(91.0, curve) == float("inf")


def test_the_mean_curve_never_falls() -> None:
    curves = [[(1.0, 10.0), (2.0, 30.0), (4.0, 20.0)], [(1.0, 20.0), (2.0, 40.0), (4.0, 30.0)]]
    assert mean_curve(curves) == [(1.0, 15.0), (2.0, 35.0), (4.0, 35.0)]


def test_an_interval_is_that_of_the_paired_differences() -> None:
    assert distance([1.0, 2.0], [0.0, 1.0]) == "+1.00 [+1.00, +1.00]"
    assert distance([3.0, 1.0], [0.0, 0.0]) == "+2.00 [+1.00, +3.00]"
    assert distance([3.0], [1.0]) == "+2.00 "
    assert distance([3.0, 1.0], [0.0]) == "–"
    assert interval(2, lambda chosen: sum(chosen) / 2) == "[+0.00, +1.00]"


def test_what_doubling_gains_is_shared_out_to_the_next_length() -> None:
    assert doubling("digits", 100, GRID, found()) == "+5.00"
    assert doubling("digits", 400, GRID, found()) == "–"


def test_seeds_that_lack_a_run_are_left_out_of_the_costs() -> None:
    cells = found()
    del cells["digits", 400, 1, SAME_COST]
    assert "| 90.00 (the best of Original - 0) | 200 | 200 | 1.00  |" in tables(GRID, cells)
    del cells["digits", 400, 0, SAME_COST]
    assert "the best of Original" not in tables(GRID, cells)


def test_the_tables_compare_at_the_same_cost_and_at_the_same_accuracy() -> None:
    text = tables(GRID, found())
    assert "| 100 | 2 | 80.50 | 80.50 | 50 | +1.00 [+0.00, +2.00] | +0.00 [+0.00, +0.00] | +5.00 |" in text
    assert "| 90.50 (the best of Original - 0) | 400 | 200 | 2.00 [+1.00, +2.00] |" in text  # seed 0: at once
