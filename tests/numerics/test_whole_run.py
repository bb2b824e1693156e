"""A whole short AutoProg run on sharded ranks against one unsharded process."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import Operator
from scaleprog.rundir.recorder import read_rows
from tests.conftest import SHARDINGS, WITHIN_A_BUDGET, run, short_recipe, step_rows
from tests.numerics.whole_runs import train_all

CALM = {"lr": 2e-4, "clip": 1.0}  # AdamW amplifies rounding with the learning rate: what is compared are engines
OPERATORS: tuple[Operator, ...] = ("mogrow", "identity", "stacking", "rand_init", "interpolation")
BUDGETED: tuple[Operator, ...] = ("mogrow", "rand_init")  # these search within a budget, the others as published
MICRO_BATCH = {1: 3, 2: 3, 4: 1}  # of 8, 4 and 2 rows
WORLDS = tuple(MICRO_BATCH)


def cases(world: int) -> list[tuple[dict[str, Any], Operator]]:
    """Each engine on so many ranks with one of the operators: another one on each number of ranks."""
    shardings = [s if world > 1 else {k: v for k, v in s.items() if k != "shard"} for s in SHARDINGS]
    return [(s, OPERATORS[(i + 2 * WORLDS.index(world)) % len(OPERATORS)]) for i, s in enumerate(shardings)]


class Runs:
    """The runs of all cases: those on as many ranks are trained together when the first of them is asked for."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.reference, self.trained = cache(self._reference), cache(self._trained)

    def recipe(self, operator: Operator, sharding: dict[str, Any], micro_batch: int | None) -> Recipe:
        searched = WITHIN_A_BUDGET if operator in BUDGETED else {"growth": {}, "search": {"measurements": 2}}
        optimizer = "inherit" if operator in ("stacking", "identity") else "reset"
        return short_recipe(
            self.shards,
            model={"drop_path": 0.1},
            growth={**searched["growth"], "operator": operator, "optimizer": optimizer},
            search=searched["search"],
            augment={"crop": "resized", "scale": (0.4, 1.0), "mixup": 0.8, "cutmix": 1.0, "erase": 0.25},
            train={"micro_batch": micro_batch}, data={"trace": True}, optimizer=CALM, sharding=sharding,
        )  # fmt: skip

    def _reference(self, operator: Operator) -> Path:
        """The run of one unsharded process, whole batches at a time."""
        folder = self.folder / operator
        run(self.recipe(operator, {"engine": "replicated"}, None), folder)
        return folder

    def _trained(self, world: int) -> Path:
        """The folder of the runs on so many ranks, by their number in `cases`."""
        folder = self.folder / f"world-{world}"
        recipes = [self.recipe(operator, sharding, MICRO_BATCH[world]) for sharding, operator in cases(world)]
        train_all(world, [(recipe, folder / str(i)) for i, recipe in enumerate(recipes)])
        return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, patterns: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), patterns)


@pytest.mark.parametrize(
    ("world", "number"), [pytest.param(w, i, id=f"{w} {c}") for w in WORLDS for i, c in enumerate(cases(w))]
)
def test_every_engine_trains_what_one_unsharded_process_trains(world: int, number: int, runs: Runs) -> None:
    _, operator = cases(world)[number]
    theirs, mine = runs.reference(operator), runs.trained(world) / str(number)
    reference, rows = step_rows(theirs), step_rows(mine)
    assert reference.keys() == rows.keys() == set(range(1, 81))
    assert {r["phase"] for r in reference.values()} == {"supernet", "train"}
    assert any(r["grad_norm"] > CALM["clip"] for r in reference.values()), "gradients were clipped"
    for step, row in reference.items():
        assert rows[step]["loss"] == pytest.approx(row["loss"], rel=1e-5), f"step {step}"
        assert all(rows[step][key] == row[key] for key in ("resolution", "depth", "lr"))
    assert choices(mine) == choices(theirs)
    assert len(choices(mine)) == (1 if operator in BUDGETED else 2)
    assert sample_ids(mine, world) == sample_ids(theirs, 1)


def test_without_recycling_a_stage_goes_back_and_repeats_its_epochs(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    growth = {"schedule": "automatic", "stages": 3, "recycle": False}
    recipe = make_recipe(growth=growth, data={"trace": True}, optimizer=CALM)
    run(recipe, tmp_path / "one")
    run(recipe, tmp_path / "two", ranks=2)
    rows, ids = step_rows(tmp_path / "one"), sample_ids(tmp_path / "one", 1)
    assert len(rows) == 80 + 2 * 10  # two searches of half an epoch, repeated
    assert (rows[1]["epoch"], rows[11]["epoch"]) == (0, 0)
    assert rows[11]["lr"] == rows[1]["lr"]
    assert ids[11] == ids[1]
    assert ids[12] != ids[1]
    two = step_rows(tmp_path / "two")
    assert [two[s]["loss"] for s in rows] == pytest.approx([row["loss"] for row in rows.values()], rel=1e-5)


def test_a_search_scores_the_ema_that_it_is_told(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """At the end of the first search nothing has grown, so that only what is scored can make a difference."""

    def losses(grow_from: int, scored: int | None) -> list[Any]:
        recipe = make_recipe(
            ema={"momenta": [0.5, 0.99], "grow_from": grow_from}, search={"weights": "ema", "ema": scored}
        )
        folder = tmp_path / f"{grow_from} {scored}"
        run(recipe, folder, max_steps=10)
        return [row["losses"] for row in read_rows(folder / "events.jsonl") if row["event"] == "measurement"]

    assert losses(1, 0) == losses(0, None) != losses(1, None)


def choices(folder: Path) -> list[tuple[int, int]]:
    """The Subnets that a run's searches chose."""
    stages = json.loads((folder / "results.json").read_text())["stages"]
    return [(s["resolution"], s["depth"]) for s in stages if s["searched"]]


def sample_ids(folder: Path, ranks: int) -> dict[int, list[int]]:
    """The samples of every global batch, by step, sorted."""
    steps: dict[int, list[int]] = {}
    for rank in range(ranks):
        for line in (folder / f"samples-{rank}.jsonl").read_text().splitlines():
            row = json.loads(line)
            steps[row["step"]] = sorted(steps.get(row["step"], []) + row["ids"])
    return steps
