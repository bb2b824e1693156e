"""A fork with nothing changed ends, bit for bit, where its parent ends; so does a run that is made longer in place."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scaleprog.recipe import Recipe
from scaleprog.rundir.reading import read_rows
from scaleprog.training.fork import fork
from scaleprog.training.longer import begin
from tests.compare import differences, final_tensors, without_clock
from tests.conftest import WITHIN_A_BUDGET, MakeRecipe, run, step_rows
from tests.numerics.test_resume import HARD
from tests.numerics.whole_runs import train_all


def trained(folder: Path) -> list[tuple[int, str, int, int]]:
    """The phases of the recorded steps: the first step and the kind, and resolution and depth of a lone network."""
    found: list[tuple[int, str, int, int]] = []
    for step, row in step_rows(folder).items():
        lone = (row["resolution"], row["depth"]) if row["phase"] == "train" else (0, 0)
        if not found or found[-1][1:] != (row["phase"], *lone):
            found.append((step, row["phase"], *lone))
    return found


def changed(recipe: Recipe, **groups: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(mode="json")
    return Recipe.of({**values, **{name: {**values[name], **group} for name, group in groups.items()}}, "changed")


@pytest.mark.parametrize(("groups", "stop"), [({}, 30), (WITHIN_A_BUDGET, 44)], ids=["in a search", "within a budget"])
def test_a_fork_with_nothing_changed_equals_going_on(
    groups: dict[str, Any], stop: int, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(**groups, **HARD)
    run(recipe, tmp_path / "parent", max_steps=stop)
    made = fork(recipe, str(tmp_path / "parent"), tmp_path / "fork")
    for name, each in (("parent", recipe), ("fork", made)):
        run(each, tmp_path / name)
    assert differences(recipe, tmp_path / "fork", tmp_path / "parent") == []
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("parent", "fork")]
    assert results[0]["images"] == results[1]["images"]
    assert [s["searched"] for s in results[0]["stages"]] == [s["searched"] for s in results[1]["stages"]]


def test_on_two_ranks_it_does_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"epochs": 2}, search={"epochs": 0.25}, data={"lanes": 2})
    train_all(2, [(changed(recipe, train={"max_steps": 20}), tmp_path / "parent")])
    made = fork(recipe, f"{tmp_path / 'parent'}@20", tmp_path / "fork")
    train_all(2, [(recipe, tmp_path / "parent"), (made, tmp_path / "fork")])
    assert differences(recipe, tmp_path / "fork", tmp_path / "parent") == []


def test_with_another_learning_rate_the_first_rows_are_the_parents(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"epochs": 2}, growth={"schedule": "linear"}, checkpoint={"every_steps": 15, "keep": 9})
    run(recipe, tmp_path / "parent")
    made = fork(changed(recipe, optimizer={"lr": 2e-3}), f"{tmp_path / 'parent'}@15", tmp_path / "fork")
    assert made.parent is not None
    assert made.parent.phases == ()
    run(made, tmp_path / "fork")
    mine, theirs = (without_clock(tmp_path / name) for name in ("fork", "parent"))
    assert [row for row in mine if row["step"] <= 15] == [row for row in theirs if row["step"] <= 15]
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    later = [(a, b) for a, b in zip(mine, theirs) if a["step"] > 15 and "loss" in a]
    assert all(a["lr"] > b["lr"] for a, b in later)
    assert [a["step"] for a, b in later if a["loss"] == b["loss"]] == [16]  # the next step's weights are the parent's


def test_a_longer_fork_keeps_what_has_grown_and_goes_on_in_the_new_schedule(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """8 epochs have stages up to steps 53, 106, and 160; a search begins each but the last."""
    recipe = make_recipe()
    run(recipe, tmp_path / "parent", max_steps=44)
    made = fork(changed(recipe, train={"epochs": 8}), str(tmp_path / "parent"), tmp_path / "fork")
    results = run(made, tmp_path / "fork")
    before, after = trained(tmp_path / "parent"), trained(tmp_path / "fork")
    grown = before[-1][2:]
    assert after[: len(before)] == before
    assert after[len(before)] == (54, "supernet", 0, 0)
    assert [phase[0] for phase in after[len(before) + 1 :]] == [64, 107]
    assert after[-1][2:] == (32, 4)
    assert all(mine >= theirs for phase in after[len(before) + 1 :] for mine, theirs in zip(phase[2:], grown))
    assert (results["steps"], results["images"]) == (160, 1280)
    assert [stage["searched"] for stage in results["stages"]] == [True, True, False, True, False]


def test_a_fork_of_such_a_fork_goes_on_as_that_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(**WITHIN_A_BUDGET)
    run(recipe, tmp_path / "first", max_steps=44)
    longer = changed(recipe, train={"epochs": 8})
    second = fork(longer, str(tmp_path / "first"), tmp_path / "second")
    assert second.parent is not None
    assert second.parent.phases != ()
    for stop in (60, None):
        run(second, tmp_path / "second", max_steps=stop)
        if stop:
            third = fork(longer, str(tmp_path / "second"), tmp_path / "third")
    run(third, tmp_path / "third")
    assert differences(longer, tmp_path / "third", tmp_path / "second") == []


def test_a_fork_of_a_fork_counts_the_steps_of_a_search_that_did_not_advance_it(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(growth={"schedule": "linear"}, train={"epochs": 2})
    run(recipe, tmp_path / "first", max_steps=4)
    searching = changed(
        recipe, growth={"schedule": "automatic", "recycle": False, "smallest": 0.75}, train={"epochs": 3}
    )
    second = fork(searching, str(tmp_path / "first"), tmp_path / "second")
    results = run(second, tmp_path / "second")
    assert results["steps"] > 60, "a search has taken steps of its own"
    phases = [(row["phase"], row["epoch"]) for row in step_rows(tmp_path / "second").values()]
    stop = max(step for step, (phase, _) in enumerate(phases, 1) if phase == "supernet") + 3
    shutil.rmtree(tmp_path / "second")
    fork(searching, str(tmp_path / "first"), tmp_path / "second")
    run(second, tmp_path / "second", max_steps=stop)
    third = fork(searching, str(tmp_path / "second"), tmp_path / "third")
    run(third, tmp_path / "third")
    assert [(row["phase"], row["epoch"]) for row in step_rows(tmp_path / "third").values()] == phases


def test_a_larger_batch_after_few_steps_keeps_the_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The new batch is so large that the fork's place in its schedule is rounded to 0."""
    recipe = make_recipe(growth={"schedule": "original"}, train={"epochs": 2})
    run(recipe, tmp_path / "parent", max_steps=3)
    made = fork(changed(recipe, train={"batch": 80}), str(tmp_path / "parent"), tmp_path / "fork")
    assert made.parent is not None
    assert made.parent.position == 0
    run(made, tmp_path / "fork", max_steps=4)
    growths = [event for event in read_rows(tmp_path / "fork/events.jsonl") if event["event"] == "growth"]
    assert [event["step"] for event in growths] == [0]


def test_another_batch_keeps_the_epoch(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(growth={"schedule": "linear"}, train={"epochs": 2})
    run(recipe, tmp_path / "parent", max_steps=20)
    made = fork(changed(recipe, train={"batch": 16}), str(tmp_path / "parent"), tmp_path / "fork")
    assert made.parent is not None
    assert (made.parent.step, made.parent.position) == (20, 10)
    results = run(made, tmp_path / "fork")
    assert (results["steps"], results["images"]) == (30, 320)
    assert step_rows(tmp_path / "fork")[21]["epoch"] == 1.0


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_made_longer_in_place_equals_a_straight_one(
    finished: bool, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    constant = {"schedule": "wsd", "warmup_epochs": 0.5, "decay": 0.25, "min_lr": 5e-4 if finished else 1e-5}
    recipe = make_recipe(
        growth={"schedule": "original"}, train={"epochs": 1}, optimizer=constant, evaluate={"every": 1}
    )
    longer = changed(recipe, train={"epochs": 2})
    run(longer, tmp_path / "straight")
    run(recipe, tmp_path / "run", max_steps=None if finished else 14)
    run(begin(longer, tmp_path / "run"), tmp_path / "run")
    assert differences(longer, tmp_path / "run", tmp_path / "straight") == []
    assert final_tensors(tmp_path / "run", longer)
    assert Recipe.of_run(tmp_path / "run") == longer
    assert (tmp_path / "run/results-20.json").exists() == finished
    assert json.loads((tmp_path / "run/results.json").read_text())["steps"] == 40
