"""Computes one step of a run again, and says where numbers stopped being finite.

The step is reached from the newest checkpoint before it, with the settings of the start that wrote it, in a run
directory of its own; the run itself stays as it is. It is the same step bit for bit, unless a search by measured times
lies between.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import Recipe, directories
from scaleprog.rundir.checkpoint import RUN_ID
from scaleprog.rundir.folders import committed_step
from scaleprog.rundir.reading import each_row, read_rows
from scaleprog.rundir.records import EVENTS, METRICS
from scaleprog.rundir.storage import committed, read_manifest, step_of
from scaleprog.training.inputs import PhaseRequests
from scaleprog.training.loop import enter_phase, forward_and_backward, train
from scaleprog.training.process import Run
from scaleprog.version import ARITHMETIC

MOST_NAMES = 20  # of layers or parameters in a rank's report


@contextmanager
def copied(run: Path, step: int) -> Iterator[tuple[Recipe, Path, int]]:
    """A copy of a run that `replay_rank` trains up to step number `step` >= 1, and how many ranks the run had then.

    Afterwards, the folder `replay-STEP` in the run directory has two files per rank. `rank-R.json` holds the loss, the
    samples, the first layers whose output is not finite, the parameters whose gradient is not finite (not under zero,
    which keeps gradients elsewhere), and the norm of the gradients; `rank-R.safetensors` holds the images that the rank
    saw.

    Raises ScaleprogError if the run has no such step, or cannot be read.
    """
    saved = [path for path in committed(run / "checkpoints") if step_of(path) < step]
    recipe = Recipe.of(read_manifest(saved[-1]).recipe, str(saved[-1])) if saved else Recipe.of_run(run)
    if not saved and recipe.parent is not None:
        raise ScaleprogError(f"{run}: keeps no checkpoint before step {step}, and a fork has no beginning of its own")
    recipe = recipe.located(directories.to_read(run))
    starts = [event for event in read_rows(run / EVENTS) if event["event"] == "start" and event["step"] < step]
    if not starts:
        raise ScaleprogError(f"{run}: no start of this run has trained step {step}")
    trained = committed_step(run)
    for row in each_row(run / METRICS):
        trained = max(trained, row["step"] if "loss" in row and isinstance(row.get("step"), int) else 0)
    if step > trained + recipe.train.log_every:  # so many may have been trained and not recorded
        raise ScaleprogError(f"{run}: has trained {trained} steps, not step {step}")
    copy = result(run, step) / "run"
    shutil.rmtree(copy.parent, ignore_errors=True)
    (copy / "checkpoints").mkdir(parents=True)
    for path in saved:
        shutil.copytree(path, copy / "checkpoints" / path.name, copy_function=_link)
        shutil.copy(run / RUN_ID, copy)
    changes: dict[str, dict[str, Any]] = {
        "train": {"max_steps": step - 1, "accept_arithmetic": ARITHMETIC, "profile": None},  # 0: not even step 1
        "checkpoint": {"every": None, "every_steps": None, "every_minutes": None, "keep": len(saved) + 1},
        "optimizer": {"nonfinite": "skip", "most_skipped": step},
    }
    groups = {name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    try:
        yield recipe.model_copy(update={**groups, "tracking": ()}), copy, starts[-1].get("world", 1)
    finally:
        shutil.rmtree(copy, ignore_errors=True)
        with suppress(OSError):  # unless it holds reports
            copy.parent.rmdir()


def result(run: Path, step: int) -> Path:
    """The folder with the reports about a step."""
    return run / f"replay-{step:08d}"


def replay_rank(recipe: Recipe, copy: Path) -> None:
    """Trains the copy of a run up to a step, then examines it."""
    with process_group(recipe.train.deterministic) as (coordinator, device):
        train(recipe, copy, coordinator, device, at_stop=examine)


def examine(run: Run) -> None:
    """Computes the next step of a run, and writes what happens in it next to the run directory."""
    phase = enter_phase(run)
    if run.state.step != run.recipe.train.max_steps:
        raise CheckpointError(f"{run.folder}: the run ends at step {run.state.step}, before the one to be replayed")
    schedule, rank = run.plan.schedule, run.coordinator.rank
    subnet = phase.subnet(run.recipe.seed, run.state.step)
    with run.reader.stream(PhaseRequests(run, phase), schedule.view(phase.network).pixels) as batches:
        batch = next(batches).clone()
    found: list[str] = []
    with watched(run.backend.network.model, found):
        loss = forward_and_backward(run, phase, subnet, schedule.active(phase, subnet), batch)
    images = run.plan.data.images(batch, run.backend.device).cpu()
    gradients = [
        name
        for name, parameter in run.backend.network.model.named_parameters()
        if parameter.grad is not None and not _finite(parameter.grad)
    ]
    norm = run.backend.step(0.0, run.state.step)
    told = {
        "step": run.state.step + 1,
        "rank": rank,
        "loss": str(loss.item()),
        "grad_norm": str(float(norm)),
        "samples": batch.ids.tolist(),
        "images_finite": _finite(images),
        "layers": found[:MOST_NAMES],
        "gradients": gradients[:MOST_NAMES],
    }
    out = run.folder.parent
    (out / f"rank-{rank}.json").write_text(json.dumps(told, indent=1) + "\n")
    save_file(
        {"images": images, "labels": batch.labels, "ids": batch.ids},
        out / f"rank-{rank}.safetensors",
    )
    run.coordinator.barrier()


@contextmanager
def watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Inside, the names of modules whose output is not finite are added to `found`, in the order of the forward."""

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def summary(out: Path) -> str:
    """What the reports of all ranks in a folder `replay-STEP` say, in a few lines."""
    lines = []
    for path in sorted(out.glob("rank-*.json"), key=lambda path: int(path.stem.partition("-")[2])):
        told = json.loads(path.read_text())
        line = f"rank {told['rank']}: loss {told['loss']}, norm of the gradients {told['grad_norm']}"
        if told["layers"]:
            line += f"; not finite first: the output of {told['layers'][0]}"
        elif told["gradients"]:
            line += f"; not finite: the gradients of {', '.join(told['gradients'][:3])}"
        lines.append(line)
    return "\n".join([*lines, f"{out} holds each rank's images, and which samples they are"])


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has no second names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
