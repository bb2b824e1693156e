"""After training: the accuracy of a run's newest checkpoint, and its weights for timm."""

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scaleprog.errors import CheckpointError, RecipeError, ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.models import resolve_family
from scaleprog.planning.plan import Plan, check_size
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.recipe import Recipe
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.state import RunState
from scaleprog.sharding import Backend
from scaleprog.training.evaluate import evaluate
from scaleprog.training.process import load_network, make_backend
from scaleprog.training.resume import owner_of, read_run_state, state_of

Weights = Literal["ema", "online", "best"]


def evaluate_run(run: Path, resolution: int | None, weights: Weights) -> tuple[float, str]:
    """Measures the top-1 accuracy of a run's newest checkpoint.

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
        backend, _ = _restored(run, recipe, coordinator, device, plan)
        size = plan.schedule.full.resolution if resolution is None else resolution
        found = evaluate(backend, coordinator, plan.data, recipe.evaluate.batch, _fitting(recipe, size))
    chosen = Accuracies(found).weights if weights == "best" else weights
    return found["top1" if chosen == "online" else "top1_ema"], chosen


def export_run(run: Path, out: Path) -> str:
    """Writes the better of a run's online and EMA weights to `out`, as safetensors under plain timm's names.

    Returns:
        Two lines for the user: what was written, and the call that loads it.

    Raises:
        CheckpointError: the run has no checkpoint or no evaluation yet, or a run of the recipe cannot have written it.
        ScaleprogError: `out` cannot be written.
    """
    recipe = Recipe.of_run(run)
    with process_group() as (coordinator, device):
        backend, state = _restored(run, recipe, coordinator, device)
        ema, chosen = _better(state, len(recipe.ema.momenta))
        whole = backend.gather(ema)
    model = backend.family(recipe.model, backend.structure)
    model.load_state_dict(whole)
    model.fold_gates()
    arguments = model.arguments(recipe.model, backend.structure.depths)
    tensors = {name: tensor.contiguous() for name, tensor in model.net.state_dict().items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out, {"timm": json.dumps(arguments), "weights": chosen, "step": str(state.step)})
    except (OSError, SafetensorError) as error:
        raise ScaleprogError(f"{out}: cannot write it: {error}") from error
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return (
        f"{out}: {chosen} weights of step {state.step}\n"
        f"load with: timm.create_model({keywords}).load_state_dict(safetensors.torch.load_file({str(out)!r}))"
    )


def _say(text: str) -> None:
    print(as_text(text, lines=True))


def _restored(
    run: Path, recipe: Recipe, coordinator: Coordinator, device: torch.device, plan: Plan | None = None
) -> tuple[Backend, RunState]:
    """The network of a run's newest checkpoint, whole in this process. Raises CheckpointError if there is none.

    `plan`: of the recipe; None needs no shards, but checks the state less strictly.
    """
    newest = Checkpoints(run / "checkpoints", coordinator, keep=1, owner=owner_of(recipe)).newest(_say)
    if newest is None:
        raise CheckpointError(f"{run}: no checkpoint yet; has the run trained?")
    family, full, _ = resolve_family(recipe.model)
    state = read_run_state(newest, recipe, family, full.depth) if plan is None else state_of(newest, plan)
    backend = make_backend("replicated", recipe, family, device)
    load_network(newest, state, backend, may_skip_layers=False)
    return backend, state


def _fitting(recipe: Recipe, resolution: int) -> int:
    stride = resolve_family(recipe.model)[2]
    if resolution < 1 or resolution % stride:
        raise RecipeError(f"--resolution: {resolution} is not a multiple of the model's stride, {stride} pixels")
    check_size(recipe, resolution, stride)
    return resolution


def _better(state: RunState, emas: int) -> tuple[int | None, str]:
    """The better weights in the last evaluation: the index of the EMA (None: online), and "ema" or "online"."""
    if not state.accuracies:
        raise CheckpointError(f"step {state.step} has no evaluation yet; resume the run first")
    found = Accuracies(state.accuracies)
    return (None if found.weights == "online" else found.best_ema(emas)), found.weights
