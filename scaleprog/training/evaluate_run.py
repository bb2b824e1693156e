"""`scaleprog evaluate`: what a run's newest checkpoint reaches on a split, of its own shards or of others."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from scaleprog.data.evaluation import VALIDATION, EvaluationReader
from scaleprog.data.manifest import Manifest
from scaleprog.data.reader import TRAIN, DataSet
from scaleprog.errors import DataError, RecipeError
from scaleprog.files.atomic import write_whole
from scaleprog.files.location import local_path
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.models import resolve_family
from scaleprog.planning.checks import check_size
from scaleprog.planning.plan import manifest_of
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe import FREE, Recipe, directories
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.progress import ProgressLine
from scaleprog.rundir.reading import append_row
from scaleprog.rundir.records import EVALUATIONS
from scaleprog.rundir.state import RunState
from scaleprog.training.evaluate import Measured, Network, evaluate
from scaleprog.training.process import load_network, make_backend
from scaleprog.training.resume import read_run_state
from scaleprog.training.saved import Weights, newest_checkpoint

OVERRIDES = ("data", "sharding", "evaluate.batch", "augment.eval_crop", "augment.mean", "augment.std")
"""The keys that an evaluation reads; it trains nothing, so that the others have no meaning."""


@dataclass(frozen=True)
class Request:
    """What to evaluate, and how.

    Args:
        resolution: pixels a side (None: the complete model's).
        weights: "best" takes the weights with the higher top-1.
        split: of the shards.
        data: the folder of other shards, a path or URL (None: the run's own).
        overrides: `key=value` over the run's recipe, of the keys in OVERRIDES.
    """

    resolution: int | None = None
    weights: Weights = "best"
    split: str = VALIDATION
    data: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def ordinary(self) -> bool:
        """Whether the run itself would measure the same, apart from the resolution."""
        keys = {override.partition("=")[0] for override in self.overrides}
        return self.split == VALIDATION and self.data is None and keys <= {*FREE} - {"data.path", "data.manifest"}


@dataclass(frozen=True)
class ClassResult:
    """Top-1 in percent of the images of one class; None without images."""

    name: str
    images: int
    top1: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint of a run reaches.

    Args:
        top1, top5: percent of the images.
        loss: mean cross-entropy with the labels, without smoothing (None: it is not finite).
        weights: "online" or "ema".
        step: of the checkpoint.
        resolution: pixels a side.
        split: of the shards.
        images: their number.
        data: folder or URL of the shards.
        classes: the classes one by one.
    """

    top1: float
    top5: float
    loss: float | None
    weights: str
    step: int
    resolution: int
    split: str
    images: int
    data: str
    classes: tuple[ClassResult, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**values, "classes": tuple(ClassResult(**each) for each in values["classes"])})


def evaluate_run(run: Path, request: Request) -> Evaluation:
    """Measures a run's newest checkpoint on a split, in this process, and notes it in the run's evaluations.jsonl.

    Raises:
        RecipeError: the resolution or an override does not fit the model or an evaluation.
        DataError: the shards are missing, damaged, or of other classes than those that the run learned.
        CheckpointError: there is no checkpoint, or a run of the recipe cannot have written it.
    """
    with process_group() as (coordinator, device):
        return _evaluate(run, request, coordinator, device)


def evaluate_rank(run: Path, request: Request, out: Path) -> None:
    """One rank's part of `evaluate_run` on several; rank 0 writes the `Evaluation` into the file `out`, as JSON."""
    with process_group() as (coordinator, device):
        found = _evaluate(run, request, coordinator, device)
        if coordinator.rank == 0:
            write_whole(out, json.dumps(asdict(found)))


def _evaluate(run: Path, request: Request, coordinator: Coordinator, device: torch.device) -> Evaluation:
    trained = Recipe.of_run(run)
    recipe = evaluated_recipe(run, trained, request)
    family, full, stride = resolve_family(recipe.model)
    size = full.resolution if request.resolution is None else _fitting(recipe, request.resolution, stride)
    newest = newest_checkpoint(run, trained, coordinator)
    state = read_run_state(newest, trained, family, full.depth)
    manifest = _manifest(run, recipe, request.split, state)
    backend = make_backend(recipe.sharding.engine, recipe, family, device)
    load_network(newest, state, backend, may_skip_layers=False)
    data = DataSet(manifest, recipe.data, recipe.augment, recipe.model.channels)
    reader = EvaluationReader(data, request.split, recipe.evaluate.batch, coordinator.rank, coordinator.world)
    progress = ProgressLine(reader.count, 0, coordinator.rank == 0, f"batches of {request.split}")
    with closing(progress), closing(reader):
        found = evaluate(backend, coordinator, reader, size, between=progress.advance)
        progress.advance()
    if coordinator.rank == 0 and request.ordinary:
        _note(run, {"step": state.step, "resolution": size, **found.by_name()})
    return _evaluation(found, request, state.step, size, manifest)


def evaluated_recipe(run: Path, trained: Recipe, request: Request) -> Recipe:
    """The recipe of a run, with absolute paths, as an evaluation reads it. Raises RecipeError."""
    for override in request.overrides:
        key = override.partition("=")[0]
        if key == "evaluate.resolution":
            raise RecipeError(f"override {override}: use --resolution PIXELS")
        if not any(key == known or key.startswith(f"{known}.") for known in OVERRIDES):
            raise RecipeError(
                f"override {override}: an evaluation trains nothing, so it takes only keys of {', '.join(OVERRIDES)}"
            )
    values = trained.located(directories.to_read(run)).model_dump(mode="json")
    values["data"] |= {"token_labels": None}  # only training looks at them
    values["data"] |= {} if request.split == TRAIN else {"shards": None}
    values["data"] |= {} if request.data is None else {"path": request.data, "manifest": None}
    values["sharding"] = {"engine": "replicated", "precision": values["sharding"]["precision"]}
    recipe = Recipe.overridden(values, request.overrides, f"{run / RECIPE} and the overrides")
    return recipe.located(directories.to_train(run)[:1])


def _manifest(run: Path, recipe: Recipe, split: str, state: RunState) -> Manifest:
    """The manifest of the shards to evaluate on. Raises DataError."""
    folder = local_path(recipe.data.path)
    if folder is not None and not os.path.isdir(folder):
        raise DataError(f"{run}: there are no shards in {folder} on this machine; name their folder with --data SHARDS")
    manifest = manifest_of(recipe)
    if not manifest.samples(split):
        raise DataError(f"{manifest.root}: the split {split!r} has no samples; use another --split")
    manifest.verify_sizes(split)
    manifest.verify_counts(split)
    classes, found = recipe.model.classes, len(manifest.classes)
    now = manifest.identity()["classes"]
    learned = state.data.get("classes", now)  # early versions did not note it
    if found != classes or learned != now:
        then = learned if state.data else f"{classes} classes"
        raise DataError(
            f"{manifest.root}: the classes are not those that {run} learned ({then} then, {now} now), so an accuracy "
            "would mean nothing; point --data at shards of the same classes"
        )
    return manifest


def _fitting(recipe: Recipe, resolution: int, stride: int) -> int:
    if resolution < 1 or resolution % stride:
        below = max(0, resolution // stride) * stride
        near = f"{below} or {below + stride}" if below else f"{stride}"
        raise RecipeError(
            f"--resolution: {resolution} is not a multiple of the model's stride, {stride} pixels; use {near}"
        )
    check_size(recipe, resolution, stride)
    return resolution


def _note(run: Path, evaluation: dict[str, Any]) -> None:
    """Keeps an evaluation for `scaleprog report --table 2`, if the run directory can be written."""
    with suppress(OSError):
        append_row(run / EVALUATIONS, evaluation)


def _evaluation(found: Measured, request: Request, step: int, resolution: int, manifest: Manifest) -> Evaluation:
    accuracies = Accuracies(found.by_name())
    weights = accuracies.weights if request.weights == "best" else request.weights
    network: Network = None if weights == "online" else accuracies.best_ema(len(found.sums) - 1)
    top1, top5, loss = (found.mean(metric, network) for metric in ("top1", "top5", "val_loss"))
    counts = found.images.int().tolist()
    rows = zip(manifest.classes, counts, found.accuracies(network), strict=True)
    return Evaluation(
        top1=top1,
        top5=top5,
        loss=loss if math.isfinite(loss) else None,
        weights=weights,
        step=step,
        resolution=resolution,
        split=request.split,
        images=sum(counts),
        data=manifest.root,
        classes=tuple(ClassResult(*row) for row in rows),
    )
