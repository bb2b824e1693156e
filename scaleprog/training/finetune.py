"""The recipe that fine-tunes trained weights on other shards, as DeiT transfers to small data sets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaleprog.data.manifest import Manifest
from scaleprog.errors import RecipeError
from scaleprog.recipe import Recipe
from scaleprog.training.export import MODEL
from scaleprog.training.initial import read_metadata, timms_images

TRANSFER: dict[str, dict[str, Any]] = {
    "augment": {
        "color_jitter": 0.3,
        "randaugment": "rand-m9-mstd0.5-inc1",
        "mixup": 0.8,
        "cutmix": 1.0,
        "smoothing": 0.1,
        "repeats": 3,
    },
    "train": {"epochs": 1000, "batch": 768},
    "optimizer": {"lr": 1.125e-5, "weight_decay": 0.05, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-6},
    "growth": {"schedule": "original"},
    "sharding": {"precision": "autocast"},
    "evaluate": {"every": 10},
}
"""DeiT's transfer to CIFAR-10 with AdamW, as its first author gave it: 768 images, 1,000 epochs, a learning rate of
7.5e-6 * 768 / 512, the weight decay and augmentation of ImageNet (facebookresearch/dino issue 81), but neither random
erasing nor stochastic depth (facebookresearch/deit issue 45). `min_lr` is ours: with DeiT's 1e-5 the rate would hardly
fall. configs/transfer/cifar10.yaml says the same."""


def transfer_recipe(source: Path, data: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe for fine-tuning.

    Args:
        source: a run directory, or a file that `scaleprog export` wrote; another safetensors file needs the override
            `model.name` and, where its sizes are not timm's, more of them.
        data: the folder of the shards, a path or URL, which say the number of classes.
        overrides: `key=value`.

    Raises:
        RecipeError: the source or an override cannot be used.
        CheckpointError: `source` is a folder without a run.
        DataError: there are no shards.
    """
    shards = _recipe(source, data, {"name": "any"}, {}, overrides).data  # an override may name a manifest
    classes = len(Manifest.load(shards.path, shards.manifest).classes)
    model, shown = _of_run(source) if source.is_dir() else _of_file(source)
    if "name" not in model and not any(override.startswith("model.name=") for override in overrides):
        raise RecipeError(
            f"{source}: does not say which model it holds, as files of `scaleprog export` do; add model.name=NAME, a "
            "name of timm's"
        )
    if not shown:
        shown = timms_images(_recipe(source, data, {**model, "classes": classes}, {}, overrides).model)
    return _recipe(source, data, {**model, "classes": classes, "drop_path": 0.0}, shown, overrides)


def _recipe(
    source: Path, data: str | Path, model: Mapping[str, Any], shown: Mapping[str, Any], overrides: Sequence[str]
) -> Recipe:
    values = TRANSFER | {
        "model": model,
        "init": {"from": str(source)},
        "data": {"path": str(data)},
        "augment": {**TRANSFER["augment"], **shown},
    }
    return Recipe.overridden(values, overrides, f"the recipe for fine-tuning {source}")


def _of_run(run: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The model of a run, and how it is shown images, as settings."""
    recipe = Recipe.of_run(run)
    return recipe.model.model_dump(mode="json"), recipe.augment.model_dump(
        mode="json", include={"mean", "std", "eval_crop"}
    )


def _of_file(path: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The model in a file of `scaleprog export`, and how it is shown images, as settings; empty for another file."""
    metadata = read_metadata(path)
    names = {"mean": "mean", "std": "std", "eval_crop": "crop_pct"}
    try:
        model = json.loads(metadata.get(MODEL, "{}"))
        shown = {key: json.loads(metadata[name]) for key, name in names.items() if name in metadata}
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: its metadata is damaged: {error}; export it again") from error
    if not isinstance(model, dict):
        raise RecipeError(f"{path}: its metadata is damaged: `{MODEL}` is not a mapping; export it again")
    return model, shown
