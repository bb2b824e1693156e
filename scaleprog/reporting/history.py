"""Reads a run directory for reports: recipe, results, phases, searches, events and timeline."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from scaleprog.errors import CheckpointError
from scaleprog.files import plain_yaml
from scaleprog.growth.space import Subnet
from scaleprog.recipe import directories
from scaleprog.reporting.figures import Search, Segment
from scaleprog.reporting.timeline import Timeline, read_timeline, waited
from scaleprog.rundir.accuracies import Accuracies
from scaleprog.rundir.reading import checked, read, read_object, still_told
from scaleprog.rundir.records import (
    EVALUATED_AT,
    EVALUATIONS,
    EVENT,
    EVENTS,
    LEFT,
    METRIC,
    METRICS,
    REQUEUES,
    RESULTS,
    STRICT,
    Name,
    Results,
    Size,
)
from scaleprog.rundir.state import decision_from_json, unpaired

Row = dict[str, Any]
UNSEEN = (
    "tracking", "checkpoint", "train.max_steps", "train.log_every", "train.patience", "train.rank_curves",
    "train.profile", "train.accept_arithmetic", "data.workers", "data.prefetch", "data.memory", "data.cache",
    "data.store", "data.store_gib", "data.trace",
)  # fmt: skip
"""Settings, or groups of them, that change no result of a run; a run directory keeps those of its first start."""
MOST_STAGES = 32  # at most this many are shown
NAMES = {"original": "Original", "linear": "Prog", "automatic": "AutoProg", "supernet": "Supernet"}  # the paper's


@with_config(STRICT)
class _Train(TypedDict):
    epochs: Annotated[float, Field(gt=0, le=1e9)]


@with_config(STRICT)
class _Growth(TypedDict):
    schedule: Literal["original", "linear", "automatic", "supernet"] | list[Any]
    smallest: Annotated[float, Field(gt=0, le=1)]


@with_config(STRICT)
class _Search(TypedDict):
    times: NotRequired[Literal["measured", "modelled"]]


@with_config(STRICT)
class _Model(TypedDict):
    name: Name
    classes: NotRequired[Size]
    resolution: NotRequired[Size | None]


@with_config(STRICT)
class _Data(TypedDict):
    path: Name


@with_config(STRICT)
class _Recipe(TypedDict):
    """The keys of a recipe that the tables show."""

    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]
    model: _Model
    data: NotRequired[_Data]
    train: _Train
    growth: _Growth
    search: _Search


@dataclass(frozen=True)
class RunRecord:
    """What one run directory records; times in seconds, accuracies in percent.

    `results` holds the keys of results.json that the tables show; for an unfinished run, their values so far.
    `top1_at`: by resolution, what `scaleprog evaluate` measured last, of the better weights.
    `top1_at_growth`: of the better weights after the first epoch of stage 2; None if the run was not evaluated then.
    `troubles`: a sentence on each file that could not be read completely.
    `directories`: where the relative paths of the recipe may lead.
    """

    name: str
    recipe: Mapping[str, Any]
    finished: bool
    results: Mapping[str, Any]
    evaluations: Sequence[Row]
    segments: Sequence[Segment]
    searches: Sequence[Search]
    events: Sequence[Row]
    timeline: Timeline | None
    epoch: float
    top1_at: Mapping[int, float]
    top1_at_growth: float | None
    troubles: Sequence[str] = ()
    directories: Sequence[Path] = ()

    @property
    def twins(self) -> str:
        """A text that is equal for runs whose recipes differ only in the seed, in what changes no result (`UNSEEN`), in
        where the shards lie and, if they are forks, in the parent."""
        parent = self.recipe.get("parent")
        step = parent.get("step") if isinstance(parent, Mapping) else None
        told: dict[str, Any] = {**self.recipe, "seed": None, "parent": step}
        for key in UNSEEN:
            group, _, name = key.partition(".")
            if isinstance(told.get(group), Mapping):
                told[group] = {k: value for k, value in told[group].items() if name and k != name}
            elif not name:
                told.pop(group, None)
        if isinstance(told.get("data"), Mapping):
            told["data"] = {**told["data"], "path": self.data}
        return json.dumps(told, sort_keys=True)

    @property
    def data(self) -> str:
        """The name of the folder of the shards."""
        return Path(self.says("data.path") or "unknown data").name

    @property
    def task(self) -> str:
        """A text that is equal for runs whose accuracies can be compared: on shards of one name, with equal classes."""
        return json.dumps([self.data, self.says("model.classes")])

    @property
    def on_cpu(self) -> bool:
        """Whether every start trained on the CPU."""
        return {event.get("device") for event in self.events if event["event"] == "start"} == {"cpu"}

    @property
    def rank_hours(self) -> float:
        """Hours of all ranks, from the beginning to the end of every start."""
        starts = self.timeline.starts if self.timeline else ()
        return sum((start.end - start.began) * start.world for start in starts) / 3600

    @property
    def joules(self) -> float | None:
        """The measured energy of all starts; None unless every start measured that of all its GPUs and nodes."""
        measured = [event for event in self.events if event["event"] == "energy"]
        for start in (event for event in self.events if event["event"] == "start"):
            ranks = {event.get("rank") for event in measured if event.get("generation") == start.get("generation")}
            on_gpus = start.get("device", "").startswith("cuda")
            if len(ranks) < (start.get("world", 1) if on_gpus else len(start.get("hosts", [""]))):
                return None
        return sum(event["gpu_joules"] + (event["cpu_joules"] or 0) for event in measured) if measured else None

    @property
    def without_cpus(self) -> bool:
        """Whether `joules` leaves out CPUs, because a start found no counter of theirs."""
        return any(event["event"] == "energy" and event["cpu_joules"] is None for event in self.events)

    def says(self, key: str) -> Any:
        """What the recipe says for a dotted key; None if it has no such key."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def grown_before(self) -> bool:
        """Whether it continues a run whose network had grown."""
        phases = self.says("parent.phases")
        return isinstance(phases, list) and len(phases) > 1

    @property
    def schedule(self) -> str:
        """The growth schedule, by the paper's name for it."""
        growth = self.recipe["growth"]
        if not isinstance(growth["schedule"], str):
            return "by hand"
        ratio = "" if growth["schedule"] == "original" else f" {growth['smallest']:g}Ω"
        how = {
            "by compute": growth.get("steps") == "compute",
            "in a window": growth.get("window") is not None,
            "of a grown network": growth["schedule"] == "original" and self.grown_before,
        }
        return ", ".join([NAMES[growth["schedule"]] + ratio, *(name for name, used in how.items() if used)])

    @property
    def stages(self) -> str:
        """The trained networks, as in "16x4 -> 28x8"; dots stand for those left out or still to come."""
        if self.finished:
            return " -> ".join(f"{s['resolution']}x{s['depth']}" for s in self.results["stages"][-MOST_STAGES:])
        sizes = [s.network.short for s in self.segments if s.phase == "train"]
        return " -> ".join([*(["..."] if len(sizes) > MOST_STAGES else []), *sizes[-MOST_STAGES:], "..."])


def read_run(folder: Path, name: str) -> RunRecord:
    """Reads a run directory. Raises CheckpointError if there is none, or if nothing has been recorded in it yet."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run directory")
    recipe = plain_yaml.read_run(folder)
    checked(folder / plain_yaml.RECIPE, recipe, _Recipe)
    files = (METRICS, METRIC), (EVENTS, EVENT), (REQUEUES, LEFT), (EVALUATIONS, EVALUATED_AT)
    records = [read(folder / file, kind) for file, kind in files]
    troubles = [told.trouble for told in records if told.trouble]
    rows, events = records[0].rows, records[1].rows
    if not rows and not events:
        why = ": ".join(["the run has not recorded anything yet", *troubles[:1]])
        raise CheckpointError(f"{folder}: metrics.jsonl is missing or empty; {why}")
    results = read_object(folder / RESULTS, Results)
    steps = _last_told(row for row in rows if "loss" in row)
    evaluations = _last_told(row for row in rows if "top1" in row)
    scoring = [dict(event) for event in still_told(events) if event["event"] == "measurement"]
    return RunRecord(
        name,
        recipe,
        results is not None,
        _so_far(steps, evaluations, scoring) if results is None else results,
        evaluations,
        _segments(steps, scoring),
        _read_searches(events, steps),
        events,
        read_timeline(folder, name, rows, events),
        steps[-1].get("epoch", 0.0) if steps else 0.0,
        {row["resolution"]: Accuracies(row).best for row in _newest(records[-1].rows, steps if results else ())},
        _at_growth(steps, evaluations),
        troubles,
        directories.to_read(folder),
    )


def _newest(evaluations: Sequence[Row], trained: Sequence[Row]) -> list[Row]:
    """Those of `scaleprog evaluate` that are of the last step of `trained` or, if that is empty, of their own last."""
    last = max((row["step"] for row in trained or evaluations), default=0)
    return [row for row in evaluations if row["step"] == last]


def _last_told(rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    """The row that was written last for each step, in the order of the steps."""
    return sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])


def _so_far(steps: Sequence[Row], evaluations: Sequence[Row], scoring: Sequence[Row]) -> Row:
    last = evaluations[-1] if evaluations else {"top1": None, "top1_ema": None}
    return {
        "top1": last["top1"],
        "top1_ema": last["top1_ema"],
        "top1_best": Accuracies(last).best if evaluations else None,
        "train_seconds": sum(row["step_seconds"] for row in steps) + _seconds(scoring),
        "train_cpu_seconds": sum(row.get("cpu_seconds", 0.0) for row in steps),
        "search_seconds": None,
        "wall_seconds": None,
    }


def _at_growth(steps: Sequence[Row], evaluations: Sequence[Row]) -> float | None:
    """`RunRecord.top1_at_growth`."""
    stage = [row for row in steps if row["stage"] == 2 and "epoch" in row]
    first = [row["step"] for row in stage if row["epoch"] < stage[0]["epoch"] + 1 - 1e-9]  # epochs are rounded
    evaluated = {row["step"]: Accuracies(row).best for row in evaluations}
    return evaluated.get(first[-1]) if first else None


def _seconds(scoring: Iterable[Row]) -> float:
    return sum(event.get("seconds", 0.0) for event in scoring)


def _segments(steps: Sequence[Row], scoring: Sequence[Row]) -> list[Segment]:
    """The phases of the recorded steps; their time of training includes what the searches took to score before."""
    before = list(accumulate((row["step_seconds"] for row in steps), initial=0.0))
    segments = []
    for (stage, phase), group in groupby(enumerate(steps), lambda item: (item[1]["stage"], item[1]["phase"])):
        indices, rows = zip(*group)
        largest = Subnet(max(row["resolution"] for row in rows), max(row["depth"] for row in rows))
        span = rows[0]["step"] - 1, rows[-1]["step"]
        began = before[indices[0]] + _seconds(event for event in scoring if event["step"] <= span[0])
        segments.append(Segment(stage, phase, *span, largest, began, _waiting(rows)))
    return segments


def _waiting(steps: Sequence[Row]) -> float | None:
    """The fraction of the time of some steps in which they waited for data while the device was idle."""
    if not all(row.get("images_per_second") and row.keys() >= {"images", "data_wait_share"} for row in steps):
        return None
    seconds = [row["images"] / row["images_per_second"] for row in steps]
    idle = sum(seconds) - sum(row["step_seconds"] for row in steps)
    return max(0.0, min(sum(map(waited, steps)), idle)) / sum(seconds)


def _read_searches(events: Sequence[Row], steps: Sequence[Row]) -> list[Search]:
    """The searches in order, each with the measurements since the previous one; the last may be undecided."""
    measured = _last_told(event for event in still_told(events) if event["event"] == "measurement")
    choices = {event["stage"]: event for event in still_told(events) if event["event"] == "choice"}
    searches, since = [], -1
    for stage, choice in sorted(choices.items())[-MOST_STAGES:]:
        own = [row for row in measured if since < row["step"] <= choice["step"]]
        searches.append(Search(stage, *_losses(own), decision_from_json(choice)))
        since = choice["step"]
    undecided = [row for row in measured if row["step"] > since]
    if undecided and steps:
        searches.append(Search(steps[-1]["stage"], *_losses(undecided), None))
    return searches


def _losses(measured: Sequence[Row]) -> tuple[tuple[int, ...], dict[Subnet, tuple[float, ...]]]:
    """The steps of measurements, and the losses by candidate; only of those with the last measurement's candidates."""
    all_told = [(event["step"], unpaired(event["losses"])) for event in measured]
    told = [(step, losses) for step, losses in all_told if losses.keys() == all_told[-1][1].keys()]
    losses = {subnet: tuple(each[subnet] for _, each in told) for subnet in (told[-1][1] if told else ())}
    return tuple(step for step, _ in told), losses
