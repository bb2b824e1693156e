"""A budget that was asked for and cannot be kept at the prices of here: the run waits, and loses nothing."""

from pathlib import Path

import pytest

from scaleprog.errors import OverBudget
from scaleprog.growth.space import Subnet
from scaleprog.recipe import Recipe
from scaleprog.rundir.storage import committed, step_of
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
