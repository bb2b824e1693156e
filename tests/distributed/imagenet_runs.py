"""Recipes for ImageNet at full model size on two ranks, for a few steps, on shards from tars of the official form."""

import gc
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

from scaleprog.launchers.local import launch
from scaleprog.planning.devices import Device
from scaleprog.planning.plan import forecast
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.sharding.backend import Backend
from scaleprog.shards import imagenet, token_labels
from scaleprog.training import loop
from scaleprog.training.process import Run
from tests.conftest import CONFIGS
from tests.distributed.ranks import live_tensors, most_held
from tests.unit.imagenet_files import write_imagenet

ENGINES = {"fsdp": ("sharding.engine=fsdp",), "zero 3": ("sharding.engine=zero", "sharding.stage=3")}
"""What a recipe is overridden with, by the engine's name in `forecast`."""
RANKS, CLASSES, PER_SHARD, TEACHER = 2, 1000, 8, "test_byobnet"


@dataclass(frozen=True)
class Outcome:
    """What a short run did: steps by stage and phase, and rank 0's largest memory, in bytes, measured and planned."""

    steps: dict[str, int]
    last: tuple[int, int]
    finite: bool
    peak: int
    planned: int


def draw_shards(out: Path, source: Path) -> None:
    """Builds shards of 1,000 classes from files of ImageNet's official form, and their token labels beside them."""
    write_imagenet(source, classes=CLASSES, per_class=1, val_per_class=1, val_images=PER_SHARD, size=(240, 300))
    imagenet.build(source, out, samples_per_shard=PER_SHARD, workers=1)
    torch.save(timm.create_model(TEACHER, num_classes=CLASSES).state_dict(), source / "teacher.pth")
    token_labels.build(out, labels_of(out), TEACHER, source / "teacher.pth", 64, 5, 32, 1)


def labels_of(data: Path) -> Path:
    """The token labels of the shards in `data`."""
    return data.with_name(f"{data.name}-token-labels")


def shortened(name: str, engine: str, data: Path, *overrides: str) -> Recipe:
    """The recipe `name` with 3 steps an epoch, of which each search takes one epoch and each stage two.

    `overrides` are laid over it. A lane holds four images, or the six that Mixup needs with repeated augmentation.
    """
    path = CONFIGS / "imagenet" / f"{name}.yaml"
    whole = Recipe.load(path)
    batch = RANKS * (4 if whole.augment.repeats == 1 else 6)
    lengths = (
        f"data.path={data}",
        *([f"data.token_labels={labels_of(data)}"] if whole.data.token_labels else []),
        f"data.shards={-(-3 * batch // PER_SHARD)}",
        f"data.lanes={RANKS}",
        f"train.batch={batch}",
        "train.epochs=8",
        "optimizer.warmup_epochs=1",
        f"optimizer.cooldown_epochs={min(0.34, whole.optimizer.cooldown_epochs)}",
        "search.epochs=1",
        f"search.subset={batch}",
        "search.complete_steps=3",
        "evaluate.every=100",
        "evaluate.batch=4",
    )
    return Recipe.load(path, [*lengths, *ENGINES[engine], *overrides])


def run_short(name: str, engine: str, data: Path, folder: Path, *overrides: str) -> Outcome:
    """Trains the shortened recipe in the run directory `folder`."""
    recipe = shortened(name, engine, data, *overrides)
    launch(RANKS, measured_rank, recipe, folder)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    _, planned = forecast(recipe, RANKS, Device.named("h100"))[f"{engine} *"]
    return Outcome(
        steps=dict(Counter(f"{row['stage']} {row['phase']}" for row in rows)),
        last=(rows[-1]["resolution"], rows[-1]["depth"]),
        finite=bool(np.isfinite([row["loss"] for row in rows]).all()),
        peak=json.loads((folder / "peak.json").read_text()),
        planned=planned,
    )


def measured_rank(recipe: Recipe, folder: Path) -> None:
    """Trains as a rank, and records the most memory that tensors took on rank 0 in any growth, measurement or step.

    Each is profiled by itself, because the profiler does not see when the garbage collector frees an old network.
    """
    peaks: list[int] = []
    runs: list[Run] = []

    def noted(run: Run, *arguments: Any) -> Any:
        runs.append(run)
        return enter(run, *arguments)

    def measured(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            gc.collect()
            copies = sum(copy.nbytes for copy in runs[-1].checkpoints._host.values())  # on a GPU, not in its memory
            before = live_tensors() - copies
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                result = call(*arguments, **named)
            peaks.append(before + most_held(profiler))
            return result

        return wrapped

    enter = loop.enter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "enter", noted)
        for owner, name in ((Backend, "regrow"), (loop, "run_pending"), (loop, "train_step")):
            patch.setattr(owner, name, measured(getattr(owner, name)))
        loop.train_rank(recipe, folder)
    if int(os.environ["RANK"]) == 0:
        (folder / "peak.json").write_text(json.dumps(max(peaks)))
