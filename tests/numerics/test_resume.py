"""A run that was stopped anywhere and resumed ends, bit for bit, where a straight run ends."""

import json
import random
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scaleprog.errors import Diverged
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from tests.compare import board, differences, texts
from tests.conftest import WITHIN_A_BUDGET, run, short_recipe, step_rows
from tests.numerics.whole_runs import train_all

HARD = {
    "model": {"drop_path": 0.2},
    "data": {"lanes": 2},  # 4 images each: two pairs, as two repeats of an image need
    "augment": {"crop": "resized", "scale": (0.4, 1.0), "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25,
                "mixup": 0.8, "cutmix": 1.0, "repeats": 2, "eval_crop": 0.875},
    "ema": {"momenta": [0.8, 0.9]},
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def recipe_and_straight(
    growth: dict,
    make_recipe: Callable[..., Recipe],
    straight: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Recipe, Path]:
    """The recipe and the folder of its undisturbed run, which is trained once."""
    recipe = make_recipe(growth=growth, **HARD)
    key = json.dumps(growth)
    if key not in straight:
        straight[key] = tmp_path_factory.mktemp("straight") / "run"
        run(recipe, straight[key])
    return recipe, straight[key]


# steps 0-10 supernet (0-10 warm-up), 10-26 stage 1, 26-36 supernet, 36-53 stage 2, 53-80 the complete model
STOPS = {"warm-up": (3, 7), "search": (10, 10), "stage 1": (12, 24), "before growth": (26, 26),
         "after growth": (27, 27), "supernet": (29, 34), "choice": (36, 36), "last stage": (55, 78)}  # fmt: skip


@pytest.mark.parametrize("mode", ["reset", "inherit, identity"])
def test_stopped_and_resumed_equals_straight(
    mode: str, make_recipe: Callable[..., Recipe], straight: dict[str, Path],
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    growth = {"schedule": "automatic", "stages": 3, "adaptive_regularization": True}
    if mode != "reset":
        growth |= {"operator": "identity", "optimizer": "inherit"}
    recipe, reference = recipe_and_straight(growth, make_recipe, straight, tmp_path_factory)
    for where, bounds in STOPS.items():
        stop = random.Random(f"{where} {mode}").randint(*bounds)
        assert run(recipe, tmp_path / "run", max_steps=stop) == {}
        rows = step_rows(tmp_path / "run")
        assert max(rows) == stop
        assert [rows[i]["loss"] for i in rows] == [step_rows(reference)[i]["loss"] for i in rows], where
    run(recipe, tmp_path / "run")
    assert_same_run(recipe, tmp_path / "run", reference)


def test_a_run_within_a_budget_resumed_many_times(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Steps 0-26 the smallest network, 26-36 a supernet, then what it chose, then the complete model, while which the
    learning rate falls."""
    hard = HARD | {"augment": HARD["augment"] | {"device": "accelerator"}}
    hard["optimizer"] = {"schedule": "wsd", "decay": "takeover", "warmup_epochs": 0}
    recipe = make_recipe(**WITHIN_A_BUDGET, **hard)
    run(recipe, tmp_path / "straight")
    for stop in (3, 25, 26, 31, 35, 36, 40, 70):
        run(recipe, tmp_path / "run", max_steps=stop)
    run(recipe, tmp_path / "run")
    assert_same_run(recipe, tmp_path / "run", tmp_path / "straight")
    (choice,) = (event for event in read_rows(tmp_path / "run" / "events.jsonl") if event["event"] == "choice")
    phases = [(row["phase"], row["resolution"], row["depth"]) for row in step_rows(tmp_path / "run").values()]
    assert phases[:26] == [("train", 16, 2)] * 26
    assert {phase for phase, _, _ in phases[26:36]} == {"supernet"}
    assert 36 < choice["complete_from"] <= 53
    assert set(phases[36 : choice["complete_from"]]) == {("train", *choice["chosen"])}
    assert set(phases[choice["complete_from"] :]) == {("train", 32, 4)}
    rates = [row["lr"] for row in step_rows(tmp_path / "run").values()]
    assert set(rates[: choice["complete_from"] + 1]) == {recipe.optimizer.lr}
    assert all(before > after for before, after in pairwise(rates[choice["complete_from"] :]))


def test_a_run_that_counts_compute_resumed_many_times(
    make_recipe: Callable[..., Recipe], straight: dict[str, Path], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """Its stages cost the same each, so they have other steps than positions; its learning rate follows the cost."""
    growth = {"schedule": "automatic", "stages": 3, "steps": "compute", "adaptive_regularization": True,
              "regularization_from": {"magnitude": 0.0, "erase": 1.0}}  # fmt: skip
    recipe, reference = recipe_and_straight(growth, make_recipe, straight, tmp_path_factory)
    steps = step_rows(reference)
    assert len(steps) != Plan.of(recipe).schedule.steps
    for stop in (5, 10, 12, len(steps) // 2, len(steps) - 3):
        run(recipe, tmp_path / "run", max_steps=stop)
    run(recipe, tmp_path / "run")
    assert_same_run(recipe, tmp_path / "run", reference)


@pytest.mark.parametrize(
    "growth",
    [
        {"schedule": "linear", "stages": 3, "window": {"spread": 0.65, "mix": 0.1}},
        {"schedule": [{"resolution": 16, "depth": 4}], "patches": "subset"},
    ],
    ids=["a window over the stages", "a part of the patches throughout"],
)
def test_the_schedules_of_others_resumed_many_times(
    growth: dict[str, Any], make_recipe: Callable[..., Recipe], straight: dict[str, Path], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    recipe, reference = recipe_and_straight(growth, make_recipe, straight, tmp_path_factory)
    for stop in (5, 40, 61):
        run(recipe, tmp_path / "run", max_steps=stop)
    run(recipe, tmp_path / "run")
    assert_same_run(recipe, tmp_path / "run", reference)
    rows = step_rows(reference).values()
    assert {row["phase"] for row in rows} == {"supernet" if "window" in growth else "train"}
    sizes = [(row["resolution"], row["depth"]) for row in rows]
    if "window" in growth:
        ladder = [(16, 2), (24, 3), (32, 4)]
        assert set(sizes) == set(ladder)
        assert sizes[:27].count(ladder[0]) > sizes[-27:].count(ladder[0])
        assert sizes[-27:].count(ladder[2]) > sizes[:27].count(ladder[2])
    else:
        assert set(sizes) == {(16, 4)}


def test_resumed_many_times_and_without_recycling(
    make_recipe: Callable[..., Recipe], straight: dict[str, Path], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    growth = {"schedule": "automatic", "stages": 3, "recycle": False}
    recipe, reference = recipe_and_straight(growth, make_recipe, straight, tmp_path_factory)
    for stop in (2, 10, 11, 36, 40, 46, 47, 80, 99):
        run(recipe, tmp_path / "run", max_steps=stop)
    run(recipe, tmp_path / "run")
    assert_same_run(recipe, tmp_path / "run", reference)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint_without_doubled_points(
    make_recipe: Callable[..., Recipe], straight: dict[str, Path], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    growth = {"schedule": "automatic", "stages": 3, "adaptive_regularization": True}
    recipe, reference = recipe_and_straight(growth, make_recipe, straight, tmp_path_factory)
    run(recipe, tmp_path / "run", max_steps=33)
    run(recipe, tmp_path / "run", max_steps=45)
    newest = tmp_path / "run" / "checkpoints" / "step-00000045"
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(b"cut off")  # metrics reach to 45, the newest sound checkpoint does not
    run(recipe, tmp_path / "run")
    assert_same_run(recipe, tmp_path / "run", reference)


def test_results_that_were_cut_off_are_written_again(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a start of a finished run sends to its trackers what they have missed."""
    recipe = make_recipe(growth={"schedule": "original"}, train={"epochs": 1})
    whole = run(recipe, tmp_path)
    (tmp_path / "results.json").write_text('{"top1": ')
    assert run(recipe, tmp_path)["top1"] == whole["top1"]
    assert json.loads((tmp_path / "results.json").read_text())["top1"] == whole["top1"]
    sent: list[Any] = []

    class Senders:
        def __init__(self, *given: Any) -> None:
            sent.append(given[:2])

        def close(self) -> None:
            sent.append("closed")

    monkeypatch.setattr("scaleprog.training.loop.Senders", Senders)
    run(recipe.model_copy(update={"tracking": ("mlflow",)}), tmp_path)
    assert sent == [(tmp_path, ("mlflow",)), "closed"]


SHARDINGS: dict[str, dict[str, Any]] = {
    "fsdp": {"engine": "fsdp"},
    "hsdp": {"engine": "hsdp"},
    **{f"zero-{stage}": {"engine": "zero", "stage": stage} for stage in (1, 2, 3)},
    "replicated": {"engine": "replicated"},
}
# in 40 steps: 0-5 supernet, 5-13 stage 1, 13-18 supernet, 18-26 stage 2, 26-40 the complete model
SHARDED_STOPS = (4, 16, 31)
WORLDS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"train": {"epochs": 2, "batch": 8}, "search": {"epochs": 0.25}, "data": {"lanes": 2}},
    4: {"train": {"epochs": 4, "batch": 16}, "search": {"epochs": 0.5}, "data": {"lanes": 4}},
}
"""By the number of ranks: 40 steps on four images of each rank."""
RESUMED = [(2, name) for name in SHARDINGS] + [(4, name) for name in ("fsdp", "hsdp", "zero-3")]
"""Ranks and engine; on four ranks, those that shard parameters."""
Sharded = Callable[[int], dict[str, tuple[Recipe, Path]]]


def sharded_recipe(shards: Path, world: int, sharding: dict[str, Any]) -> Recipe:
    groups = HARD | WORLDS[world]
    groups["data"] = groups["data"] | {"trace": True}
    groups["train"] = groups["train"] | {"micro_batch": 3}
    groups["sharding"] = sharding | ({"shard": world // 2} if sharding["engine"] == "hsdp" else {})
    return short_recipe(shards, **groups, optimizer={"clip": 1.0}, growth={"optimizer": "inherit"})


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, patterns: Path) -> Sharded:
    """Trains on so many ranks: returns a recipe for each engine, and the folder of a straight run and of one that is
    resumed after each stop."""
    return cache(partial(train_sharded, patterns, tmp_path_factory))


def train_sharded(
    patterns: Path, tmp_path_factory: pytest.TempPathFactory, world: int
) -> dict[str, tuple[Recipe, Path]]:
    recipes = {name: sharded_recipe(patterns, world, SHARDINGS[name]) for ranks, name in RESUMED if ranks == world}
    folder = tmp_path_factory.mktemp("sharded")
    runs = [(recipe, folder / name / "straight") for name, recipe in recipes.items()]
    for stop in (*SHARDED_STOPS, None):  # engine after engine, so that what one leaves in the process cannot help
        for name, recipe in recipes.items():
            train = recipe.train.model_copy(update={"max_steps": stop})
            runs.append((recipe.model_copy(update={"train": train}), folder / name / "resumed"))
    train_all(world, runs)
    return {name: (recipe, folder / name) for name, recipe in recipes.items()}


@pytest.mark.timeout(1200)  # the first one waits for all runs
@pytest.mark.parametrize(("world", "name"), RESUMED)
def test_ranks_resume_bit_for_bit(world: int, name: str, sharded: Sharded) -> None:
    recipe, folder = sharded(world)[name]
    events = read_rows(folder / "resumed" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "start"] == [0, *SHARDED_STOPS]
    assert_same_run(recipe, folder / "resumed", folder / "straight")


def assert_same_run(recipe: Recipe, run_folder: Path, reference: Path) -> None:
    """Weights, EMAs, moments, metrics and TensorBoard are equal, clocks aside."""
    assert {"train/loss", "vitals/resolution", "validation/val_loss", "validation/top1_ema"} <= board(reference).keys()
    searched = any(row["event"] == "choice" for row in read_rows(reference / "events.jsonl"))
    assert any(name.startswith("search/") for name in texts(reference)) == searched
    assert texts(run_folder) == texts(reference)
    assert differences(recipe, run_folder, reference) == []


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaleprog.training.loop.learning_rate", lambda *_: 1e30)
    recipe = make_recipe(growth={"schedule": "original"}, train={"epochs": 1, "log_every": 2})
    with pytest.raises(Diverged, match=r"step \d+: the loss is (nan|inf) at lr \d"):
        run(recipe, tmp_path)
