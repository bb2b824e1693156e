"""Two runs of one recipe compared: everything but the clocks must be equal, bit for bit."""

from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaleprog.models import resolve_family
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import committed, read_manifest
from scaleprog.training.process import load_network, make_backend

CLOCK = (  # differ by nature
    "step_seconds", "data_wait_seconds", "data_wait_share", "images_per_second", "cpu_seconds", "train_seconds",
    "train_cpu_seconds", "time", "collective_wait_seconds", "slowest_rank", "slowest_rank_seconds",
    "median_rank_seconds", "mfu", "host_mib", "device_allocated_mib", "device_reserved_mib", "device_peak_mib",
)  # fmt: skip


def differences(recipe: Recipe, folder: Path, reference: Path) -> list[str]:
    """What differs between two finished runs of as many ranks: weights, EMAs, moments, metrics, TensorBoard, sample
    ids."""
    mine, theirs = final_tensors(folder, recipe), final_tensors(reference, recipe)
    if mine.keys() != theirs.keys():
        return ["the networks have different tensors"]
    found = [f"tensor {name}" for name in mine if not torch.equal(mine[name], theirs[name])]
    state = final_state(reference)
    found += [f"state {key}" for key, value in final_state(folder).items() if state[key] != value]
    if without_clock(folder) != without_clock(reference):
        found.append("metrics.jsonl")
    curves = board(folder)
    found += [f"curve {tag}" for tag, points in board(reference).items() if curves.get(tag) != points]
    if rank_curves(folder) != rank_curves(reference):
        found.append("curves of the ranks")
    if samples(folder) != samples(reference):
        found.append("sample ids")
    return found


def final_tensors(folder: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, whole: weights, EMAs, moments."""
    newest = committed(folder / "checkpoints")[-1]
    state = RunState.from_json(read_manifest(newest).state)
    with process_group() as (_, device):
        backend = make_backend("replicated", recipe, resolve_family(recipe.model)[0], device)
        load_network(newest, state, backend, may_skip_layers=False)
        return {name: part.tensor for name, part in backend.state().items()}


def final_state(folder: Path) -> dict[str, Any]:
    """The state of a run's newest checkpoint, without what differs by nature."""
    state = read_manifest(committed(folder / "checkpoints")[-1]).state
    return {key: value for key, value in state.items() if not key.endswith("seconds")}


def without_clock(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what differs by nature."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(folder / "metrics.jsonl")]


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's series as TensorBoard shows them."""
    return {tag: points for tag, points in curves(folder).items() if not tag.endswith(CLOCK)}


def rank_curves(folder: Path) -> dict[str, dict[str, list[int]]]:
    """The steps of every series that a rank drew of its own; all of these are clocks."""
    return {
        path.name: {tag: [step for step, _ in points] for tag, points in curves(path).items()}
        for path in folder.glob("rank_*")
    }


def curves(board: Path) -> dict[str, list[tuple[int, float]]]:
    """The series of one folder as TensorBoard shows them."""
    events = EventAccumulator(str(board), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def texts(board: Path) -> dict[str, str]:
    """The text under each tag as TensorBoard shows it."""
    events = EventAccumulator(str(board)).Reload()
    found = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0] for tag in events.Tags()["tensors"]}
    return {tag: text.decode() for tag, text in found.items() if tag.endswith("/text_summary")}


def samples(folder: Path) -> dict[int, list[int]]:
    """The sample ids of every step, of all ranks (needs `data.trace`); of a step trained again, its last time."""
    rows = [row for path in sorted(folder.glob("samples-*.jsonl")) for row in read_rows(path)]
    last = dict(sorted((row["step"], row["generation"]) for row in rows))
    steps: dict[int, list[int]] = {}
    for row in rows:
        if row["generation"] == last[row["step"]]:
            steps.setdefault(row["step"], []).extend(row["ids"])
    return steps
