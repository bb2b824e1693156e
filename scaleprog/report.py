"""Compares runs: report.md with the paper's Table 2, what the searches decided, the runs' lives, and pictures."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scaleprog.display import as_markdown, as_text
from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.figures import (
    Curve,
    Segment,
    draw_accuracy,
    draw_lives,
    draw_schedules,
    draw_searches,
)
from scaleprog.files import write_whole
from scaleprog.history import Run, best, read_run, size_of
from scaleprog.life import Life, describe, table_row
from scaleprog.reading import reason

TEXT = ("run", "recipe", "schedule", "stages", "candidate")  # columns that stand at the left
RESULTS = {  # columns, their keys in results.json and formats
    "top-1": ("top1", ".2f"), "top-1 EMA": ("top1_ema", ".2f"), "top-1 best": ("top1_best", ".2f"),
    "train s": ("train_seconds", ".1f"), "CPU s": ("train_cpu_seconds", ".1f"), "scoring s": ("search_seconds", ".1f"),
    "wall s": ("wall_seconds", ".1f"),
}  # fmt: skip
LIVES = (
    "![Steps over the time of day, with what happened](life.png)\n\nShares of the time from the first start to the "
    "last sign of life. Steps and seconds lost count as far as they had been written down, every `train.log_every` "
    "steps; start-up: from the beginning of the process; down: from the last sign of life to the next beginning; rest: "
    "what nothing here measures, such as the way out."
)
SCORES = (
    "Chosen is the lowest score: loss x time^alpha or, within a budget, what is lost to the complete model's loss per "
    "step of it that is saved (–: a network that cannot save enough). Where nothing is to be saved any more, the "
    "complete model is chosen, which has no score."
)
SHORT = ("run", "schedule", "stages", "top-1 best", "train s", "wall s", "speedup")  # columns for a terminal


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only."""

    name: str
    runs: Sequence[Run]

    def values(self, key: str) -> list[float]:
        """One of the results of all finished runs."""
        return [run.results[key] for run in self.runs if run.finished]


def write_report(runs: Sequence[Path], out: Path) -> str:
    """Writes OUT/report.md and its pictures, comparing finished and unfinished run directories.

    Returns the main table as plain text and where the report lies. The first finished `original` run's recipe is the
    baseline of the speedups. Raises CheckpointError for a directory that holds no run, ScaleprogError for a bad `out`.
    """
    folders = list(dict.fromkeys(Path(run).resolve() for run in runs))
    if not folders:
        raise CheckpointError("no run directory given; name at least one")
    told = [read_run(folder, name) for folder, name in zip(folders, _names(folders))]
    groups = _groups(told)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScaleprogError(f"{out}: no folder for a report can be made there: {error.strerror}") from error
    try:
        lives = _draw(told, groups, out)
    except OSError as error:
        raise ScaleprogError(f"{error.filename or out}: the report cannot be written: {reason(error)}") from error
    baseline = next((g for g in groups if g.runs[0].schedule == "Original" and g.values("train_seconds")), None)
    speedup = _speedup(baseline)
    rows = [_row(run, speedup) for run in told]
    parts = [
        "# Comparison of runs",
        _about_baseline(baseline, told),
        _markdown(rows),
        "train s: forward, backward and optimizer of all training steps, supernets included; CPU s: CPU time of rank 0 "
        "during these; scoring s: measuring the candidates of the searches; wall s: everything.",
        *_means(groups, speedup),
        "## Accuracy over training time\n\n![Top-1 against training seconds](accuracy_over_time.png)",
        "## Growth schedules\n\n![Resolution and depth over the steps](schedule.png)",
        *_searches([run for run in told if run.searches]),
        "## The runs' lives",
        *([LIVES, _markdown([table_row(life) for life in lives])] if lives else []),
        *(_life(run) for run in told),
    ]
    report = out / "report.md"
    try:
        write_whole(report, "\n\n".join(parts) + "\n")
    except OSError as error:
        raise ScaleprogError(f"{report}: the report cannot be written: {reason(error)}") from error
    left_out = [f"{run.name}: {trouble}" for run in told for trouble in run.troubles]
    return "\n".join([_plain(rows, SHORT), "", *map(as_text, left_out), as_text(report)])


def _draw(told: Sequence[Run], groups: Sequence[Group], out: Path) -> list[Life]:
    """Draws the pictures; returns the lives that are in one."""
    draw_accuracy(out / "accuracy_over_time.png", [_curve(group, run) for group in groups for run in group.runs])
    draw_schedules(out / "schedule.png", _timelines(groups))
    searches = {run.name: run.searches for run in told if run.searches}
    if searches:
        draw_searches(out / "search.png", searches)
    lives = [run.life for run in told if run.life is not None]
    if lives:
        draw_lives(out / "life.png", lives)
    return lives


# ---- naming and grouping


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = 1
    while len({folder.parts[-parts:] for folder in folders}) < len(folders):
        parts += 1
    return ["/".join(folder.parts[-parts:]) for folder in folders]


def _groups(runs: Sequence[Run]) -> list[Group]:
    """Runs with one recipe together, under the run's name without its seed where that is nobody else's."""
    twins: dict[str, list[Run]] = {}
    for run in runs:
        twins.setdefault(run.twins, []).append(run)
    groups: dict[str, Group] = {}
    for members in twins.values():
        short = re.sub(r"[-_/]seed\d+$", "", members[0].name)
        name = short if short not in groups else members[0].name
        groups[name] = Group(name, members)
    return list(groups.values())


# ---- tables


def _speedup(baseline: Group | None) -> Callable[[float], float | None]:
    """The paper's speedup of a run by its training seconds; None where there is no baseline."""
    seconds = mean(baseline.values("train_seconds")) if baseline else None
    return lambda own: seconds / own - 1 if seconds and own else None


def _row(run: Run, speedup: Callable[[float], float | None]) -> dict[str, str]:
    """One row of Table 2."""
    results, epochs = run.results, run.recipe["train"]["epochs"]
    return {
        "run": run.name if run.finished else f"{run.name} (unfinished)",
        "schedule": run.schedule,
        "seed": str(run.recipe["seed"]),
        "stages": run.stages,
        "epochs": f"{epochs:g}" if run.finished else f"{run.epoch:.1f} of {epochs:g}",
        **{column: _cell(results[key], spec) for column, (key, spec) in RESULTS.items()},
        "speedup": _cell(speedup(results["train_seconds"]) if run.finished else None, "+.1%"),
    }


def _about_baseline(baseline: Group | None, runs: Sequence[Run]) -> str:
    if baseline is None:
        there = any(run.schedule == "Original" for run in runs)
        reason = "the `original` run has not finished" if there else "no run has the schedule `original`"
        return f"Speedups are left out: {reason}, so there is no baseline."
    seconds = baseline.values("train_seconds")
    several = f", the mean of {len(seconds)} runs" if len(seconds) > 1 else ""
    return (
        f"The baseline is **{as_markdown(baseline.name)}** with {mean(seconds):.1f} s of training steps{several}. "
        "Speedup is the baseline's training seconds / the run's - 1."
    )


def _means(groups: Sequence[Group], speedup: Callable[[float], float | None]) -> list[str]:
    """Mean and deviation of each recipe that finished with several seeds."""
    rows = []
    for group in groups:
        seconds = group.values("train_seconds")
        if len(seconds) < 2:
            continue
        row = {"recipe": group.name, "schedule": group.runs[0].schedule, "runs": str(len(seconds))}
        for column, (key, spec) in RESULTS.items():
            values = group.values(key)
            row[column] = f"{mean(values):{spec}} ± {stdev(values):{spec}}"
        own = [ratio for s in seconds if (ratio := speedup(s)) is not None]
        row["speedup"] = f"{_cell(speedup(mean(seconds)), '+.1%')} ± {stdev(own):.1%}" if own else "–"
        rows.append(row)
    if not rows:
        return []
    note = "Mean ± sample standard deviation over the seeds; the speedup is that of the mean training seconds."
    return ["## Over the seeds", _markdown(rows), note]


def _searches(runs: Sequence[Run]) -> list[str]:
    """What the searches found and chose."""
    if not runs:
        return []
    parts = [f"## Searches\n\n{SCORES}\n\n![Losses and scores](search.png)"]
    for run in runs:
        modelled = run.recipe["search"].get("times") == "modelled"
        unit, scale = ("GMACs", 1.0) if modelled else ("step ms", 1e3)
        rows, summary = [], []
        for search in run.searches:
            decision = search.decision
            if decision is None:
                summary.append(f"stage {search.stage} is not decided yet")
                continue
            summary.append(f"stage {search.stage} chose {size_of(decision.chosen)}, {decision.because}")
            for subnet, loss, time, score in zip(
                decision.candidates, decision.losses, decision.times, decision.scores, strict=True
            ):
                rows.append({
                    "stage": str(search.stage), "candidate": size_of(subnet), "loss": f"{loss:.4f}",
                    unit: f"{time * scale:.4g}", "score": _cell(score, ".4f"),
                    "chosen": "chosen" if subnet == decision.chosen else "",
                })  # fmt: skip
        parts += [f"### {as_markdown(run.name)}", f"{as_markdown('; '.join(summary))}."]
        parts += [_markdown(rows)] if rows else []
    return parts


def _life(run: Run) -> str:
    """Starts, growths, checkpoints, interruptions and errors of one run, and where its time went."""
    lines = [f"- {as_markdown(line)}" for line in (*run.troubles, *describe(run.life, run.events))]
    return "\n".join([f"### {as_markdown(run.name)}{'' if run.finished else ' (unfinished)'}", "", *lines])


def _cell(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _padded(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[list[str]]:
    """Header and rows with cells of equal width."""
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    header = {column: column for column in columns}
    return [[r[c].ljust(widths[c]) if c in TEXT else r[c].rjust(widths[c]) for c in columns] for r in (header, *rows)]


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as a Markdown table."""
    escaped = [{key: as_markdown(cell) for key, cell in row.items()} for row in rows]
    header, *lines = _padded(escaped, list(rows[0]))
    rule = ["-" * len(cell) if c in TEXT else "-" * (len(cell) - 1) + ":" for c, cell in zip(rows[0], header)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _plain(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Some columns of the rows for a terminal."""
    shown = [{column: as_text(row[column]) for column in columns} for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in _padded(shown, columns))


# ---- for the pictures


def _curve(group: Group, run: Run) -> Curve:
    begins = tuple(after.seconds for before, after in pairwise(run.segments) if after.stage != before.stage)
    timed = [row for row in run.evaluations if "train_seconds" in row]
    seconds = tuple(row["train_seconds"] for row in timed)
    top1 = tuple(map(best, timed))
    return Curve(group.name, seconds, top1, begins, run.finished)


def _timelines(groups: Sequence[Group]) -> list[tuple[str, Sequence[Segment]]]:
    """A timeline per run; runs of one group that trained the same networks at the same steps share theirs."""
    timelines = []
    for group in groups:
        shared: dict[Any, list[Run]] = {}
        for run in group.runs:
            trained = tuple((s.stage, s.phase, s.start, s.stop, s.network) for s in run.segments)
            shared.setdefault((trained, run.finished), []).append(run)
        for members in shared.values():
            seeds = ", ".join(str(run.recipe["seed"]) for run in members)
            label = f"{group.name}\nseeds {seeds}" if len(members) > 1 else members[0].name
            timelines.append((label + "\n(unfinished)" * (not members[0].finished), members[0].segments))
    return timelines
