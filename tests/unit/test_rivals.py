"""The table of rivals: what is compared with what, and how sure it is."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from benchmarks.prices import by_gmacs, of_searches
from benchmarks.rivals import (
    Gap,
    Runs,
    budget_of,
    cheapest,
    curves,
    duels,
    each_case,
    ingredients,
    method_of,
    page,
    saving,
    without_variants,
)
from benchmarks.search_lab import CHOICE, Case, Grid, Record, Records, Trial
from scaleprog.errors import ScaleprogError
from scaleprog.planning.plan import outline, steps_per_epoch

RECIPE = "configs/fashion_mnist/base.yaml"
CASES = (
    Case("Original", "", RECIPE, ("growth.schedule=original",), False),
    Case("Original, wsd", "", RECIPE, ("growth.schedule=original", "optimizer.schedule=wsd"), False),
    Case("50 %, AutoProg", "", RECIPE, ("growth.schedule=linear",), False),
    Case("50 %, AutoProg, wsd", "", RECIPE, ("growth.schedule=linear", "optimizer.schedule=wsd"), False),
    Case("50 %, shorter", "", RECIPE, ("growth.schedule=original", "train.epochs=4"), False),
)
COUNTS = ({"train 28x6": 100}, {"train 28x6": 100}, *[{"train 28x3": 100}] * 2, {"train 28x6": 50})
TOP1 = {
    "Original": (88.0, 89.0, 88.5, 88.0),
    "Original, wsd": (88.2, 89.0, 88.5, 88.1),
    "50 %, AutoProg": (88.3, 89.0, 88.7, 88.0),
    "50 %, AutoProg, wsd": (88.2, 89.0, 88.6, 91.0),
    "50 %, shorter": (86.0, 87.0, 86.4, 85.9),
}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Four seeds of each case; the first two choose."""
    records = Records(tmp_path / "records.jsonl")
    trials = []
    for case, counts in zip(CASES, COUNTS):
        for seed, top1 in enumerate(TOP1[case.name]):
            trial = Trial(case, seed, tmp_path)
            prices = {kind: {"28x6": 1.0, "28x3": 0.6}[kind.split()[1]] for kind in counts}
            if "train 28x3" in prices:
                prices["train 28x6"] = 1.0
            records.add(
                Record(trial.digest, case.name, seed, "", top1, 0.0, 0.0, 0.0, 0.0, 100, prices, [], [], [], [counts])
            )
            trials.append(trial)
    return Runs(Grid("rivals", CASES, (0, 1, 2, 3)), trials, records, (0, 1))


def test_names() -> None:
    assert (budget_of("40 %, Original, wsd"), method_of("40 %, Original, wsd")) == ("40 %", "Original, wsd")
    assert (budget_of("Original, wsd"), method_of("Original, wsd")) == ("", "Original, wsd")


@given(st.lists(st.tuples(*[st.floats(80, 90)] * 2), min_size=2, max_size=9))
def test_an_interval_is_students(pairs: list[tuple[float, float]]) -> None:
    mine, theirs = zip(*pairs)
    gap = Gap.of([a - b for a, b in pairs])
    if gap.error > 1e-6:
        low, high = ttest_rel(mine, theirs).confidence_interval(0.9)
        assert (gap.least, gap.mean + gap.error) == pytest.approx((low, high), abs=1e-6)


def test_one_pair_has_no_interval() -> None:
    assert str(Gap.of([0.25])) == "+0.25"
    assert Gap.of([0.25]).least == -float("inf")


def test_the_reference_is_the_better_original_and_both_costs_are_parts_of_its_own(runs: Runs) -> None:
    assert runs.original == "Original, wsd"
    row = runs.row("50 %, AutoProg")
    assert row is not None
    assert row.seeds == (0, 1, 2, 3)
    assert row.gap.mean == pytest.approx(0.05)
    assert (row.cost, row.measured) == (pytest.approx(0.503, abs=0.001), pytest.approx(0.6))
    assert "| 50 % | AutoProg | 0, 1, 2, 3 | 88.50 | +0.05 ± 0.15 | 50.3% | 1.99 | 60.0% | 1.67 |" in each_case([row])


def test_a_run_that_never_trains_the_complete_model_has_the_price_that_others_measured(tmp_path: Path) -> None:
    patches = Case("50 %, PatchDropout", "", RECIPE, ("train.epochs=7",), False)
    records, trials = Records(tmp_path / "records.jsonl"), []
    for case, prices in (
        (CASES[0], {"train 28x6": 1.0}),
        (CASES[2], {"train 28x6": 1.0, "train 28x3": 0.6}),
        (patches, {"train 28x3": 0.503}),
    ):
        trial = Trial(case, 0, tmp_path)
        counts = [dict.fromkeys(prices, 100)]
        records.add(Record(trial.digest, "", 0, "", 88.0, 0.0, 0.0, 0.0, 0.0, 100, prices, [], [], [], counts))
        trials.append(trial)
    found = Runs(Grid("rivals", (CASES[0], CASES[2], patches), (0,)), trials, records, (0,))
    row = found.row("50 %, PatchDropout")
    assert row is not None
    assert row.measured == pytest.approx(0.6)


def test_a_search_costs_its_measurements(tmp_path: Path) -> None:
    settings = ("growth.schedule=automatic", "growth.patches=subset", "search.budget=0.5")
    trial = Trial(Case("", "", RECIPE, settings, False), 0, tmp_path)
    losses = {"16x3": 0.5, "16x6": 0.4, "28x3": 0.5, "28x6": 0.4}
    counts = [{"train 28x6": 100, CHOICE: 1}]
    record = Record(trial.digest, "", 0, "", 0.0, 0.0, 0.0, 0.0, 0.0, 100, {}, [], [], [[losses]], counts)
    _, schedule = outline(trial.recipe, steps_per_epoch(trial.recipe))
    assert by_gmacs(trial, record) == pytest.approx(100 + schedule.scoring * 1.503, rel=1e-3), "3 and 6 layers"
    whole = dataclasses.replace(record, steps=8 * 351)
    scoring = 351 // 25 / 3  # whole batches of a 25th of the images, whatever shards are here
    assert by_gmacs(trial, whole) == pytest.approx(100 + scoring * 1.503, rel=1e-3)


def test_a_saving_lies_between_two_points_and_never_outside() -> None:
    assert saving([(0.25, -0.6), (1.0, 0.4)]) == "2.00"
    assert saving([(0.4, -0.1), (0.5, 0.1)]) == "≥ 2.50"
    assert saving([(0.4, -0.3), (0.5, -0.2)]) == "not reached"
    assert saving([]) == "–"


def test_the_table_of_savings_uses_each_methods_own_budgets(runs: Runs) -> None:
    rows = [row for name in runs.names if (row := runs.row(name))]
    text = cheapest(rows)
    assert "| AutoProg | ≥ 1.99 | not reached |" in text
    assert "| shorter | not reached | not reached |" in text


def test_a_duel_is_chosen_on_some_seeds_and_fought_on_others(runs: Runs) -> None:
    text = duels(runs)
    assert "| 50 % | AutoProg | shorter | 2, 3 | +2.20 ± 0.63 |" in text
    assert "wsd" not in text, "a variant is no rival"


def test_an_ingredient_is_compared_alone_and_last_on_the_seeds_that_chose(runs: Runs) -> None:
    assert not ingredients(runs)
    alone, last = ("50 %, AutoProg, wsd", "50 %, shorter"), ("50 %, AutoProg", "50 %, AutoProg, wsd")
    runs.ingredients = {
        "wsd": {"alone": alone, "last": last},
        "half": {"alone": alone, "last": ("50 %, AutoProg", "not run")},
        "none": {"alone": ("not run", "Original"), "last": ("Original", "not run")},
    }
    lines = ingredients(runs).splitlines()[2:]
    assert lines == ["| wsd | +2.10 ± 0.63 | 0, 1 | +0.05 ± 0.32 | 0, 1 |", "| half | +2.10 ± 0.63 | 0, 1 | – | – |"]
    assert lines[0] in page(runs)


def test_the_seeds_that_chose_do_not_report(runs: Runs) -> None:
    chosen, reported = (runs.rows(reporting=reporting) for reporting in (False, True))
    assert {row.seeds for row in chosen} == {(0, 1)}
    assert {row.seeds for row in reported} == {(2, 3)}
    assert [row.method for row in reported if row.budget] == ["AutoProg", "AutoProg, wsd", "shorter"]
    assert {method: points[0][1] for method, points in curves(runs).items()} == {
        row.method: row.gap for row in reported if row.budget
    }
    drawn = curves(runs)
    assert set(drawn) - set(without_variants(drawn)) == {"AutoProg, wsd"}
    del drawn["AutoProg"]
    assert without_variants(drawn) == drawn
    text = page(runs)
    assert text.index(each_case(reported)) < text.index(each_case(chosen))
    assert cheapest(reported) in text


def test_original_is_chosen_among_those_that_ran_on_all_seeds_that_choose(runs: Runs, tmp_path: Path) -> None:
    lucky = Case("Original, twice the rate", "", RECIPE, ("growth.schedule=original", "optimizer.lr=0.006"), False)
    records = Records(tmp_path / "records.jsonl")
    trials = [Trial(case, seed, tmp_path) for case in CASES for seed in range(4)] + [Trial(lucky, 0, tmp_path)]
    counts, prices = [{"train 28x6": 100}], {"train 28x6": 1.0}
    records.add(Record(trials[-1].digest, "", 0, "", 95.0, 0.0, 0.0, 0.0, 0.0, 100, prices, [], [], [], counts))
    found = Runs(Grid("rivals", (*CASES, lucky), (0,)), trials, records, (0, 1))
    assert found.original == runs.original


def test_what_costs_more_than_original_is_neither_drawn_nor_a_saving(tmp_path: Path) -> None:
    longer = Case("200 %, Original", "", RECIPE, ("growth.schedule=original", "train.epochs=16"), False)
    records, trials = Records(tmp_path / "records.jsonl"), []
    for case, steps in ((CASES[0], 100), (longer, 200)):
        trial = Trial(case, 0, tmp_path)
        counts, prices = [{"train 28x6": steps}], {"train 28x6": 1.0}
        records.add(Record(trial.digest, "", 0, "", 88.0, 0.0, 0.0, 0.0, 0.0, steps, prices, [], [], [], counts))
        trials.append(trial)
    found = Runs(Grid("rivals", (CASES[0], longer), (0,)), trials, records, (1,))
    assert curves(found) == {}
    rows = found.rows(reporting=True)
    assert "| 200 % | Original | 0 | 88.00 | +0.00 | 200.0% | 0.50 |" in each_case(rows)
    assert cheapest(rows).endswith("|---|---|---|")
    assert duels(found) == ""


def test_what_searches_cost_is_a_part_of_the_run(tmp_path: Path) -> None:
    searching = Case("50 %, AutoProg", "", RECIPE, ("growth.schedule=automatic",), False)
    records, trials = Records(tmp_path / "records.jsonl"), []
    prices = {"train 28x6": 1.0, "supernet 28x6": 0.5, CHOICE: 5.0}
    for case, counts in (
        (CASES[0], {"train 28x6": 100}),
        (searching, {"train 28x6": 35, "supernet 28x6": 20, CHOICE: 1}),
    ):
        trial = Trial(case, 0, tmp_path)
        own = {kind: prices[kind] for kind in counts}
        records.add(Record(trial.digest, "", 0, "", 88.0, 0.0, 0.0, 0.0, 0.0, 100, own, [], [], [], [counts]))
        trials.append(trial)
    row = Runs(Grid("rivals", (CASES[0], searching), (0,)), trials, records, (0,)).row("50 %, AutoProg")
    assert row is not None
    assert (row.measured, row.search) == (pytest.approx(0.5), pytest.approx(0.3))
    assert "| 30.0% |" in each_case([row])


def test_a_window_is_no_search(tmp_path: Path) -> None:
    counts = [{"supernet 28x3": 50, "supernet 28x6": 50}]
    record = Record("", "", 0, "", 88.0, 0.0, 0.0, 0.0, 0.0, 100, {}, [], [], [], counts)
    assert of_searches(record, {"supernet 28x3": 0.5, "supernet 28x6": 1.0}) == 0


def test_without_original_nothing_is_compared(tmp_path: Path) -> None:
    with pytest.raises(ScaleprogError, match="nothing can be compared"):
        Runs(Grid("rivals", CASES, (0,)), [], Records(tmp_path / "none.jsonl"), (0,))


def test_records_of_another_arithmetic_do_not_count(tmp_path: Path) -> None:
    records, trial = Records(tmp_path / "records.jsonl"), Trial(CASES[0], 0, tmp_path)
    line = Record(trial.digest, "", 0, "", 0.0, 0.0, 0.0, 0.0, 0.0, 100, {}, [], [], [], [], arithmetic=2)
    records.add(line)
    assert trial not in Records(tmp_path / "records.jsonl")


def test_the_grids_ingredients_name_its_cases() -> None:
    grid = Grid.load(Path("benchmarks/grids/rivals.yaml"))
    names = {case.name for case in grid.cases}
    pairs = [pair for both in grid.ingredients.values() for pair in (both["alone"], both["last"])]
    assert pairs
    assert {name for pair in pairs for name in pair} <= names
