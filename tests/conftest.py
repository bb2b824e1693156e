"""What the tests share: a small data set of drawn patterns, recipes over it, runs on one or several ranks."""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: neighbours on the machine must not slow each other down
if "SCALEPROG_TEST_GPU" not in os.environ:  # the tests compare ranks on CPUs; `make test-gpu` runs those for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist
from webdataset.writer import ShardWriter

from scaleprog.launchers.local import launch
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.shards.check import write_manifest
from scaleprog.training.loop import train_rank

# other work on the machine must not fail a test: hypothesis times examples and their drawing
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

SIDE, CLASSES = 32, 4
SHARDINGS: tuple[dict[str, Any], ...] = (
    {"engine": "fsdp"},
    {"engine": "hsdp", "shard": 2},
    {"engine": "zero", "stage": 1},
    {"engine": "zero", "stage": 2},
    {"engine": "zero", "stage": 3},
    {"engine": "replicated"},
)
"""Every engine on two or more ranks."""
WITHIN_A_BUDGET: dict[str, Any] = {
    "growth": {"schedule": "automatic", "stages": 3, "patches": "subset", "curriculum": True, "optimizer": "inherit"},
    "search": {"method": "budget", "budget": 0.57, "measurements": 2, "complete_steps": 0},
}
"""The default search and ours on top of it, over `short_recipe`, which searches as published."""
MINUTES = {
    "tests/slurm/test_signals.py": 13,
    "tests/distributed/test_volo.py": 6,
    "tests/distributed/test_imagenet_recipe.py": 6,
    "tests/distributed/test_backends.py": 5,
    "tests/slurm/test_refused.py": 5,
    "tests/slurm/test_hangs.py": 4,
    "tests/chaos/test_chaos.py": 4,
    "tests/slurm/test_allocation.py": 3,
    "tests/slurm/test_elastic.py": 3,
    "tests/distributed/test_growths.py": 3,
    "tests/distributed/test_hangs.py": 3,
    "tests/numerics/test_resume.py": 3,
    "tests/slurm/test_listening.py": 2,
    "tests/slurm/test_sweep.py": 2,
    "tests/distributed/test_restarts.py": 2,
    "tests/numerics/test_fork.py": 2,
    "tests/unit/test_interrupts.py": 2,
}
"""About how long the longest files take. They start first, so that no worker ends with one of them alone."""
MakeRecipe = Callable[..., Recipe]
CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "bases")
"""The recipes of the repository; those in bases/ are only parts of one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", dest="regenerate_golden", help="rewrite golden losses")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: -MINUTES.get(item.nodeid.partition("::")[0], 0))
    seen = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not seen:
            item.add_marker(pytest.mark.skip(reason="no GPU, or not by make test-gpu"))


def pattern(label: int, rng: np.random.Generator) -> np.ndarray:
    """A (SIDE, SIDE, 3) uint8 grating whose direction is its class, in noise."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    angle = np.pi * label / CLASSES
    wave = np.sin(12 * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6))
    colour = rng.uniform(0.3, 1, 3)
    return np.clip(128 + 90 * wave[..., None] * colour + rng.normal(0, 12, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def draw_patterns(folder: Path, seed: int = 0) -> Path:
    """Shards that plain webdataset wrote: 160 training and 24 validation images of 4 classes, in 5 + 2 tars."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, count, per_shard in (("train", 160, 36), ("val", 24, 13)):
        with ShardWriter(str(folder / f"{split}-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
            for i in range(count):
                image = cv2.imencode(".png", pattern(i % CLASSES, rng))[1].tobytes()
                writer.write({"__key__": f"{split}{i:05d}", "png": image, "cls": i % CLASSES})
    write_manifest(folder, workers=1)
    return folder


def short_recipe(shards: Path, **groups: Any) -> Recipe:
    """A short AutoProg run over the patterns, 20 steps an epoch; keyword groups are merged over it."""
    values: dict[str, Any] = {
        "model": {"name": "vit_tiny_patch16_224", "classes": CLASSES, "resolution": SIDE, "patch": 8,
                  "width": 32, "depth": 4, "heads": 2},
        "data": {"path": str(shards), "lanes": 4, "workers": 0},
        "augment": {"crop": "none", "eval_crop": 1.0, "flip": 0.5},
        "train": {"epochs": 4, "batch": 8, "log_every": 5},
        "optimizer": {"lr": 5e-4, "warmup_epochs": 0.5},
        "growth": {"schedule": "automatic", "stages": 3, "smallest": 0.5},
        "search": {"method": "published", "epochs": 0.5, "subset": 16, "times": "modelled"},
        "ema": {"momenta": [0.9]},
        "evaluate": {"every": 2, "batch": 12},
    }  # fmt: skip
    for group, settings in groups.items():
        values[group] = {**values.get(group, {}), **settings} if isinstance(settings, dict) else settings
    return Recipe.of(values, "test recipe")


@pytest.fixture(scope="session")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `draw_patterns`."""
    return draw_patterns(tmp_path_factory.mktemp("patterns"))


@pytest.fixture
def make_recipe(patterns: Path) -> MakeRecipe:
    """`short_recipe` over the patterns."""
    return partial(short_recipe, patterns)


def run(recipe: Recipe, folder: Path, ranks: int = 1, **changes: Any) -> dict[str, Any]:
    """Trains in this process (one rank) or in `ranks` new ones; `changes` to train.* such as max_steps."""
    if changes:
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    if ranks > 1:
        launch(ranks, train_rank, recipe, folder)
        return {}
    return train_rank(recipe, folder)


def step_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """The training steps of a run by number."""
    return {row["step"]: row for row in read_rows(folder / "metrics.jsonl") if "loss" in row}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A .jsonl file such as a run leaves."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
