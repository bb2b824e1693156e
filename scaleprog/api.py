"""scaleprog from Python, see docs/python.md. `from scaleprog import ...` gives what is here."""

from pathlib import Path
from typing import Any

from scaleprog.models.bare import grow_model
from scaleprog.planning.plan import Plan, describe
from scaleprog.recipe import Recipe
from scaleprog.reporting.history import RunRecord, read_run
from scaleprog.training.export import Dtype, Weights, evaluate_run, export_run
from scaleprog.training.longer import begin
from scaleprog.training.loop import train_rank

__all__ = ["Plan", "Recipe", "RunRecord", "describe", "evaluate", "export", "grow_model", "load_run", "train"]


def train(recipe: Recipe, run: Path | str, parent: Path | str | None = None) -> dict[str, Any]:
    """Trains a recipe in this process, on one rank; resumes a run directory that exists.

    Args:
        recipe: what is trained.
        run: the run directory.
        parent: RUN or RUN@STEP, the run and the step of the checkpoint from which a new run continues.

    Returns:
        What results.json holds: accuracies in percent, times in seconds, and what every stage trained.

    Raises:
        ScaleprogError: of a kind that says what the user can put right.
    """
    run = Path(run)
    return train_rank(begin(recipe, run, None if parent is None else str(parent)), run)


def evaluate(run: Path | str, resolution: int | None = None, weights: Weights = "best") -> tuple[float, str]:
    """Top-1 in percent of a run's newest checkpoint on the validation split, and whose weights they are.

    `resolution` is in pixels; default: the model's full size.
    """
    return evaluate_run(Path(run), resolution, weights)


def export(run: Path | str, out: Path | str, weights: Weights = "best", dtype: Dtype = "float32") -> str:
    """Writes a run's weights as safetensors for plain timm; says how to load them."""
    return export_run(Path(run), Path(out), weights, dtype)


def load_run(run: Path | str) -> RunRecord:
    """What a run directory tells: recipe, results, accuracies, phases, searches, events. Raises CheckpointError."""
    return read_run(Path(run), Path(run).name)
