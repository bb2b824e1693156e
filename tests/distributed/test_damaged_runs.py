"""Runs over shards with damaged images: the same on any number of ranks and after any stop, and counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scaleprog.training.loop
from scaleprog.errors import DataError
from scaleprog.launchers import status
from scaleprog.recipe import Recipe
from scaleprog.reporting.report import write_report
from scaleprog.rundir.recorder import read_rows
from scaleprog.training.process import Run
from tests.compare import differences, final_state, final_tensors, samples
from tests.conftest import run, short_recipe
from tests.damage import write_shards

Make = Callable[..., Recipe]
DAMAGED = sorted(np.random.default_rng(0).choice(160, 20, replace=False).tolist())  # 2 of each kind


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Recipes of 20 steps, some of them with a search, over shards in which an image in eight is damaged."""
    shards = tmp_path_factory.mktemp("shards")
    write_shards(shards, (60, 30, 70), DAMAGED)

    def make(**data: Any) -> Recipe:
        return short_recipe(
            shards,
            data={"damaged": "replace", "trace": True, **data},
            train={"epochs": 1},
            search={"epochs": 0.2},
            augment={"crop": "resized", "repeats": 2},
            checkpoint={"every_steps": 4},
        )

    return make


@pytest.fixture(scope="module")
def straight(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    run(make(), folder)
    return folder


def crash(step: int, recipe: Recipe, folder: Path) -> None:
    """Trains until an error at a step; what came after the last checkpoint is lost."""
    original = scaleprog.training.loop.train_step

    def train_step(run: Run, *arguments: Any) -> None:
        original(run, *arguments)
        if run.state.step == step:
            raise OSError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaleprog.training.loop, "train_step", train_step)
        with pytest.raises(OSError, match="crash"):
            run(recipe, folder)


def assert_counted(folder: Path, names: list[str]) -> None:
    """The run's records tell of these damaged samples."""
    events = [event for event in read_rows(folder / "events.jsonl") if event["event"] == "damaged"]
    assert {name for event in events for name in event["samples"]} == set(names)
    assert final_state(folder)["damaged"] == names
    assert status.status(folder).damaged == len(names) == events[-1]["total"]


def test_a_run_that_replaces_damaged_images_resumes_and_tells(make: Make, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(make(workers=1), folder, max_steps=3)
    crash(11, make(), folder)
    run(make(), folder)
    assert differences(make(), folder, straight) == []
    names = final_state(straight)["damaged"]
    assert len(names) > 5
    assert_counted(straight, names)
    assert_counted(folder, names)
    write_report([folder], tmp_path)
    assert f"damaged samples, replaced by others: {len(names)} (train-" in (tmp_path / "report.md").read_text()


def test_ranks_replace_and_count_the_same_damaged_images(make: Make, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(make(workers=1), folder, ranks=2)
    assert samples(folder) == samples(straight)
    mine, theirs = final_tensors(folder, make()), final_tensors(straight, make())
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in theirs)
    assert_counted(folder, final_state(straight)["damaged"])


def test_too_many_damaged_images_end_a_run_and_a_higher_bound_resumes_it(
    make: Make, straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(DataError, match=r"data\.damaged=replace"):
        run(make(damaged="stop"), folder)
    with pytest.raises(DataError, match=r"samples are damaged, more than data\.most_damaged=3: train-.*, train-"):
        run(make(most_damaged=3), folder)
    run(make(), folder)
    assert differences(make(), folder, straight) == []
