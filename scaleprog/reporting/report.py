"""Compares runs: report.md with the paper's Table 2, what the searches decided, the runs' timelines, and pictures."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scaleprog.errors import ScaleprogError
from scaleprog.files.atomic import write_whole
from scaleprog.files.display import as_markdown, as_text
from scaleprog.reporting.figures import (
    Segment,
    draw_accuracy,
    draw_schedules,
    draw_searches,
    draw_verdict,
)
from scaleprog.reporting.grouping import Group, curve, read_groups
from scaleprog.reporting.history import RunRecord
from scaleprog.reporting.text_tables import cell, markdown_table, plain_table, spread
from scaleprog.reporting.timeline import Timeline, describe, table_row
from scaleprog.reporting.timeline_figure import draw_timelines
from scaleprog.rundir.accuracies import better, is_percentage
from scaleprog.rundir.reading import reason

RESULTS = {  # column -> key in results.json, format
    "top-1": ("top1", ".2f"),
    "top-1 EMA": ("top1_ema", ".2f"),
    "top-1 best": ("top1_best", ".2f"),
    "train s": ("train_seconds", ".1f"),
    "CPU s": ("train_cpu_seconds", ".1f"),
    "scoring s": ("search_seconds", ".1f"),
    "wall s": ("wall_seconds", ".1f"),
}
TIMELINES = (
    "![Steps over time, with the events](timeline.png)\n\nShares of the time from the first start to the last "
    "recorded event. Lost steps and seconds are counted as far as the run recorded them, every `train.log_every` "
    "steps. start-up: from the beginning of the process; down: from the last recorded event to the next process; "
    "rest: everything else, such as shutting down."
)
SCORES = (
    "A search chooses the lowest score: loss x time^alpha or, within a budget, the loss above the complete model's per "
    "saved step of the complete model (–: a network that cannot save enough). When nothing more has to be saved, it "
    "chooses the complete model, which has no score."
)
WAITING = (
    "The part of each phase's time in which steps waited for data and the device was idle, on the rank that waited "
    "longest."
)
MOST_WAITING = 0.1
"""Fraction of a phase that may wait for data without a sentence about it."""
SHORT = ("run", "schedule", "top-1 best", "train s", "speedup", "wall s")  # on a terminal


def write_report(runs: Sequence[Path], out: Path) -> str:
    """Writes report.md and its pictures into `out`, comparing finished and unfinished runs.

    The baseline of the speedups is, for each data set, the recipe of the first finished run with the schedule
    `original`.

    Args:
        runs: run directories.
        out: folder of the report, created if missing.

    Returns:
        The main table as plain text, a sentence per comparison, the troubles, and the path of the report.

    Raises:
        CheckpointError: `runs` is empty, or a directory holds no run.
        ScaleprogError: the report cannot be written.
    """
    told, groups = read_groups(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScaleprogError(f"{out}: cannot create a folder for the report: {error.strerror}") from error
    baselines = _baselines(groups)
    compared = [[one, *rivals] for one in baselines.values() if (rivals := _rivals(one, groups))]
    verdicts = [_verdict(baseline, rival) for baseline, *rivals in compared for rival in rivals]
    pictures = [f"verdict{place if place > 1 else ''}.png" for place in range(1, len(compared) + 1)]
    try:
        timelines = _draw(told, groups, out)
        for picture, shown in zip(pictures, compared):
            draw_verdict(out / picture, [(g.name, g.mean("train_seconds"), g.mean("top1_best")) for g in shown])
    except OSError as error:
        raise ScaleprogError(f"{error.filename or out}: cannot write the report: {reason(error)}") from error
    metrics = _further_metrics(told)
    starved = [sentence for run in told if (sentence := _starved(run))]
    rows = [_row(run, metrics, baselines.get(run.task)) for run in told]
    parts = [
        "# Comparison of runs",
        *map(as_markdown, verdicts),
        *(f"![Seconds of training and final accuracy]({picture})" for picture in pictures),
        _about_baselines(list(baselines.values()), told),
        markdown_table(rows),
        "train s: forward, backward and optimizer of all training steps, supernets included, and scoring; CPU s: CPU "
        "time of rank 0 during that; scoring s: the part in which searches measure candidates; wall s: everything.",
        *_means(groups, baselines),
        "## Accuracy over training time\n\n![Top-1 against training seconds](accuracy_over_time.png)",
        "## Growth schedules\n\n![Resolution and depth over the steps](schedule.png)",
        *_searches([run for run in told if run.searches]),
        *_waiting(told),
        *map(as_markdown, starved),
        "## Timelines",
        *([TIMELINES, markdown_table([table_row(timeline) for timeline in timelines])] if timelines else []),
        *(_what_happened(run) for run in told),
    ]
    report = out / "report.md"
    try:
        write_whole(report, "\n\n".join(parts) + "\n")
    except OSError as error:
        raise ScaleprogError(f"{report}: cannot write the report: {reason(error)}") from error
    left_out = [f"{run.name}: {trouble}" for run in told for trouble in run.troubles]
    return "\n".join([plain_table(rows, SHORT), "", *map(as_text, [*verdicts, *starved, *left_out, report])])


def _draw(told: Sequence[RunRecord], groups: Sequence[Group], out: Path) -> list[Timeline]:
    """Draws the pictures. Returns the timelines that it drew. Raises OSError."""
    draw_accuracy(out / "accuracy_over_time.png", [curve(group.name, run) for group in groups for run in group.runs])
    draw_schedules(out / "schedule.png", _schedules(groups))
    searches = {run.name: run.searches for run in told if run.searches}
    if searches:
        draw_searches(out / "search.png", searches)
    timelines = [run.timeline for run in told if run.timeline is not None]
    if timelines:
        draw_timelines(out / "timeline.png", timelines)
    return timelines


# ---- tables


def _baselines(groups: Sequence[Group]) -> dict[str, Group]:
    """What the runs of each `RunRecord.task` are compared with."""
    found: dict[str, Group] = {}
    for group in groups:
        if group.runs[0].schedule == "Original" and group.values("train_seconds"):
            found.setdefault(group.runs[0].task, group)
    return found


def _rivals(baseline: Group, groups: Sequence[Group]) -> list[Group]:
    """The groups to compare with a baseline."""
    task = baseline.runs[0].task
    others = [group for group in groups if group is not baseline and group.runs[0].task == task and group.timed]
    return others if baseline.timed else []


def _speedup(baseline: Group | None, key: str) -> Callable[[float], float | None]:
    """The paper's speedup as a function of a run's seconds, of the kind `key`; it gives None without a baseline."""
    seconds = mean(baseline.values(key)) if baseline else None
    return lambda own: seconds / own - 1 if seconds and own else None


def _verdict(baseline: Group, rival: Group) -> str:
    """A sentence that compares two recipes."""
    (theirs, mine), (training, own), (wall, own_wall) = (
        [group.mean(key) for group in (baseline, rival)] for key in ("top1_best", "train_seconds", "wall_seconds")
    )
    return (
        f"{rival.name} ({rival.runs[0].schedule}) reaches {mine:.2f} % where {baseline.name} reaches {theirs:.2f} %, "
        f"in {own:.0f} s of training instead of {training:.0f} s ({_change(training / own - 1)}), "
        f"and in {own_wall:.0f} s instead of {wall:.0f} s of wall time ({wall / own_wall - 1:+.0%})."
    )


def _change(speedup: float) -> str:
    return f"{speedup:+.0%} speedup" if speedup >= 0 else f"{-speedup:.0%} slower"


def _further_metrics(runs: Sequence[RunRecord]) -> list[str]:
    """The metrics besides top-1 that every run has."""
    named = [
        {key for key in run.results if re.fullmatch("[a-z0-9_]{1,20}", key) and f"{key}_ema" in run.results} - {"top1"}
        for run in runs
    ]
    return sorted(set.intersection(*named)) if named else []


def _better(results: Mapping[str, Any], metric: str) -> float | None:
    """The accuracy (percent) or loss of the better weights; None if the values are neither."""
    found, most = [results[metric], results[f"{metric}_ema"]], 100 if is_percentage(metric) else math.inf
    return better(metric, found) if all(type(each) in (int, float) and 0 <= each <= most for each in found) else None


def _row(run: RunRecord, metrics: Sequence[str], baseline: Group | None) -> dict[str, str]:
    """One row of Table 2, with a column for each of `metrics`."""
    speedup, by_wall = (_speedup(baseline, key) for key in ("train_seconds", "wall_seconds"))
    results, epochs = run.results, run.recipe["train"]["epochs"]
    return {
        "run": run.name if run.finished else f"{run.name} (unfinished)",
        "schedule": run.schedule,
        "seed": str(run.recipe["seed"]),
        "stages": run.stages,
        "epochs": f"{epochs:g}" if run.finished else f"{run.epoch:.1f} of {epochs:g}",
        **{column: cell(results[key], spec) for column, (key, spec) in RESULTS.items()},
        **{metric: cell(_better(results, metric), ".2f") for metric in metrics},
        "speedup": cell(speedup(results["train_seconds"]) if run.finished else None, "+.1%"),
        "wall speedup": cell(by_wall(results["wall_seconds"]) if run.finished else None, "+.1%"),
    }


def _about_baselines(baselines: Sequence[Group], runs: Sequence[RunRecord]) -> str:
    if not baselines:
        there = any(run.schedule == "Original" for run in runs)
        reason = "the `original` run has not finished" if there else "no run has the schedule `original`"
        return f"Speedups are left out: {reason}, so there is no baseline."
    sentences = []
    for baseline in baselines:
        seconds = baseline.values("train_seconds")
        data = f" for {as_markdown(baseline.runs[0].data)}" if len(baselines) > 1 else ""
        several = f", the mean of {len(seconds)} runs" if len(seconds) > 1 else ""
        sentences.append(
            f"The baseline{data} is **{as_markdown(baseline.name)}** with {mean(seconds):.1f} s of training "
            f"steps{several}."
        )
    sentences.append(
        "Speedup is the baseline's training seconds / the run's - 1; wall speedup is the same for wall time."
    )
    return " ".join(sentences)


def _means(groups: Sequence[Group], baselines: Mapping[str, Group]) -> list[str]:
    """Mean and deviation of each recipe that finished with several seeds."""
    rows = []
    for group in groups:
        seconds = group.values("train_seconds")
        if len(seconds) < 2:
            continue
        row = {"recipe": group.name, "schedule": group.runs[0].schedule, "runs": str(len(seconds))}
        for column, (key, spec) in RESULTS.items():
            row[column] = spread(group.values(key), spec)
        speedup = _speedup(baselines.get(group.runs[0].task), "train_seconds")
        own = [ratio for s in seconds if (ratio := speedup(s)) is not None]
        row["speedup"] = f"{cell(speedup(mean(seconds)), '+.1%')} ± {stdev(own):.1%}" if own else "–"
        rows.append(row)
    if not rows:
        return []
    note = "Mean ± sample standard deviation over the seeds; the speedup is that of the mean training seconds."
    return ["## Over the seeds", markdown_table(rows), note]


def _searches(runs: Sequence[RunRecord]) -> list[str]:
    """What the searches found and chose."""
    if not runs:
        return []
    parts = [f"## Searches\n\n{SCORES}\n\n![Losses and scores](search.png)"]
    for run in runs:
        unit = "GMACs" if run.recipe["search"].get("times") == "modelled" else "step ms"
        rows, summary = [], []
        for search in run.searches:
            decision = search.decision
            if decision is None:
                summary.append(f"stage {search.stage} is not decided yet")
                continue
            summary.append(f"stage {search.stage} chose {decision.chosen.short}, {decision.because}")
            rows += [{"stage": str(search.stage), **row} for row in decision.table(unit)]
        parts += [f"### {as_markdown(run.name)}", f"{as_markdown('; '.join(summary))}."]
        parts += [markdown_table(rows)] if rows else []
    return parts


def _waiting(runs: Sequence[RunRecord]) -> list[str]:
    """How long each phase waited for data."""
    rows = [
        {
            "run": run.name,
            "stage": str(segment.stage),
            "phase": segment.phase,
            "network": segment.network.short,
            "waiting": f"{segment.waiting:.1%}",
        }
        for run in runs
        for segment in run.segments
        if segment.waiting is not None
    ]
    if not rows:
        return []
    return ["## Waiting for data", WAITING, markdown_table(rows)]


def _starved(run: RunRecord) -> str:
    """A sentence about the phase of a run that waits longest for data; empty if none waits long."""
    longest = max(run.segments, key=lambda segment: segment.waiting or 0.0, default=None)
    if longest is None or (longest.waiting or 0.0) <= MOST_WAITING:
        return ""
    return (
        f"{run.name} waits for data in {longest.waiting:.0%} of stage {longest.stage} ({longest.network.short}): "
        "use more cores and data.workers (auto), store smaller images (--shorter-side of scaleprog shards), or "
        "pack the shards (scaleprog shards pack)."
    )


def _what_happened(run: RunRecord) -> str:
    """Starts, growths, checkpoints, interruptions and errors of one run, and where its time went."""
    lines = [f"- {as_markdown(line)}" for line in (*run.troubles, *describe(run.timeline, run.events))]
    return "\n".join([f"### {as_markdown(run.name)}{'' if run.finished else ' (unfinished)'}", "", *lines])


# ---- for the pictures


def _schedules(groups: Sequence[Group]) -> list[tuple[str, Sequence[Segment]]]:
    """One schedule per run; runs of a group that trained the same networks at the same steps share one."""
    rows = []
    for group in groups:
        shared: dict[Any, list[RunRecord]] = {}
        for run in group.runs:
            trained = tuple((s.stage, s.phase, s.start, s.stop, s.network) for s in run.segments)
            shared.setdefault((trained, run.finished), []).append(run)
        for members in shared.values():
            seeds = ", ".join(str(run.recipe["seed"]) for run in members)
            label = f"{group.name}\nseeds {seeds}" if len(members) > 1 else members[0].name
            label += "" if members[0].finished else "\n(unfinished)"
            rows.append((label, members[0].segments))
    return rows
