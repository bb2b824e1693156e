"""What the run directory of a fork takes over from its parent: one checkpoint, and the records up to its step.

The first start of the fork draws its curves in TensorBoard from the records.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scaleprog.errors import CheckpointError
from scaleprog.files.atomic import open_regular, write_parts, write_whole
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.recipe import Recipe
from scaleprog.rundir.appending import truncate
from scaleprog.rundir.checkpoint import RUN_ID
from scaleprog.rundir.reading import lines, still_told, to_line
from scaleprog.rundir.records import EVENT, EVENTS, METRICS
from scaleprog.rundir.storage import Manifest, prepare, publish, verify

TAKEN = ("init", "growth", "measurement", "choice", "evaluation", "damaged", "nonfinite")
"""The kinds of events that tell how the parent's network came about."""


def write_fork(folder: Path, parent: Path, checkpoint: Path, manifest: Manifest, recipe: Recipe, run: str) -> None:
    """Fills an empty folder with the run directory of a fork; its first start draws the curves.

    Args:
        folder: becomes the run directory.
        parent: the parent's run directory.
        checkpoint: the parent's checkpoint, which may be deleted meanwhile.
        manifest: the checkpoint's.
        recipe: the fork's.
        run: the ID of the new run.

    Raises:
        CheckpointError: a file of the checkpoint is missing or damaged.
        Unavailable: a file of the checkpoint cannot be read now.
        OSError: something cannot be written.
    """
    copy = folder / "checkpoints" / checkpoint.name
    temporary = copy.with_name(f".{copy.name}.0.writing")
    prepare(temporary)
    for name in manifest.files:
        _take(checkpoint / name, temporary / name)
    publish(temporary, copy, replace(manifest, run=run, permanent=False, recipe=recipe.model_dump(mode="json")))
    try:
        verify(copy)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(copy), str(checkpoint))) from None
    _copy_metrics(parent, folder, manifest.step)
    forked = {
        "time": time.time(),
        "event": "forked",
        "generation": 0,
        "step": manifest.step,
        "run": str(parent),
        "wall_seconds": manifest.state["wall_seconds"],
    }
    write_parts(folder / EVENTS, map(to_line, [*_events(parent / EVENTS, manifest.step), forked]))
    write_whole(folder / RUN_ID, run)
    write_whole(folder / RECIPE, recipe.dump())


def _take(source: Path, target: Path) -> None:
    """Links a file, which no run changes once it is written, or copies it where links are not possible."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    try:
        with open_regular(source, flags=os.O_NOFOLLOW) as file, open(target, "xb") as copy:
            shutil.copyfileobj(file, copy)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: missing") from error


def _copy_metrics(parent: Path, folder: Path, step: int) -> None:
    if (parent / METRICS).exists():
        _copy(parent / METRICS, folder / METRICS)
        truncate(folder / METRICS, step, redo_evaluation=False)


def _events(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """The events up to `step` that still hold and tell how the network came about."""
    known = []
    for line in lines(path) if path.exists() else ():
        try:
            EVENT.validate_json(line)
        except ValidationError:
            continue
        known.append(json.loads(line))
    for event in still_told(known):
        last = step - 1 if event["event"] == "growth" else step  # a growth at `step` belongs to the step after it
        if event["event"] in TAKEN and event.get("step", 0) <= last:
            yield {**event, "generation": 0}
