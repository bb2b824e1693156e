"""The cluster's recipe at its full model size, on shards made from a small tree of photographs."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_sample_images

from scaleprog.launchers.local import launch
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.shards import image_folder
from scaleprog.training.loop import train_rank

CLASSES = ("n01440764", "n02123045")


def crops(count: int, seed: int) -> Iterator[Image.Image]:
    """Random cuts of photographs that come with scikit-learn and scikit-image, of ImageNet-like sizes."""
    sources = [*load_sample_images().images, photographs.astronaut(), photographs.coffee(), photographs.chelsea()]
    rng = np.random.default_rng(seed)
    for i in range(count):
        image = Image.fromarray(sources[i % len(sources)])
        width, height = rng.integers(240, 300, 2).tolist()
        left, top = int(rng.integers(0, image.width - width)), int(rng.integers(0, image.height - height + 1))
        yield image.crop((left, top, left + width, top + height))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("shards")
    for split, count in (("train", 12), ("val", 4)):
        for c, name in enumerate(CLASSES):
            folder = tree / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(crops(count, seed=10 * c + (split == "val"))):
                image.save(folder / f"{name}_{i}.JPEG", quality=90)
    image_folder.build(tree, out, samples_per_shard=8, workers=1)
    return out


@pytest.mark.timeout(900)
def test_deit_small_autoprog_trains_three_steps_in_every_phase_on_two_ranks(imagenet: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(
        "configs/imagenet/deit_small_autoprog_100.yaml",
        ["model.classes=2", f"data.path={imagenet}", "data.lanes=2", "data.workers=1", "train.batch=12",
         "train.epochs=12", "optimizer.warmup_epochs=1.5", "search.epochs=1.5", "search.subset=12",
         "search.times=modelled", "search.budget=0.65", "search.complete_steps=0", "evaluate.every=12",
         "evaluate.batch=4",
         "sharding.precision=fp32"],
    )  # fmt: skip
    launch(2, train_rank, recipe, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    steps = Counter((row["stage"], row["phase"]) for row in rows)
    assert set(steps) == {(1, "train"), (2, "supernet"), (2, "train"), (3, "train")}
    assert min(steps.values()) >= 3
    assert (rows[-1]["resolution"], rows[-1]["depth"]) == (224, 12)
    assert (rows[0]["resolution"], rows[0]["depth"]) == (128, 6)
    assert all(np.isfinite(row["loss"]) for row in rows)
