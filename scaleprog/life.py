"""The life of a run: its starts, what ended them and what they cost, from its events, steps and Slurm's requeues."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from scaleprog.display import first_line
from scaleprog.growth.space import Subnet
from scaleprog.reading import read
from scaleprog.records import LEFT, REQUEUES

Row = Mapping[str, Any]
MOST_NAMED = 100  # things in one list
ENDS = ("finish", "hurried", "preempted", "stopped_early", "error")  # what a start says of its end; the first counts


@dataclass(frozen=True)
class Mark:
    """Something that happened, a kind of `figures.MARKS`; with a step where it belongs on the curve of the steps."""

    seconds: float
    kind: str
    text: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Stretch:
    """A time in which one network, or a supernet up to it, was trained."""

    begin: float
    end: float
    phase: str
    network: Subnet


@dataclass(frozen=True)
class Start:
    """One start: when its process began, when it went on at which step, and when it was last heard of."""

    began: float
    ready: float
    end: float
    step: int
    world: int
    points: tuple[tuple[float, int], ...]
    """Seconds and steps done by then."""
    kept: float
    """The step from which a later start went on; what is beyond was trained again."""
    stretches: tuple[Stretch, ...]
    requeued: float | None
    """When it went back into Slurm's queue."""


@dataclass(frozen=True)
class Life:
    """A run from its first start to the last that was heard of it; times in seconds since that start began."""

    name: str
    epoch: float
    """When that was, in seconds since 1970."""
    starts: Sequence[Start]
    marks: Sequence[Mark]
    lost: int
    """Steps that were trained again, as far as they had been written down."""
    costs: Mapping[str, float | None]
    """Where the time went, in seconds; None is what the run does not tell."""

    @property
    def wall(self) -> float:
        """Seconds from the first start to the end."""
        return self.starts[-1].end


def read_life(folder: Path, name: str, rows: Sequence[Row], events: Sequence[Row]) -> Life | None:
    """The life of a run directory with these rows of metrics.jsonl and events, as they stand in the files; None where
    it never started. A clock that was set back moves what is later: nothing takes less than no time."""
    events = _with_generations(events)
    begins = [i for i, event in enumerate(events) if event["event"] == "start"]
    if not begins:
        return None
    begun = [events[i] for i in begins]
    begun_at = list(accumulate((event["time"] for event in begun), max))
    kept = [*list(accumulate((event["step"] for event in reversed(begun)), min))[::-1][1:], np.inf]
    steps = sorted((row for row in rows if "loss" in row), key=lambda row: row["step"])
    ends = sorted(read(folder / REQUEUES, LEFT).rows, key=lambda row: row["time"])
    beyond = _beyond(begun, begun_at)
    zero = begun[0]["time"] - begun[0].get("startup_seconds", 0.0)
    starts: list[Start] = []
    marks: list[Mark] = []
    for i, event in enumerate(begun):
        last = i + 1 == len(begun)
        before = starts[-1].end if starts else 0.0
        clock = _Clock(zero - max(0.0, before - (event["time"] - zero)))
        own = [
            e for e in events[begins[i] : None if last else begins[i + 1]]
            if e["generation"] == event["generation"]
        ]  # fmt: skip
        mine = steps[slice(*(bisect_right(steps, at, key=lambda row: row["step"]) for at in (event["step"], kept[i])))]
        points = _points(own, mine, beyond.get(i, ()), clock)
        left = _between(ends, event["time"], np.inf if last else begun[i + 1]["time"])
        ready = clock(event["time"])
        start = Start(
            began=min(max(ready - event.get("startup_seconds", 0.0), before), ready),
            ready=ready,
            end=max(points[-1][0], *(clock(e["time"]) for e in own)),
            step=event["step"],
            world=event.get("world", 1),
            points=points,
            kept=kept[i],
            stretches=_stretches(points, mine),
            requeued=clock(left["time"]) if left and left.get("requeue") and not last else None,
        )
        starts.append(start)
        told = _marks(start, own, left, clock)
        marks += told if not last or left or _end(own) else _marks(start, own, None, clock)[:-1]
    marks += _superseded(events, zero)
    marks.sort(key=lambda mark: mark.seconds)
    lost = sum(event.get("repeated_steps", 0) for event in begun)
    return Life(name, zero, starts, marks, lost, _costs(starts, steps, rows, events))


def still_told(events: Sequence[Row]) -> list[Row]:
    """The events that still hold: a start takes back what earlier ones told of the steps beyond its own, and what is
    left of them tells nothing any more."""
    told: list[Row] = []
    latest = -1
    for event in _with_generations(events):
        if event["event"] == "start":
            latest = event["generation"]
        if event["generation"] >= latest:
            told.append(event)
    kept: list[Row] = []
    back_to: float = np.inf
    for event in reversed(told):
        if event.get("step", 0) <= back_to:
            kept.append(event)
        if event["event"] == "start":
            back_to = min(back_to, event["step"])
    return kept[::-1]


def describe(life: Life | None, events: Sequence[Row]) -> list[str]:
    """Starts, growths, checkpoints and errors in words."""
    starts, checkpoints, failed, errors = (
        [event for event in events if event["event"] == kind]
        for kind in ("start", "checkpoint", "checkpoint_failed", "error")
    )
    growths = {(e["stage"], e["phase"]): e for e in still_told(events) if e["event"] == "growth"}.values()
    stops = [mark for mark in life.marks if mark.kind in ("signal", "stop", "killed") and mark.text] if life else []
    lines = [
        _listing("starts", [f"at step {e['step']}, world size {e.get('world', 1)}{_again(e)}" for e in starts]),
        _listing(f"growths in {sum(e['seconds'] for e in growths):.2f} s", [
            f"stage {e['stage']} {'supernet up to ' * (e['phase'] == 'supernet')}{e['resolution']}x{e['depth']} "
            f"at step {e['step']} ({e['seconds']:.2f} s)" for e in growths
        ]),
        f"checkpoints: {len(checkpoints)} in {sum(e['seconds'] for e in checkpoints):.2f} s, "
        f"{sum(e['bytes'] for e in checkpoints) / 2**20:.1f} MiB in all",
        *_some([f"no checkpoint of step {e['step']}: {first_line(e['message'])}" for e in failed]),
        *([_listing("interruptions", [f"{m.text} after {span(m.seconds)}" for m in stops])] if stops else []),
        *_some([f"error{_at(e)} on rank {e.get('rank', 0)}: {first_line(e['message'])}" for e in errors]),
    ]  # fmt: skip
    if life is not None and life.wall:
        costs = "; ".join(f"{what} {seconds:.1f} s" for what, seconds in life.costs.items() if seconds)
        lines.append(f"{life.wall:.1f} s from the first start to the end: {costs}")
    return lines


def table_row(life: Life) -> dict[str, str]:
    """What a life came to: shares of the time from the first start to the end."""
    shares = {
        what: "–" if seconds is None else f"{seconds / life.wall:.1%}" if life.wall else "–"
        for what, seconds in life.costs.items()
    }
    return {"run": life.name, "starts": str(len(life.starts)), "steps again": str(life.lost),
            "in all": span(life.wall), **shares}  # fmt: skip


def span(seconds: float) -> str:
    """A duration as people say it."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


# ---- reading


def _with_generations(events: Sequence[Row]) -> list[Row]:
    """The events, each with the generation that it belongs to; early versions wrote it into starts at most."""
    known: list[Row] = []
    latest = 0
    for event in events:
        if event["event"] == "start":
            latest = event.get("generation", latest + 1)
        known.append({"generation": latest, **event})
    return known


@dataclass(frozen=True)
class _Clock:
    """Turns a start's times into seconds since the run began; `zero` is later where its clock was set back."""

    zero: float

    def __call__(self, moment: float) -> float:
        return max(0.0, moment - self.zero)


def _beyond(begun: Sequence[Row], begun_at: Sequence[float]) -> dict[int, list[tuple[float, int]]]:
    """Of each start, by its number, the moment and the step that it got to and later ones did again."""
    found: dict[int, list[tuple[float, int]]] = {}
    for i, event in enumerate(begun):
        if "repeated_until" in event:
            number = bisect_left(begun_at, event["repeated_until"]) - 1
            if 0 <= number < i:
                point = event["repeated_until"], event["step"] + event.get("repeated_steps", 0)
                found.setdefault(number, []).append(point)
    return found


def _between(ends: Sequence[Row], begin: float, stop: float) -> Row | None:
    """The last of some rows, ordered by time, between two moments."""
    number = bisect_left(ends, stop, key=lambda row: row["time"]) - 1
    return ends[number] if number >= 0 and ends[number]["time"] > begin else None


def _superseded(events: Sequence[Row], zero: float) -> list[Mark]:
    """What starts have told of their ends when later ones had begun."""
    marks, present = [], -1
    earlier: set[int] = set()
    for event in events:
        if event["event"] == "start":
            earlier.add(present)
            present = event["generation"]
        elif event["event"] == "error" and event["generation"] != present and event["generation"] in earlier:
            text = f"start {event['generation']}, superseded: {_short(event['message'])}"
            marks.append(Mark(max(0.0, event["time"] - zero), "killed", text))
    return marks


def _points(
    own: Sequence[Row], rows: Sequence[Row], beyond: Sequence[tuple[float, int]], clock: _Clock
) -> tuple[tuple[float, int], ...]:
    """When a start had done how many steps, as its events, its steps and those that it lost tell."""
    points = {(e["time"], e["step"]) for e in own if "step" in e and not e["event"].startswith("checkpoint")}
    points |= {(row["time"], row["step"]) for row in rows if "time" in row}
    points |= set(beyond)
    return tuple(sorted((clock(time), step) for time, step in points))


def _stretches(points: Sequence[tuple[float, int]], rows: Sequence[Row]) -> tuple[Stretch, ...]:
    """The networks that a start trained, as far as that was not lost."""
    stretches, done = [], _Progress(points)
    for (_, phase), group in groupby(rows, lambda row: (row["stage"], row["phase"])):
        members = list(group)
        largest = Subnet(max(row["resolution"] for row in members), max(row["depth"] for row in members))
        begin = done.when(members[0]["step"] - 1)
        stretches.append(Stretch(begin, max(begin, done.when(members[-1]["step"])), phase, largest))
    return tuple(stretches)


class _Progress:
    """Points of (seconds, steps), to be asked many times."""

    def __init__(self, points: Sequence[tuple[float, int]]) -> None:
        self._times, steps = map(np.asarray, zip(*points))
        self._steps = np.maximum.accumulate(steps.astype(float))  # a clock that was set back mixes them up

    def when(self, step: float) -> float:
        """About when so many steps were done."""
        return float(np.interp(step, self._steps, self._times))


def when(points: Sequence[tuple[float, int]], step: float) -> float:
    """About when so many steps were done, by points of (seconds, steps)."""
    return _Progress(points).when(step)


def _marks(start: Start, own: Sequence[Row], left: Row | None, clock: _Clock) -> list[Mark]:
    """What happened in a start; the last mark is how it ended. `left`: what `requeues.jsonl` says of that."""
    marks, done = [], _Progress(start.points)
    for event in own:
        if event["event"] in ("growth", "choice"):
            marks.append(Mark(clock(event["time"]), event["event"], step=event["step"]))
        elif event["event"] in ("checkpoint", "checkpoint_failed"):
            failed = event["event"] == "checkpoint_failed"
            at = done.when(event["step"])
            marks.append(Mark(at, event["event"], "no checkpoint" if failed else "", event["step"]))
    signals = sorted((e for e in own if e["event"] == "signal"), key=lambda e: (e["signal"], e["time"]))
    named = set()
    for name, group in groupby(signals, lambda event: event["signal"]):
        members = list(group)
        ranks = sorted({event.get("rank", 0) for event in members})
        partly = "" if len(ranks) == start.world else f", rank {', '.join(map(str, ranks[:MOST_NAMED]))}"
        marks.append(Mark(clock(members[0]["time"]), "signal", name + partly))
        named.add(name)
    if left is not None and left.get("requeue"):
        marks.append(Mark(clock(left["time"]), "requeue"))
    return [*marks, _how_it_ended(start, _end(own), left, named, clock)]


def _how_it_ended(start: Start, end: Row | None, left: Row | None, signals: Collection[str], clock: _Clock) -> Mark:
    """The mark of an end; says nothing that the marks of these signals say already."""
    if end is None:
        return Mark(start.end, "killed", _short(left["cause"]) if left else "ended without notice")
    kind, text = "killed", "a second signal"
    if end["event"] == "finish":
        kind, text = "finish", "finished"
    elif end["event"] == "preempted":
        kind, text = "stop", "" if end["reason"] in signals else end["reason"]
    elif end["event"] == "stopped_early":
        kind, text = "stop", "train.max_steps"
    elif end["event"] == "error":
        text = f"{_short(end['message'])}, rank {end.get('rank', 0)}"
    return Mark(clock(end["time"]), kind, text)


def _end(own: Sequence[Row]) -> Row | None:
    """What a start said of its end."""
    return next((event for kind in ENDS for event in own if event["event"] == kind), None)


def _short(message: str) -> str:
    """An error's type, or the first words of a cause; the rank, if it names one, at the end."""
    rank, text = re.fullmatch(r"(?:(rank \d+): )?(.*)", first_line(message)).groups()  # type: ignore[union-attr]
    words = re.split("[:,;]", text)[0][:30]
    return f"{words}, {rank}" if rank else words


def _costs(
    starts: Sequence[Start], steps: Sequence[Row], rows: Sequence[Row], events: Sequence[Row]
) -> dict[str, float | None]:
    """Where the time went. Waiting for data counts as far as the device was not busy meanwhile."""

    def total(key: str, *kinds: str) -> float | None:
        own = [event for event in events if event["event"] in kinds]
        return sum(event[key] for event in own) if all(key in event for event in own) else None

    evaluated = any(event["event"] == "evaluation" for event in events) or not any("top1" in row for row in rows)
    lost = [event for event in events if event.get("repeated_steps")]
    gaps = [(before.end, queued_from(before, after), after.began) for before, after in pairwise(starts)]
    costs: dict[str, float | None] = {
        "training": sum(row["step_seconds"] for row in steps),
        "trained again": sum(e["repeated_seconds"] for e in lost)
        if all("repeated_seconds" in e for e in lost)
        else None,
        "data wait": sum(row["data_wait_seconds"] for row in steps),
        "checkpoint stall": total("stall", "checkpoint", "checkpoint_failed"),
        "evaluation, scoring": total("seconds", "evaluation", "measurement") if evaluated else None,
        "growth": total("seconds", "growth"),
        "start-up": sum(start.ready - start.began for start in starts),
        "queue": sum(began - requeued for _, requeued, began in gaps if requeued is not None),
        "down": sum((began if requeued is None else requeued) - end for end, requeued, began in gaps),
    }
    rest = starts[-1].end - sum(filter(None, costs.values()))
    costs["data wait"] = max(0.0, (costs["data wait"] or 0.0) + min(0.0, rest))
    return costs | {"rest": max(0.0, rest)}


def queued_from(before: Start, after: Start) -> float | None:
    """When a job went back into the queue between two starts; None if it did not, or nobody has told."""
    return None if before.requeued is None else min(max(before.requeued, before.end), after.began)


def _again(start: Row) -> str:
    steps = start.get("repeated_steps", 0)
    return f", {steps} steps to be trained again" if steps else ""


def _at(event: Row) -> str:
    return f" at step {event['step']}" if "step" in event else ""


def _listing(what: str, things: Sequence[str]) -> str:
    return f"{what}: {len(things)}" + (f" ({'; '.join(_some(things))})" if things else "")


def _some(things: Sequence[str]) -> list[str]:
    """As many as a person may read."""
    more = len(things) - MOST_NAMED
    return [*things[:MOST_NAMED], f"{more} more"] if more > 0 else list(things)
