"""The timeline of a run: its starts, what ended them and what they cost, derived from events, steps and requeues."""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from scaleprog.files.display import first_line
from scaleprog.growth.space import Subnet
from scaleprog.rundir.reading import read, still_told, with_generations
from scaleprog.rundir.records import LEFT, REQUEUES

Row = Mapping[str, Any]
MOST_NAMED = 100  # items in one list
ENDS = ("finish", "hurried", "preempted", "stopped_early", "hang", "error")  # events that end a start, by priority


@dataclass(frozen=True)
class Mark:
    """Something that happened. `kind` is a key of `timeline_figure.MARKS`; a mark with a `step` lies on the curve."""

    seconds: float
    kind: str
    text: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Stretch:
    """A period that trained one network, or a supernet whose largest candidate is that network."""

    begin: float
    end: float
    phase: str
    network: Subnet


@dataclass(frozen=True)
class Start:
    """One start: its process `began`, was `ready` to train at `step`, and gave its last sign of life at `end`."""

    began: float
    ready: float
    end: float
    step: int
    world: int
    points: tuple[tuple[float, int], ...]
    """(seconds, steps finished by then)."""
    kept: float
    """The step from which a later start resumed; the steps beyond it were trained again."""
    stretches: tuple[Stretch, ...]
    requeued: float | None
    """When its job went back into Slurm's queue; None if that was not recorded."""


@dataclass(frozen=True)
class Timeline:
    """A run from its first start to its last sign of life; times in seconds since the first start began."""

    name: str
    epoch: float
    """When the first start began, in seconds since 1970."""
    starts: Sequence[Start]
    marks: Sequence[Mark]
    lost: int
    """Steps that were trained again, as far as they had been recorded."""
    costs: Mapping[str, float | None]
    """Where the time went, in seconds; None if the run did not record it."""

    @property
    def wall(self) -> float:
        """Seconds from the first start to the end."""
        return self.starts[-1].end


def read_timeline(folder: Path, name: str, rows: Sequence[Row], events: Sequence[Row]) -> Timeline | None:
    """The timeline of a run directory; None if the run never started.

    If a clock was set back, everything later is shifted, so that no duration is negative.

    Args:
        folder: the run directory.
        name: of the run, to display.
        rows: rows of metrics.jsonl, in the order of the file.
        events: rows of events.jsonl, in the order of the file.
    """
    events = with_generations(events)
    begins = [i for i, event in enumerate(events) if event["event"] == "start"]
    if not begins:
        return None
    begun = [events[i] for i in begins]
    begun_at = list(accumulate((event["time"] for event in begun), max))
    kept = [*list(accumulate((event["step"] for event in reversed(begun)), min))[::-1][1:], math.inf]
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
        own = [e for e in events[begins[i] : None if last else begins[i + 1]] if e["generation"] == event["generation"]]
        mine = steps[slice(*(bisect_right(steps, at, key=lambda row: row["step"]) for at in (event["step"], kept[i])))]
        points = _points(own, mine, beyond.get(i, ()), clock)
        left = _between(ends, event["time"], math.inf if last else begun[i + 1]["time"])
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
    own_events = [event for event in events if event.get("generation") != 0]  # a fork has those of its parent, too
    own_steps, own_rows = ([row for row in told if row["step"] > begun[0]["step"]] for told in (steps, rows))
    return Timeline(name, zero, starts, marks, lost, _costs(starts, own_steps, own_rows, own_events))


def describe(timeline: Timeline | None, events: Sequence[Row]) -> list[str]:
    """Starts, growths, checkpoints and errors in words."""
    starts, checkpoints, failed, errors = (
        [event for event in events if event["event"] == kind]
        for kind in ("start", "checkpoint", "checkpoint_failed", "error")
    )
    still = still_told(events)
    growths = {(e["stage"], e["phase"]): e for e in still if e["event"] == "growth"}.values()
    damaged = [event for event in still if event["event"] == "damaged"]
    names = "; ".join(_some([name for event in damaged for name in event["samples"]]))
    stops = (
        [mark for mark in timeline.marks if mark.kind in ("signal", "stop", "killed") and mark.text] if timeline else []
    )
    lines = [
        *[f"continues {e['run']} from step {e['step']}" for e in events if e["event"] == "forked"],
        *[
            f"made longer at step {e['step']}: {e['epochs']:g} epochs in place of {e['before']:g}"
            for e in events
            if e["event"] == "lengthened"
        ],
        _listing("starts", [f"at step {e['step']}, world size {e.get('world', 1)}{_again(e)}" for e in starts]),
        _listing(
            f"growths in {sum(e['seconds'] for e in growths):.2f} s",
            [
                f"stage {e['stage']} {'supernet up to ' if e['phase'] == 'supernet' else ''}"
                f"{e['resolution']}x{e['depth']} at step {e['step']} ({e['seconds']:.2f} s)"
                for e in growths
            ],
        ),
        f"checkpoints: {len(checkpoints)} in {sum(e['seconds'] for e in checkpoints):.2f} s, "
        f"{sum(e['bytes'] for e in checkpoints) / 2**20:.1f} MiB in all",
        *[f"damaged samples, replaced by others: {event['total']} ({names})" for event in damaged[-1:]],
        *_some([f"no checkpoint of step {e['step']}: {first_line(e['message'])}" for e in failed]),
        *([_listing("interruptions", [f"{m.text} after {span(m.seconds)}" for m in stops])] if stops else []),
        *_some([f"error{_at(e)} on rank {e.get('rank', 0)}: {first_line(e['message'])}" for e in errors]),
    ]
    if timeline is not None and timeline.wall:
        costs = "; ".join(f"{what} {seconds:.1f} s" for what, seconds in timeline.costs.items() if seconds)
        lines.append(f"{timeline.wall:.1f} s from the first start to the end: {costs}")
    return lines


def table_row(timeline: Timeline) -> dict[str, str]:
    """A row of the table of timelines: shares of the time from the first start to the end."""
    shares = {
        what: "–" if seconds is None else f"{seconds / timeline.wall:.1%}" if timeline.wall else "–"
        for what, seconds in timeline.costs.items()
    }
    return {
        "run": timeline.name,
        "starts": str(len(timeline.starts)),
        "steps retrained": str(timeline.lost),
        "total": span(timeline.wall),
        **shares,
    }


def span(seconds: float) -> str:
    """A duration as text, in a convenient unit."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


# ---- reading


@dataclass(frozen=True)
class _Clock:
    """Turns a start's times into seconds since the run began. `zero` is shifted if the clock was set back."""

    zero: float

    def __call__(self, moment: float) -> float:
        return max(0.0, moment - self.zero)


def _beyond(begun: Sequence[Row], begun_at: Sequence[float]) -> dict[int, list[tuple[float, int]]]:
    """By number of a start: the (time, step) that it reached, of steps that later starts repeated."""
    found: dict[int, list[tuple[float, int]]] = {}
    for i, event in enumerate(begun):
        if "repeated_until" in event:
            number = bisect_left(begun_at, event["repeated_until"]) - 1
            if 0 <= number < i:
                point = event["repeated_until"], event["step"] + event.get("repeated_steps", 0)
                found.setdefault(number, []).append(point)
    return found


def _between(ends: Sequence[Row], begin: float, stop: float) -> Row | None:
    """The last of `ends`, which are sorted by time, between two moments."""
    number = bisect_left(ends, stop, key=lambda row: row["time"]) - 1
    return ends[number] if number >= 0 and ends[number]["time"] > begin else None


def _superseded(events: Sequence[Row], zero: float) -> list[Mark]:
    """Marks for starts that reported an error after a later start had begun."""
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
    """The (seconds, steps finished) of a start, from its events, its steps and the steps that it lost."""
    points = {(e["time"], e["step"]) for e in own if "step" in e and not e["event"].startswith("checkpoint")}
    points |= {(row["time"], row["step"]) for row in rows if "time" in row}
    points |= set(beyond)
    return tuple(sorted((clock(time), step) for time, step in points))


def _stretches(points: Sequence[tuple[float, int]], rows: Sequence[Row]) -> tuple[Stretch, ...]:
    """The networks that a start trained, without lost steps."""
    stretches, done = [], _Progress(points)
    for (_, phase), group in groupby(rows, lambda row: (row["stage"], row["phase"])):
        members = list(group)
        largest = Subnet(max(row["resolution"] for row in members), max(row["depth"] for row in members))
        begin = done.when(members[0]["step"] - 1)
        stretches.append(Stretch(begin, max(begin, done.when(members[-1]["step"])), phase, largest))
    return tuple(stretches)


class _Progress:
    """Points of (seconds, steps), prepared for many look-ups."""

    def __init__(self, points: Sequence[tuple[float, int]]) -> None:
        import numpy as np  # starts a thread per core, which `status` on a login node must not

        times, steps = map(np.asarray, zip(*points))
        ascending = np.maximum.accumulate(steps.astype(float))  # a clock that was set back puts them out of order
        self._when = partial(np.interp, xp=ascending, fp=times)

    def when(self, step: float) -> float:
        """About when `step` steps were finished, in seconds."""
        return float(self._when(step))


def when(points: Sequence[tuple[float, int]], step: float) -> float:
    """About when `step` steps were finished, in seconds, interpolated between points of (seconds, steps)."""
    return _Progress(points).when(step)


def _marks(start: Start, own: Sequence[Row], left: Row | None, clock: _Clock) -> list[Mark]:
    """What happened in a start; the last mark is its end. `left`: the row of `requeues.jsonl` about that end."""
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
    """The mark of an end, without text if the marks of `signals` already give the reason."""
    if end is None:
        return Mark(start.end, "killed", _short(left["cause"]) if left else "ended without notice")
    kind, text = "killed", "a second signal"
    if end["event"] == "finish":
        kind, text = "finish", "finished"
    elif end["event"] == "preempted":
        kind, text = "stop", "" if end["reason"] in signals else end["reason"]
    elif end["event"] == "stopped_early":
        kind, text = "stop", "train.max_steps"
    elif end["event"] == "hang":
        ranks = ", ".join(map(str, end["culprits"][:MOST_NAMED]))
        text = f"hang, rank {ranks}" if ranks else "hang"
    elif end["event"] == "error":
        text = f"{_short(end['message'])}, rank {end.get('rank', 0)}"
    return Mark(clock(end["time"]), kind, text)


def _end(own: Sequence[Row]) -> Row | None:
    """The event with which a start reported its end."""
    return next((event for kind in ENDS for event in own if event["event"] == kind), None)


def _short(message: str) -> str:
    """An error's type, or the first words of a cause; the rank, if it names one, at the end."""
    rank, text = re.fullmatch(r"(?:(rank \d+): )?(.*)", first_line(message)).groups()  # type: ignore[union-attr]
    words = re.split("[:,;]", text)[0][:30]
    return f"{words}, {rank}" if rank else words


def _costs(
    starts: Sequence[Start], steps: Sequence[Row], rows: Sequence[Row], events: Sequence[Row]
) -> dict[str, float | None]:
    """Where the time went, in seconds. Waiting for data counts only while the device was idle."""

    def total(key: str, *kinds: str) -> float | None:
        own = [event for event in events if event["event"] in kinds]
        return sum(event[key] for event in own) if all(key in event for event in own) else None

    evaluated = any(event["event"] == "evaluation" for event in events) or not any("top1" in row for row in rows)
    lost = [event for event in events if event.get("repeated_steps")]
    gaps = [(before.end, queued_from(before, after), after.began) for before, after in pairwise(starts)]
    costs: dict[str, float | None] = {
        "training": sum(row["step_seconds"] for row in steps),
        "retrained": sum(e["repeated_seconds"] for e in lost) if all("repeated_seconds" in e for e in lost) else None,
        "data wait": sum(map(waited, steps)),
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


def waited(step: Row) -> float:
    """Seconds of a step for which the rank that waited longest waited for data; in old rows, those of rank 0."""
    if step.get("images_per_second") and step.keys() >= {"images", "data_wait_share"}:
        return step["data_wait_share"] * step["images"] / step["images_per_second"]
    return step["data_wait_seconds"]


def queued_from(before: Start, after: Start) -> float | None:
    """When a job went back into the queue between two starts; None if it did not, or if that was not recorded."""
    return None if before.requeued is None else min(max(before.requeued, before.end), after.began)


def _again(start: Row) -> str:
    steps = start.get("repeated_steps", 0)
    return f", {steps} steps to retrain" if steps else ""


def _at(event: Row) -> str:
    return f" at step {event['step']}" if "step" in event else ""


def _listing(what: str, things: Sequence[str]) -> str:
    return f"{what}: {len(things)}" + (f" ({'; '.join(_some(things))})" if things else "")


def _some(things: Sequence[str]) -> list[str]:
    """At most as many items as a person may read, and how many were left out."""
    more = len(things) - MOST_NAMED
    return [*things[:MOST_NAMED], f"{more} more"] if more > 0 else list(things)
