"""scaleprog from Python, see docs/python.md. `from scaleprog import ...` gives what is here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from scaleprog.errors import ScaleprogError
from scaleprog.files.atomic import new_folder
from scaleprog.models.bare import grow_model
from scaleprog.planning.plan import Plan, describe
from scaleprog.recipe import Recipe
from scaleprog.reporting.history import RunRecord, read_run
from scaleprog.reporting.model_card import write_card
from scaleprog.training.evaluate_run import Evaluation, Request, evaluate_run
from scaleprog.training.export import Dtype, export_run
from scaleprog.training.hub import is_export, write_model
from scaleprog.training.longer import begin
from scaleprog.training.loop import train_rank
from scaleprog.training.saved import Weights

__all__ = [
    "Evaluation",
    "Plan",
    "Recipe",
    "RunRecord",
    "describe",
    "evaluate",
    "export",
    "grow_model",
    "load_run",
    "train",
]


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
    return train_rank(begin(recipe, run, None if parent is None else str(parent)), run, own_process=False)


def evaluate(
    run: Path | str,
    resolution: int | None = None,
    weights: Weights = "best",
    *,
    split: str = "val",
    data: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Top-1, top-5, and loss of a run's newest checkpoint on a split, whole and by class.

    Args:
        run: the run directory.
        resolution: pixels a side; default: the model's full size.
        weights: "best" takes the weights with the higher top-1.
        split: of the shards.
        data: the folder of other shards, a path or URL; default: the run's own.
        overrides: `key=value` over the run's recipe, for the keys that an evaluation reads.
    """
    shards = None if data is None else str(data)
    return evaluate_run(Path(run), Request(resolution, weights, split, shards, tuple(overrides)))


def export(
    run: Path | str,
    out: Path | str,
    weights: Weights = "best",
    dtype: Dtype = "float32",
    format: Literal["safetensors", "hf"] | None = None,
) -> str:
    """Writes a run's weights for plain timm; says how to load them.

    Args:
        run: the run directory.
        out: the file, or the folder, which does not exist, is empty, or holds an earlier export.
        weights: "best" takes those with the higher accuracy in the last evaluation; the others need no evaluation.
        dtype: of the floating-point tensors.
        format: "safetensors" writes a file, "hf" a Hugging Face folder with a model card; default: by the suffix of
            `out`, .safetensors or anything else.

    Raises:
        ScaleprogError: the run has no such weights, or `out` cannot be written.
    """
    run, out = Path(run), Path(out)
    if (format or out.suffix.removeprefix(".")) == "safetensors":
        return export_run(run, out, weights, dtype)
    try:
        with new_folder(out, is_export) as folder:
            exported = write_model(run, folder, weights, dtype)
            write_card(run, folder, exported.summary(), exported.found, exported.loading(out.name))
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        raise ScaleprogError(f"{out}: cannot write it: {why or error}; export into a new folder") from error
    told = f"{out}: {exported.weights} weights of step {exported.step}, {dtype}"
    return "\n".join([told, *exported.notes(), "load with:", exported.loading(str(out))])


def load_run(run: Path | str) -> RunRecord:
    """What a run directory tells: recipe, results, accuracies, phases, searches, events. Raises CheckpointError."""
    return read_run(Path(run), Path(run).name)
