"""After training: the accuracy of a run's newest checkpoint, and its weights for timm."""

import json
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scaleprog.data.augment import normalization
from scaleprog.data.evaluation import VALIDATION, EvaluationReader
from scaleprog.errors import CheckpointError, DataError, RecipeError, ScaleprogError
from scaleprog.files.atomic import replaced
from scaleprog.files.display import as_text
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Plain, Structure
from scaleprog.planning.plan import Plan, check_size
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import ModelSettings
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.reading import open_to_append, to_line
from scaleprog.rundir.records import EVALUATIONS
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import load_tensors, read_manifest
from scaleprog.sharding.placement import LocalSlice
from scaleprog.training.evaluate import evaluate
from scaleprog.training.process import load_network, make_backend
from scaleprog.training.resume import owner_of, read_run_state, state_of

Weights = Literal["ema", "online", "best"]
Dtype = Literal["float32", "bfloat16", "float16"]
MODEL = "model"
"""The key of a file's metadata with the settings of its model, as JSON."""


def evaluate_run(run: Path, resolution: int | None, weights: Weights) -> tuple[float, str]:
    """Measures the top-1 accuracy of a run's newest checkpoint, and records it in the run's evaluations.jsonl.

    Args:
        run: the run directory.
        resolution: pixels a side (None: the complete model's).
        weights: "best" takes the weights with the higher accuracy.

    Returns:
        Top-1 in percent, and the weights that reach it: "online" or "ema".

    Raises:
        RecipeError: `resolution` does not fit the model.
        DataError: the shards are missing, damaged, or do not fit the recipe.
        CheckpointError: there is no checkpoint, or a run of the recipe cannot have written it.
    """
    recipe = Recipe.of_run(run)
    with process_group() as (coordinator, device):
        plan = Plan.of(recipe)
        newest = _newest(run, recipe, coordinator)
        state = state_of(newest, plan)
        backend = make_backend("replicated", recipe, plan.family, device)
        load_network(newest, state, backend, may_skip_layers=False)
        classes = plan.manifest.identity()["classes"]
        if state.data.get("classes", classes) != classes:
            raise DataError(
                f"{plan.manifest.root}: the classes are not those that {run} learned ({state.data['classes']} then, "
                f"{classes} now), so an accuracy would mean nothing; point data.path at shards of the same classes"
            )
        size = plan.schedule.full.resolution if resolution is None else resolution
        reader = EvaluationReader(plan.data, VALIDATION, recipe.evaluate.batch, coordinator.rank, coordinator.world)
        with closing(reader):
            found = evaluate(backend, coordinator, reader, _fitting(recipe, size))
    _record(run, {"step": state.step, "resolution": size, "top1": found["top1"], "top1_ema": found["top1_ema"]})
    chosen = Accuracies(found).weights if weights == "best" else weights
    return found["top1" if chosen == "online" else "top1_ema"], chosen


def _record(run: Path, evaluation: dict[str, Any]) -> None:
    """Keeps an evaluation for `scaleprog report --table 2`, if the run directory can be written."""
    with suppress(OSError), open_to_append(run / EVALUATIONS) as file:
        file.write(to_line(evaluation))


def export_run(run: Path, out: Path, weights: Weights = "best", dtype: Dtype = "float32") -> str:
    """Writes a run's weights to `out`, as safetensors under plain timm's names, with what timm needs to show it images.

    Args:
        run: the run directory.
        out: the file.
        weights: "best" takes those with the higher accuracy in the last evaluation; the others need no evaluation.
        dtype: of the floating-point tensors.

    Returns:
        Two lines for the user: what was written, and the call that loads it.

    Raises:
        CheckpointError: the run has no checkpoint, or no evaluation that tells which weights are best, or a run of the
            recipe cannot have written the checkpoint.
        ScaleprogError: `out` cannot be written.
    """
    with process_group() as (coordinator, _):
        saved = read_saved(run, weights, coordinator)
    plain, shown = saved.plain, preprocessing(saved.recipe)
    arguments = dict(plain.arguments)
    if plain.builder == "timm.create_model":  # only that knows it
        arguments["pretrained_cfg_overlay"] = shown
    to = getattr(torch, dtype)
    tensors = {
        name: (tensor.to(to) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in plain.tensors.items()
    }
    about = {"timm": json.dumps(arguments), "weights": saved.weights, "step": str(saved.step)}
    about |= {MODEL: saved.model.model_dump_json()}
    about |= {key: json.dumps(value) for key, value in shown.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(out) as temporary:
            save_file(tensors, temporary, about)
    except (OSError, SafetensorError) as error:
        raise ScaleprogError(f"{out}: cannot write it: {error}") from error
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return (
        f"{out}: {saved.weights} weights of step {saved.step}, {dtype}\n"
        f"load with: {plain.builder}({keywords}).load_state_dict(safetensors.torch.load_file({str(out)!r}))"
    )


@dataclass(frozen=True)
class Saved:
    """The network of a run's newest checkpoint, for plain timm.

    Args:
        recipe: the run's.
        model: what builds a complete model of the network's size.
        plain: the network, with its gates folded.
        weights: "online" or "ema".
        step: of the checkpoint.
    """

    recipe: Recipe
    model: ModelSettings
    plain: Plain
    weights: str
    step: int


def read_saved(run: Path, weights: Weights, coordinator: Coordinator) -> Saved:
    """Reads the weights of a run's newest checkpoint that verifies, on every rank; see `export_run` for what it raises.

    `weights`: "best" takes those with the higher accuracy in the last evaluation.
    """
    recipe = Recipe.of_run(run)
    newest = _newest(run, recipe, coordinator)
    family, full, _ = resolve_family(recipe.model)
    state = read_run_state(newest, recipe, family, full.depth)
    ema, chosen = _chosen(state, len(recipe.ema.momenta), weights)
    model, of = family(recipe.model, Structure(state.gated)), "online" if ema is None else f"ema.{ema}"
    parts = {f"{of}/{name}": LocalSlice.whole(parameter) for name, parameter in model.named_parameters()}
    parts |= {f"{of}.statistics/{name}": LocalSlice.whole(norm.running) for name, norm in model.norms.items()}
    saved = {name for name in read_manifest(newest).tensors if name.startswith((f"{of}/", f"{of}.statistics/"))}
    if unlike := saved - parts.keys():
        raise CheckpointError(f"{newest}: does not fit this run: {min(unlike)} is not in the network")
    load_tensors(newest, parts, subset=True)
    model.fold_gates()
    depth = sum(map(len, state.gated))
    own = recipe.model if depth == full.depth else recipe.model.model_copy(update={"depth": depth})
    return Saved(recipe, own, model.plain(recipe.model), chosen, state.step)


def preprocessing(recipe: Recipe) -> dict[str, Any]:
    """How evaluation prepares images, under timm's names: `timm.data.create_transform` needs them, because its defaults
    for most models are other ones."""
    mean, std = normalization(recipe.augment, recipe.model.channels)
    side = resolve_family(recipe.model)[1].resolution
    return {
        "input_size": (recipe.model.channels, side, side),
        "interpolation": "bicubic",
        "mean": mean,
        "std": std,
        "crop_pct": recipe.augment.eval_crop,
        "crop_mode": "center",
    }


def _say(text: str) -> None:
    print(as_text(text, lines=True))


def _newest(run: Path, recipe: Recipe, coordinator: Coordinator) -> Path:
    """A run's newest checkpoint that verifies. Raises CheckpointError if there is none."""
    newest = Checkpoints(run / "checkpoints", coordinator, keep=1, owner=owner_of(recipe)).newest(_say)
    if newest is None:
        raise CheckpointError(f"{run}: no checkpoint yet; has the run trained?")
    return newest


def _fitting(recipe: Recipe, resolution: int) -> int:
    stride = resolve_family(recipe.model)[2]
    if resolution < 1 or resolution % stride:
        below = max(0, resolution // stride) * stride
        near = f"{below} or {below + stride}" if below else f"{stride}"
        raise RecipeError(
            f"--resolution: {resolution} is not a multiple of the model's stride, {stride} pixels; use {near}"
        )
    check_size(recipe, resolution, stride)
    return resolution


def _chosen(state: RunState, emas: int, weights: Weights) -> tuple[int | None, str]:
    """The weights to export: the index of the EMA (None: online), and "ema" or "online"."""
    if weights == "online":
        return None, weights
    if not state.accuracies:
        if weights == "ema" and emas == 1:
            return 0, weights
        raise CheckpointError(
            f"step {state.step} has no evaluation yet, which would tell the best weights; use --weights online"
            f"{' or ema' if emas == 1 else ''}, or resume the run first"
        )
    found = Accuracies(state.accuracies)
    if weights == "best" and found.weights == "online":
        return None, "online"
    return found.best_ema(emas), "ema"
