"""The model card of an exported model: README.md in a Hugging Face folder, with the curve of the run's accuracy."""

import re
from collections.abc import Mapping
from pathlib import Path

from scaleprog.errors import CheckpointError
from scaleprog.files.atomic import read_text, write_whole
from scaleprog.files.display import as_markdown, as_text
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.reporting.figures import draw_accuracy
from scaleprog.reporting.grouping import curve
from scaleprog.reporting.history import RunRecord, read_run
from scaleprog.reporting.text_tables import cell, markdown_table

CARD, CURVE = "README.md", "accuracy_over_time.png"
FRONT_MATTER = """\
---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- scaleprog
---"""
"""No license: whoever publishes the weights chooses one."""


def write_card(run: Path, folder: Path, summary: Mapping[str, str], found: Mapping[str, float], loading: str) -> None:
    """Writes README.md and its picture into the folder of an exported model.

    Args:
        run: the run directory.
        folder: of the exported model.
        summary: what the model is, point by point.
        found: what the last evaluation before the checkpoint found, by the names that an evaluation uses.
        loading: the Python that loads the model.

    Raises:
        CheckpointError: the run directory cannot be read.
        OSError: the folder cannot be written.
    """
    told = read_run(run, run.resolve().name)
    draw_accuracy(folder / CURVE, [curve(told.name, told)])
    parts = [
        FRONT_MATTER,
        f"# {as_markdown(told.name)}",
        "An image classifier for [timm](https://github.com/huggingface/pytorch-image-models), trained by scaleprog "
        f"with the growth schedule {as_markdown(told.schedule)}.",
        "\n".join(f"- {key}: {as_markdown(value)}" for key, value in summary.items()),
        "## How to load it",
        _block("python", loading),
        "## Accuracy",
        *_accuracies(found),
        f"![Top-1 over the time of the training]({CURVE})",
        "## Schedule",
        *_schedule(told),
        "## Recipe",
        _block("yaml", _recipe(run)),
    ]
    write_whole(folder / CARD, "\n\n".join(parts) + "\n")


def _accuracies(found: Mapping[str, float]) -> list[str]:
    metrics = [name for name in found if "_ema" not in name]
    if not metrics:
        return ["The run had not evaluated these weights yet."]
    rows = [
        {"weights": weights, **{name: cell(found.get(f"{name}{ending}"), ".4g") for name in metrics}}
        for weights, ending in (("online", ""), ("EMA", "_ema"))
    ]
    return [
        "On the validation split, at the last evaluation before the checkpoint: accuracies in percent, and the mean "
        "cross-entropy.",
        markdown_table(rows),
    ]


def _schedule(told: RunRecord) -> list[str]:
    rows = [
        {
            "stage": str(segment.stage),
            "trained": "candidates of a search" if segment.phase == "supernet" else "one network",
            "network": segment.network.short,
            "steps": f"{segment.start + 1} to {segment.stop}",
        }
        for segment in told.segments
    ]
    return ["Networks as resolution x layers.", markdown_table(rows)] if rows else ["No step is recorded."]


def _recipe(run: Path) -> str:
    try:
        return as_text(read_text(run / RECIPE), lines=True).rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{run / RECIPE}: not readable: {error}") from error


def _block(language: str, text: str) -> str:
    """Text as a block of code, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
