"""How many images a second a core prepares for a recipe: which sizes are measured, and on what."""

import json
from pathlib import Path

import cv2
import pytest
import torch

from scaleprog.errors import DataError
from scaleprog.recipe.keys import AugmentSettings
from scaleprog.shards.speed import ceiling, measure, sample
from tests.conftest import MakeRecipe
from tests.unit.command import Command, WriteRecipe, is_mistake, rows_of


def test_every_size_of_the_run_is_measured(make_recipe: MakeRecipe) -> None:
    threads = torch.get_num_threads(), cv2.getNumThreads()
    found = measure(make_recipe(growth={"schedule": "linear"}), images=8, turns=1)
    for rates in (found.whole, found.decoded, found.copied):
        assert list(rates) == [16, 24, 32]
        assert min(rates.values()) > 0
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads


def test_a_subset_of_patches_is_decoded_at_full_size(make_recipe: MakeRecipe) -> None:
    assert list(measure(make_recipe(growth={"schedule": "linear", "patches": "subset"}), 8, 1).whole) == [32]


@pytest.mark.parametrize(("images", "shards"), [(1, 1), (36, 1), (37, 2), (160, 5), (10**6, 5)])
def test_only_the_shards_that_hold_enough_images_are_read(images: int, shards: int, make_recipe: MakeRecipe) -> None:
    data, order = sample(make_recipe(augment={"repeats": 2}), images)
    assert len(data.manifest.split("train")) == len(order.counts) == shards
    assert (order.lanes, order.batch, order.repeats) == (1, 2, 2), "one lane of the run: 8 images in 4 lanes"
    assert data.settings.cache * 2**20 >= sum(shard.bytes for shard in data.manifest.split("train"))


def test_the_ceiling_has_the_same_crops_and_nothing_else(make_recipe: MakeRecipe) -> None:
    everything = {"crop": "padded", "padding": 3, "randaugment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "repeats": 2}
    data, _ = sample(make_recipe(augment=everything), 1)
    assert ceiling(data).augment == AugmentSettings(crop="padded", padding=3, flip=0.0, repeats=2)


def test_the_command_prints_json_and_a_table(
    command: Command, write_recipe: WriteRecipe, patterns: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(data={"path": "not/there"}, model={"classes": 7}, train={"batch": 4096})
    told = command("shards", "speed", patterns, recipe, "growth.schedule=linear", "--images=8", "--turns=1", "--json")
    rates = json.loads(told.out)["images_per_core_second"]
    assert list(rates) == ["16", "24", "32"]
    assert all(rate > 0 for rate in rates.values())
    monkeypatch.setenv("COLUMNS", "80")
    told = command("shards", "speed", patterns, recipe, "--images=8", "--turns=1")
    assert [row[0] for row in rows_of(told.out)] == ["32"]


def test_shards_that_are_missing_are_named(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    told = command("shards", "speed", tmp_path / "nowhere", write_recipe())
    assert is_mistake(told, f"{tmp_path}/nowhere: the folder of shards does not exist")


def test_a_damaged_shard_ends_the_measurement(make_recipe: MakeRecipe, patterns: Path, tmp_path: Path) -> None:
    for path in patterns.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512] + b"x" * 512)
    with pytest.raises(DataError, match="the checksum differs"):
        measure(make_recipe(data={"path": str(tmp_path)}), images=8, turns=1)
