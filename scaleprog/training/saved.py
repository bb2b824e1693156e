"""What a run's newest checkpoint holds, found and read after training."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaleprog.errors import CheckpointError
from scaleprog.files.display import as_text
from scaleprog.models import resolve_family
from scaleprog.models.elastic import Plain, Structure
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import ModelSettings
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import load_tensors, read_manifest
from scaleprog.sharding.placement import LocalSlice
from scaleprog.training.resume import owner_of, read_run_state

Weights = Literal["ema", "online", "best"]


@dataclass(frozen=True)
class Saved:
    """The network of a run's newest checkpoint, for plain timm.

    Args:
        recipe: the run's.
        model: what builds a complete model of the network's size.
        plain: the network, with its gates folded.
        weights: "online" or "ema".
        state: that of the checkpoint.
    """

    recipe: Recipe
    model: ModelSettings
    plain: Plain
    weights: str
    state: RunState


def read_saved(run: Path, weights: Weights, coordinator: Coordinator) -> Saved:
    """Reads the weights of a run's newest checkpoint that verifies, on every rank.

    `weights`: "best" takes those with the higher accuracy in the last evaluation.

    Raises:
        CheckpointError: the run has no checkpoint, or no evaluation that tells which weights are best, or a run of the
            recipe cannot have written the checkpoint.
    """
    recipe = Recipe.of_run(run)
    newest = newest_checkpoint(run, recipe, coordinator)
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
    return Saved(recipe, own, model.plain(recipe.model), chosen, state)


def newest_checkpoint(run: Path, recipe: Recipe, coordinator: Coordinator) -> Path:
    """A run's newest checkpoint that verifies. Raises CheckpointError if there is none."""

    def say(text: str) -> None:
        if coordinator.rank == 0:
            print(as_text(text, lines=True), file=sys.stderr)

    newest = Checkpoints(run / "checkpoints", coordinator, keep=1, owner=owner_of(recipe)).newest(say)
    if newest is None:
        raise CheckpointError(f"{run}: no checkpoint yet; has the run trained?")
    return newest


def _chosen(state: RunState, emas: int, weights: Weights) -> tuple[int | None, str]:
    """The weights to read: the index of the EMA (None: online), and "ema" or "online"."""
    if weights == "online":
        return None, weights
    if not state.accuracies:
        if weights == "ema" and emas == 1:
            return 0, weights
        raise CheckpointError(
            f"step {state.step} has no evaluation yet, which would tell the best weights; use --weights online"
            f"{' or ema' if emas == 1 else ''}, or resume the run first (a recipe that begins with them: init.weights)"
        )
    found = Accuracies(state.accuracies)
    if weights == "best" and found.weights == "online":
        return None, "online"
    return found.best_ema(emas), "ema"
