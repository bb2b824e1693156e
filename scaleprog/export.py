"""From a run directory to something to use: the network of its checkpoint, its accuracy, its weights for timm."""

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from scaleprog.checkpoint import Checkpoints
from scaleprog.display import as_text
from scaleprog.errors import CheckpointError, RecipeError, ScaleprogError
from scaleprog.evaluate import evaluate
from scaleprog.models import family
from scaleprog.plan import Plan, check_size
from scaleprog.recipe import Recipe
from scaleprog.resume import owner_of, read_run_state, state_of
from scaleprog.run import load_network, make_backend
from scaleprog.sharding import Backend
from scaleprog.sharding.coordinator import Coordinator, process_group
from scaleprog.state import RunState

Weights = Literal["ema", "online", "best"]


def evaluate_run(run: Path, resolution: int | None, weights: Weights) -> tuple[float, str]:
    """Percent top-1 of a run's newest checkpoint at `resolution` (None: the model's full size), and which weights."""
    recipe = Recipe.of_run(run)
    with process_group() as (coordinator, device):
        plan = Plan.of(recipe, 1)
        backend, _ = _restored(run, recipe, coordinator, device, plan)
        size = plan.schedule.full.resolution if resolution is None else resolution
        found = evaluate(
            backend, coordinator, plan.manifest, recipe.data, recipe.augment, recipe.evaluate, _fitting(recipe, size)
        )
    accuracies = {"online": found["top1"], "ema": found["top1_ema"]}
    chosen = max(accuracies, key=accuracies.__getitem__) if weights == "best" else weights
    return accuracies[chosen], chosen


def export_run(run: Path, out: Path) -> str:
    """Writes the better of a run's online and EMA weights as safetensors with plain timm's names; says how to load."""
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
        raise ScaleprogError(f"{out}: cannot be written: {error}") from error
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

    `plan`: the recipe's, where its shards are there.
    """
    newest = Checkpoints(run / "checkpoints", coordinator, keep=1, owner=owner_of(recipe)).newest(_say)
    if newest is None:
        raise CheckpointError(f"{run}: no checkpoint yet; has the run trained?")
    elastic, full, _ = family(recipe.model)
    state = read_run_state(newest, recipe, elastic, full.depth) if plan is None else state_of(newest, plan)
    backend = make_backend("replicated", recipe, elastic, device)
    load_network(newest, state, backend, elastic=False)
    return backend, state


def _fitting(recipe: Recipe, resolution: int) -> int:
    stride = family(recipe.model)[2]
    if resolution < 1 or resolution % stride:
        raise RecipeError(f"--resolution: {resolution} is not a multiple of the model's stride, {stride} pixels")
    check_size(recipe, resolution, stride)
    return resolution


def _better(state: RunState, emas: int) -> tuple[int | None, str]:
    """The weights of highest accuracy in the last evaluation: index of the momentum network, None for online."""
    top1 = state.accuracies
    if not top1:
        raise CheckpointError(f"step {state.step} has no evaluation yet; train on")
    if top1["top1"] > top1["top1_ema"]:
        return None, "online"
    return (0 if emas == 1 else max(range(emas), key=lambda i: top1[f"top1_ema_{i}"])), "ema"
