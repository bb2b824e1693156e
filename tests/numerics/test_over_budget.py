"""A budget that was asked for and cannot be kept at the prices of here: the run waits, and loses nothing."""

from pathlib import Path

import pytest

from scaleprog.errors import OverBudget
from scaleprog.growth.phase import Phase
from scaleprog.growth.space import Subnet
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.rundir.planned import read_plan
from scaleprog.rundir.storage import committed, step_of
from scaleprog.training.fork import fork
from tests.conftest import WITHIN_A_BUDGET, MakeRecipe, run, step_rows


def within(budget: float | None, make_recipe: MakeRecipe) -> Recipe:
    search = {**WITHIN_A_BUDGET["search"], "budget": budget, "times": "measured"}
    return make_recipe(**{**WITHIN_A_BUDGET, "search": search})


@pytest.fixture(autouse=True)
def _nothing_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on a small network take 95 % of the time of a complete one."""

    def times(measured: object, costs: dict[Subnet, float]) -> dict[Subnet, float]:
        return {subnet: 1.0 if subnet == max(costs) else 0.95 for subnet in costs}

    monkeypatch.setattr("scaleprog.training.between_steps.candidate_times", times)


def test_a_promise_that_cannot_be_kept_waits_for_a_larger_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(OverBudget, match=r"search\.budget: a step on 16 px, 2 layers costs 95% of a complete one"):
            run(within(0.7, make_recipe), tmp_path)
        waiting = step_of(committed(tmp_path / "checkpoints")[-1])
        assert waiting == max(step_rows(tmp_path)), "every step that was trained is kept"
    results = run(within(1.0, make_recipe), tmp_path)
    assert [(s["resolution"], s["depth"]) for s in results["stages"]] == [(16, 2), (32, 4)]
    assert sorted(step_rows(tmp_path)) == list(range(1, 81)), "none is repeated"


def test_nothing_is_saved_where_nothing_is_cheaper(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    results = run(within(None, make_recipe), tmp_path)
    (small, _), (complete, epochs) = [(s["resolution"], s["epochs"]) for s in results["stages"]]
    assert (small, complete) == (16, 32)
    assert epochs == (80 - 36) / 20, "all of the run after the first search"


def brief(budget: float, make_recipe: MakeRecipe) -> Recipe:
    """A run of 400 steps whose search is as short as its budget asks for."""
    search = {**WITHIN_A_BUDGET["search"], "budget": budget, "epochs": None, "most_cost": 0.02, "times": "modelled"}
    return make_recipe(**{**WITHIN_A_BUDGET, "train": {"epochs": 20}, "search": search})


@pytest.fixture
def no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search may be shorter than its candidates ask for."""
    monkeypatch.setattr("scaleprog.planning.budget.TURNS", 0)


def search_of(recipe: Recipe) -> Phase:
    return Plan.of(recipe).schedule.phases(())[-1]


def supernet(*folders: Path) -> list[int]:
    """The steps that trained a supernet."""
    rows = {step: row for folder in folders for step, row in step_rows(folder).items()}
    return [step for step, row in rows.items() if row["phase"] == "supernet"]


@pytest.mark.usefixtures("no_turns")
def test_a_larger_budget_makes_no_search_of_a_run_longer(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    small, large = (search_of(brief(budget, make_recipe)) for budget in (0.5, 0.9))
    assert small.start == large.start
    assert small.stop < large.stop
    run(brief(0.5, make_recipe), tmp_path, max_steps=small.start + 1)
    run(brief(0.9, make_recipe), tmp_path, max_steps=small.stop)  # decided
    results = run(brief(0.8, make_recipe), tmp_path)
    assert sorted(step_rows(tmp_path)) == list(range(1, 401)), "none is repeated"
    assert supernet(tmp_path) == list(range(small.start + 1, small.stop + 1))
    planned = read_plan(tmp_path)
    assert planned is not None
    assert planned[0].search_steps == small.stop - small.start
    assert sum(stage["epochs"] for stage in results["stages"]) == (400 - len(supernet(tmp_path))) / 20


@pytest.mark.usefixtures("no_turns")
@pytest.mark.parametrize("after", [1, 15], ids=["in a search", "after it"])
def test_nor_of_a_fork(after: int, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    small = search_of(brief(0.5, make_recipe))
    parent, child = tmp_path / "parent", tmp_path / "child"
    run(brief(0.5, make_recipe), parent, max_steps=small.start + after)
    made = fork(brief(0.9, make_recipe), str(parent), child)
    run(made, child, max_steps=small.start + after + 1)
    run(fork(brief(0.8, make_recipe), f"{child}@{small.start + after + 1}", tmp_path / "again"), tmp_path / "again")
    run(made.model_copy(update={"search": brief(0.7, make_recipe).search}), child)
    for last in (child, tmp_path / "again"):
        assert max(step_rows(last)) == 400
        assert supernet(parent, child, last) == list(range(small.start + 1, small.stop + 1))
