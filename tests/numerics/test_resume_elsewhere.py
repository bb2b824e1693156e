"""A run that goes on under another engine and on another number of ranks: nobody notices in its losses."""

from pathlib import Path
from typing import Any

import pytest

from scaleprog.growth.search import step_time
from scaleprog.launchers.local import launch
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import committed, read_manifest
from scaleprog.training.between_steps import TIMED_STEPS
from scaleprog.training.loop import train_rank
from tests.compare import samples
from tests.conftest import MakeRecipe, run, step_rows

# steps 0-10 supernet, 10-26 stage 1, 26-36 supernet, 36-53 stage 2, 53-80 the complete model
LEGS: tuple[tuple[int | None, int, dict[str, Any]], ...] = (
    (5, 4, {"engine": "fsdp"}),
    (18, 2, {"engine": "zero", "stage": 3}),
    (31, 4, {"engine": "hsdp", "shard": 2}),
    (45, 1, {"engine": "replicated"}),
    (60, 4, {"engine": "zero", "stage": 1}),
    (70, 2, {"engine": "zero", "stage": 2, "offload": "optimizer", "recompute": True}),
    (None, 1, {"engine": "fsdp"}),
)
"""Until which step, on how many ranks, how sharded."""


def test_engines_and_worlds_in_turn_train_what_one_process_trains(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        model={"drop_path": 0.1}, data={"trace": True}, optimizer={"lr": 2e-4, "clip": 1.0},
        growth={"operator": "rand_init", "optimizer": "inherit"},
        augment={"mixup": 0.8, "erase": 0.25, "randaugment": "rand-m9-mstd0.5-inc1", "device": "accelerator"},
    )  # fmt: skip
    run(recipe, tmp_path / "alone")
    for stop, ranks, sharding in LEGS:
        leg = recipe.model_copy(
            update={
                "sharding": recipe.sharding.model_validate(sharding),
                "train": recipe.train.model_copy(update={"max_steps": stop, "micro_batch": 2}),
            }
        )
        launch(ranks, train_rank, leg, tmp_path / "moved")
        assert max(step_rows(tmp_path / "moved")) == (stop or 80)
    reference, moved = step_rows(tmp_path / "alone"), step_rows(tmp_path / "moved")
    assert list(moved) == list(reference) == list(range(1, 81))
    for step, row in reference.items():
        assert moved[step]["loss"] == pytest.approx(row["loss"], rel=1e-5), f"step {step}"
        assert (moved[step]["resolution"], moved[step]["depth"]) == (row["resolution"], row["depth"])
    theirs, mine = samples(tmp_path / "alone"), samples(tmp_path / "moved")
    assert {step: sorted(ids) for step, ids in mine.items()} == {step: sorted(ids) for step, ids in theirs.items()}
    for epoch in range(4):
        assert sorted(i for step in range(20 * epoch + 1, 20 * epoch + 21) for i in mine[step]) == list(range(160))


def timed(folder: Path) -> int:
    """How many step times the newest checkpoint keeps for the present search."""
    state = RunState.from_json(read_manifest(committed(folder / "checkpoints")[-1]).state)
    return sum(map(len, state.step_seconds.values()))


def test_step_times_are_those_of_the_machine_that_decides(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Steps 0-10 are a search: a start like the one before goes on with its times, another begins anew."""
    recipe, folder = make_recipe(search={"times": "measured"}), tmp_path / "run"
    run(recipe, folder, max_steps=4)
    run(recipe, folder, max_steps=6)
    assert timed(folder) == 6
    run(recipe, folder, max_steps=9, micro_batch=4)
    assert timed(folder) == 3
    run(recipe, folder, max_steps=11, micro_batch=4)
    weighs(folder, range(7, 11))


def test_a_search_weighs_the_last_steps_of_the_network_that_trained_before_it(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(search={"times": "measured"}), tmp_path / "run"
    run(recipe, folder, max_steps=40)
    searched = [step for step, row in step_rows(folder).items() if row["stage"] == 2 and row["phase"] == "supernet"]
    trained = [step for step, row in step_rows(folder).items() if row["stage"] == 1 and row["phase"] == "train"]
    assert trained[-1] == searched[0] - 1
    weighs(folder, range(trained[-TIMED_STEPS:][0], searched[-1] + 1))


def weighs(folder: Path, steps: range) -> None:
    """The last choice weighed the times of these steps."""
    choice = [row for row in read_rows(folder / "events.jsonl") if row["event"] == "choice"][-1]
    taken: dict[tuple[int, int], list[float]] = {}
    for step in steps:
        row = step_rows(folder)[step]
        taken.setdefault((row["resolution"], row["depth"]), []).append(row["step_seconds"])
    for (resolution, depth), seconds in zip(choice["candidates"], choice["times"]):
        if here := taken.get((resolution, depth)):
            assert seconds == pytest.approx(step_time(here))
        assert seconds > 0
