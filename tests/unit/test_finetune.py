"""Fine-tuning: the recipe that it makes of a run, of a file and of a file of others, and training by it."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from scaleprog.data.manifest import NAME
from scaleprog.errors import RecipeError
from scaleprog.recipe import Recipe
from scaleprog.training.export import export_run
from scaleprog.training.finetune import TRANSFER, transfer_recipe
from scaleprog.training.initial import _shown_otherwise
from tests.compare import differences
from tests.conftest import CLASSES, SIDE, MakeRecipe, draw_patterns, run, short_recipe
from tests.unit.command import Command, is_mistake

pytestmark = pytest.mark.process

CONFIGS = Path(__file__).parents[2] / "configs" / "transfer"
SHORT = ("train.epochs=1", "train.batch=8", "data.lanes=4", "data.workers=0", "optimizer.warmup_epochs=0.1",
         "augment.repeats=1", "evaluate.every=1", "evaluate.batch=12")  # fmt: skip


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_patterns(tmp_path_factory.mktemp("others"), seed=1)


def test_the_configs_say_what_the_command_does() -> None:
    base = yaml.safe_load((CONFIGS / "cifar10.yaml").read_text())
    assert {name: base[name] for name in TRANSFER} == TRANSFER
    for name, classes, lr in (("cifar10", 10, 1.125e-5), ("cifar100", 100, 7.5e-6)):
        recipe = Recipe.load(CONFIGS / f"{name}.yaml")
        assert (recipe.model.classes, recipe.optimizer.lr, recipe.init.source) == (classes, lr, "timm")


def test_a_run_is_fine_tuned_and_its_recipe_repeats_it(
    command: Command, make_recipe: MakeRecipe, others: Path, tmp_path: Path
) -> None:
    own = {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.1, 0.3], "eval_crop": 0.9}
    trained = make_recipe(growth={"schedule": "original"}, train={"epochs": 1}, augment=own, model={"drop_path": 0.1})
    run(trained, tmp_path / "first")
    told = command("finetune", tmp_path / "first", "--data", others, *SHORT, "--run-dir", tmp_path / "tuned")
    assert told.code == 0, told.err
    assert told.out.startswith(f"{tmp_path}/tuned: top-1 ")
    assert f"init.from: {tmp_path}/first: 4 layers" in told.err
    recipe = Recipe.of_run(tmp_path / "tuned")
    assert recipe.model == trained.model.model_copy(update={"drop_path": 0.0})
    assert (recipe.augment.mean, recipe.augment.eval_crop) == ((0.3, 0.4, 0.5), 0.9)
    assert (recipe.growth.schedule, recipe.data.path) == ("original", str(others))

    printed = command("finetune", tmp_path / "first", "--data", others, *SHORT, "--print")
    (tmp_path / "again.yaml").write_text(printed.out)
    assert command("train", tmp_path / "again.yaml", "--run-dir", tmp_path / "again").code == 0
    assert differences(recipe, tmp_path / "again", tmp_path / "tuned") == []


def test_classes_are_those_of_the_manifest_that_an_override_names(
    command: Command, make_recipe: MakeRecipe, others: Path, tmp_path: Path
) -> None:
    run(make_recipe(growth={"schedule": "original"}, train={"epochs": 1}), tmp_path / "first")
    copied, manifest = tmp_path / "copied", tmp_path / "manifest.json"
    shutil.copytree(others, copied)
    (copied / NAME).rename(manifest)
    told = command("finetune", tmp_path / "first", "--data", copied, f"data.manifest={manifest}", "--print")
    assert told.code == 0, told.err
    assert yaml.safe_load(told.out)["model"]["classes"] == CLASSES
    without = command("finetune", tmp_path / "first", "--data", copied, "--print")
    assert is_mistake(without, str(copied))


def test_a_file_says_which_model_it_holds(
    command: Command, make_recipe: MakeRecipe, others: Path, tmp_path: Path
) -> None:
    stages = [{"resolution": SIDE, "depth": depth} for depth in (2, 4)]
    trained = make_recipe(growth={"schedule": stages})
    run(trained, tmp_path / "first", max_steps=2)
    path = tmp_path / "weights.safetensors"
    export_run(tmp_path / "first", path, "online")
    recipe = transfer_recipe(path, others)
    assert recipe.model == trained.model.model_copy(update={"depth": 2}), "of the network, not of the complete model"
    assert (recipe.init.source, recipe.augment.eval_crop) == (str(path), trained.augment.eval_crop)

    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path)
    assert is_mistake(
        command("finetune", path, "--data", others), "does not say which model it holds", "add model.name=NAME"
    )
    recipe = transfer_recipe(path, others, ["model.name=vit_tiny_patch16_224", "model.depth=2"])
    assert (recipe.model.classes, recipe.model.depth, recipe.augment.mean) == (CLASSES, 2, None)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": "{"}, "its metadata is damaged: Expecting"),
        ({"model": "[" * 100_000}, "its metadata is damaged: maximum recursion"),
        ({"model": "[]"}, "its metadata is damaged: `model` is not a mapping"),
        ({"model": '{"name": 3}'}, r"the recipe for fine-tuning .*weights\.safetensors:\n  model.name: "),
        ({"model": '{"name": "x"}', "mean": '"red"'}, r"augment\.mean: "),
    ],
)
def test_damaged_metadata(metadata: dict[str, str], message: str, others: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata)
    with pytest.raises(RecipeError, match=message):
        transfer_recipe(path, others)


def test_what_cannot_be_fine_tuned(command: Command, patterns: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    assert is_mistake(command("finetune", missing, "--data", patterns), f"{missing}: no such file of weights")
    assert is_mistake(command("finetune", tmp_path, "--data", patterns), "not a run directory")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/recipe.yaml").write_text(short_recipe(patterns).dump())
    tuned = tmp_path / "tuned"
    told = command("finetune", tmp_path / "begun", "--data", patterns, "--run-dir", tuned)
    assert is_mistake(told, f"{tmp_path}/begun: no checkpoint yet")
    assert not tuned.exists()
    assert is_mistake(command("finetune", missing, "--data", tmp_path), "has no manifest.json")


def test_weights_of_timms_see_images_as_they_have_always_seen_them(others: Path, tmp_path: Path) -> None:
    """A file of timm's does not say how, but timm does: augreg's weights know images from -1 to 1."""
    path, half = tmp_path / "weights.safetensors", (0.5, 0.5, 0.5)
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    shown = transfer_recipe(path, others, ["model.name=vit_small_patch16_224"]).augment
    assert (shown.mean, shown.std, shown.eval_crop) == (half, half, 0.9)
    assert transfer_recipe(path, others, ["model.name=vit_small_patch16_224", "augment.mean=[0,0,0]"]).augment.mean == (
        0, 0, 0
    )  # fmt: skip
    for other in ("model.depth=3", "model.channels=1"):
        assert transfer_recipe(path, others, ["model.name=vit_small_patch16_224", other]).augment.mean is None
    values = {
        "model": {"name": "vit_small_patch16_224"}, "data": {"path": "x"}, "init": {"from": "timm"},
        "train": {"epochs": 1, "batch": 8},
    }  # fmt: skip
    told = _shown_otherwise(Recipe.of(values, "test"))
    assert "augment.mean=[0.5,0.5,0.5] augment.std=[0.5,0.5,0.5]" in told
    right = Recipe.overridden(values, told.rpartition(": ")[2].split(), "test")
    assert _shown_otherwise(right) == ""
    assert _shown_otherwise(Recipe.overridden(values, ["model.name=deit_small_patch16_224"], "test")) == ""
