"""The life of a run: its starts, what ended them and what they cost, from its events, steps and Slurm's requeues."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from scaleprog.growth.space import Subnet
from scaleprog.metrics import read_rows

Row = Mapping[str, Any]
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
    """The life of a run directory with these rows of metrics.jsonl and events; None where it never started."""
    events = _with_generations(events)
    begun = [event for event in events if event["event"] == "start"]
    if not begun:
        return None
    ends = read_rows(folder / "requeues.jsonl")
    steps = [row for row in rows if "loss" in row]
    zero = begun[0]["time"] - begun[0].get("startup_seconds", 0.0)
    starts: list[Start] = []
    marks: list[Mark] = []
    for event, later in ((event, begun[i:]) for i, event in enumerate(begun, 1)):
        limit = later[0]["time"] if later else np.inf
        own = [e for e in events if e["generation"] == event["generation"] and event["time"] <= e["time"] < limit]
        kept = min((start["step"] for start in later), default=np.inf)
        mine = [row for row in steps if event["step"] < row["step"] <= kept]
        points = _points(own, mine, later, limit, zero)
        left = next((row for row in reversed(ends) if event["time"] < row["time"] < limit), None)
        start = Start(
            began=max(event["time"] - event.get("startup_seconds", 0.0) - zero, starts[-1].end if starts else 0.0),
            ready=event["time"] - zero,
            end=max(points[-1][0], *(e["time"] - zero for e in own)),
            step=event["step"],
            world=event["world"],
            points=points,
            kept=kept,
            stretches=_stretches(points, mine),
            requeued=left["time"] - zero if left and left["requeue"] and later else None,
        )
        starts.append(start)
        marks += _marks(start, own, left, zero) if later or left or _end(own) else _marks(start, own, None, zero)[:-1]
        marks += [
            Mark(e["time"] - zero, "killed", f"start {e['generation']}, superseded: {_short(e['message'])}")
            for e in events if e["event"] == "error" and e["generation"] == event["generation"] and e["time"] >= limit
        ]  # fmt: skip
    marks.sort(key=lambda mark: mark.seconds)
    lost = sum(event.get("repeated_steps", 0) for event in begun)
    return Life(name, zero, starts, marks, lost, _costs(starts, rows, events))


def still_told(events: Sequence[Row]) -> list[Row]:
    """The events that still hold: a start takes back what earlier ones told of the steps beyond its own, and what is
    left of them tells nothing any more."""
    told: list[Row] = []
    for event in _with_generations(events):
        if event["event"] == "start":
            told = [earlier for earlier in told if earlier.get("step", 0) <= event["step"]]
            latest = event["generation"]
        if not told or event["generation"] >= latest:
            told.append(event)
    return told


def describe(life: Life | None, events: Sequence[Row]) -> list[str]:
    """Starts, growths, checkpoints and errors in words."""
    starts, checkpoints, failed, errors = (
        [event for event in events if event["event"] == kind]
        for kind in ("start", "checkpoint", "checkpoint_failed", "error")
    )
    growths = {(e["stage"], e["phase"]): e for e in still_told(events) if e["event"] == "growth"}.values()
    stops = [mark for mark in life.marks if mark.kind in ("signal", "stop", "killed") and mark.text] if life else []
    lines = [
        _listing("starts", [f"at step {e['step']}, world size {e['world']}{_again(e)}" for e in starts]),
        _listing(f"growths in {sum(e['seconds'] for e in growths):.2f} s", [
            f"stage {e['stage']} {'supernet up to ' * (e['phase'] == 'supernet')}{e['resolution']}x{e['depth']} "
            f"at step {e['step']} ({e['seconds']:.2f} s)" for e in growths
        ]),
        f"checkpoints: {len(checkpoints)} in {sum(e['seconds'] for e in checkpoints):.2f} s, "
        f"{sum(e['bytes'] for e in checkpoints) / 2**20:.1f} MiB in all",
        *(f"no checkpoint of step {e['step']}: {e['message'].splitlines()[0]}" for e in failed),
        *([_listing("interruptions", [f"{m.text} after {span(m.seconds)}" for m in stops])] if stops else []),
        *(f"error at step {e['step']} on rank {e['rank']}: {e['message'].splitlines()[0]}" for e in errors),
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


def _points(
    own: Sequence[Row], rows: Sequence[Row], later: Sequence[Row], limit: float, zero: float
) -> tuple[tuple[float, int], ...]:
    """When a start had done how many steps, as its events, its steps and those that it lost tell."""
    points = {(e["time"], e["step"]) for e in own if "step" in e and not e["event"].startswith("checkpoint")}
    points |= {(row["time"], row["step"]) for row in rows if "time" in row}
    for event in later:
        if own[0]["time"] < event.get("repeated_until", np.inf) < limit:
            points.add((event["repeated_until"], event["step"] + event["repeated_steps"]))
    return tuple(sorted((time - zero, step) for time, step in points))


def _stretches(points: Sequence[tuple[float, int]], rows: Sequence[Row]) -> tuple[Stretch, ...]:
    """The networks that a start trained, as far as that was not lost."""
    stretches = []
    for (_, phase), group in groupby(rows, lambda row: (row["stage"], row["phase"])):
        members = list(group)
        largest = Subnet(max(row["resolution"] for row in members), max(row["depth"] for row in members))
        begin, end = when(points, members[0]["step"] - 1), when(points, members[-1]["step"])
        stretches.append(Stretch(begin, end, phase, largest))
    return tuple(stretches)


def when(points: Sequence[tuple[float, int]], step: float) -> float:
    """About when so many steps were done, by points of (seconds, steps)."""
    times, steps = zip(*points)
    return float(np.interp(step, steps, times))


def _marks(start: Start, own: Sequence[Row], left: Row | None, zero: float) -> list[Mark]:
    """What happened in a start; the last mark is how it ended. `left`: what `requeues.jsonl` says of that."""
    marks = []
    for event in own:
        if event["event"] in ("growth", "choice"):
            marks.append(Mark(event["time"] - zero, event["event"], step=event["step"]))
        elif event["event"] in ("checkpoint", "checkpoint_failed"):
            failed = event["event"] == "checkpoint_failed"
            at = when(start.points, event["step"])
            marks.append(Mark(at, event["event"], "no checkpoint" if failed else "", event["step"]))
    signals = sorted((e for e in own if e["event"] == "signal"), key=lambda e: (e["signal"], e["time"]))
    named = set()
    for name, group in groupby(signals, lambda event: event["signal"]):
        members = list(group)
        ranks = sorted({event.get("rank", 0) for event in members})
        partly = "" if len(ranks) == start.world else f", rank {', '.join(map(str, ranks))}"
        marks.append(Mark(members[0]["time"] - zero, "signal", name + partly))
        named.add(name)
    if left is not None and left["requeue"]:
        marks.append(Mark(left["time"] - zero, "requeue"))
    return [*marks, _how_it_ended(start, _end(own), left, named, zero)]


def _how_it_ended(start: Start, end: Row | None, left: Row | None, signals: Collection[str], zero: float) -> Mark:
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
        text = f"{_short(end['message'])}, rank {end['rank']}"
    return Mark(end["time"] - zero, kind, text)


def _end(own: Sequence[Row]) -> Row | None:
    """What a start said of its end."""
    return next((event for kind in ENDS for event in own if event["event"] == kind), None)


def _short(message: str) -> str:
    """An error's type, or the first words of a cause; the rank, if it names one, at the end."""
    rank, text = re.fullmatch(r"(?:(rank \d+): )?(.*)", message.splitlines()[0]).groups()  # type: ignore[union-attr]
    words = re.split("[:,;]", text)[0][:30]
    return f"{words}, {rank}" if rank else words


def _costs(starts: Sequence[Start], rows: Sequence[Row], events: Sequence[Row]) -> dict[str, float | None]:
    """Where the time went. Waiting for data counts as far as the device was not busy meanwhile."""

    def total(key: str, *kinds: str) -> float | None:
        own = [event for event in events if event["event"] in kinds]
        return sum(event[key] for event in own) if all(key in event for event in own) else None

    steps = [row for row in rows if "loss" in row]
    evaluated = any(event["event"] == "evaluation" for event in events) or not any("top1" in row for row in rows)
    lost = [event for event in events if event.get("repeated_steps")]
    gaps = [(before.end, before.requeued, after.began) for before, after in pairwise(starts)]
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


def _again(start: Row) -> str:
    steps = start.get("repeated_steps", 0)
    return f", {steps} steps to be trained again" if steps else ""


def _listing(what: str, things: Sequence[str]) -> str:
    return f"{what}: {len(things)}" + (f" ({'; '.join(things)})" if things else "")
