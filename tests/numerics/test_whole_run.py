"""A whole short AutoProg run on sharded ranks against one unsharded process."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scaleprog.recipe import Recipe
from tests.conftest import run, step_rows

CALM = {"lr": 2e-4}  # AdamW amplifies rounding with the learning rate: what is compared are engines, not chaos
OPERATORS = ("mogrow", "identity", "stacking", "rand_init", "interpolation")


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_fsdp_ranks_train_what_one_process_trains(
    operator: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    optimizer = "inherit" if operator in ("stacking", "identity") else "reset"
    growth = {"schedule": "automatic", "stages": 3, "operator": operator, "optimizer": optimizer}
    recipe = make_recipe(growth=growth, data={"trace": True}, optimizer=CALM)
    alone = recipe.model_copy(update={"sharding": recipe.sharding.model_copy(update={"engine": "replicated"})})
    run(alone, tmp_path / "alone")
    run(recipe, tmp_path / "sharded", ranks=2)
    reference, sharded = step_rows(tmp_path / "alone"), step_rows(tmp_path / "sharded")
    assert reference.keys() == sharded.keys() == set(range(1, 81))
    assert {r["phase"] for r in reference.values()} == {"supernet", "train"}
    for step, row in reference.items():
        mine = sharded[step]
        assert mine["loss"] == pytest.approx(row["loss"], rel=1e-5), f"step {step}"
        assert (mine["resolution"], mine["depth"], mine["lr"]) == (row["resolution"], row["depth"], row["lr"])
    assert choices(tmp_path / "sharded") == choices(tmp_path / "alone")
    assert len(choices(tmp_path / "alone")) == 2


@pytest.mark.parametrize(("ranks", "engine"), [(2, "replicated"), (4, "fsdp")])
def test_sample_ids_and_losses_do_not_depend_on_ranks_or_engine(
    ranks: int, engine: str, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make_recipe(
        data={"trace": True}, sharding={"engine": engine}, model={"drop_path": 0.1}, optimizer=CALM,
        augment={"crop": "resized", "scale": (0.4, 1.0), "mixup": 0.8, "cutmix": 1.0, "erase": 0.25},
    )  # fmt: skip
    run(recipe, tmp_path / "one")
    run(recipe, tmp_path / "many", ranks=ranks)
    assert sample_ids(tmp_path / "one", 1) == sample_ids(tmp_path / "many", ranks)
    one, many = step_rows(tmp_path / "one"), step_rows(tmp_path / "many")
    assert [many[s]["loss"] for s in one] == pytest.approx([row["loss"] for row in one.values()], rel=1e-5)


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
