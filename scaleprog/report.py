"""Compares runs: report.md with the paper's Table 2, what the searches decided, the runs' lives, and pictures."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.figures import (
    Curve,
    Search,
    Segment,
    draw_accuracy,
    draw_lives,
    draw_schedules,
    draw_searches,
    stage_begins,
)
from scaleprog.growth.space import Subnet
from scaleprog.life import Life, describe, read_life, still_told, table_row
from scaleprog.metrics import read_rows
from scaleprog.state import decision_from_json, unpaired

Row = dict[str, Any]
NAMES = {"original": "Original", "linear": "Prog", "automatic": "AutoProg", "supernet": "Supernet"}  # the paper's
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
class Run:
    """What one run directory tells. `results` holds the keys of results.json that the tables show, or for an
    unfinished run what is known of them so far; times in seconds, accuracies in percent."""

    name: str
    recipe: Mapping[str, Any]
    finished: bool
    results: Mapping[str, Any]
    evaluations: Sequence[Row]
    segments: Sequence[Segment]
    searches: Sequence[Search]
    events: Sequence[Row]
    life: Life | None
    epoch: float

    @property
    def twins(self) -> str:
        """Equal for runs that share their recipe apart from the seed."""
        return json.dumps({**self.recipe, "seed": None}, sort_keys=True)

    @property
    def schedule(self) -> str:
        """The growth schedule as the paper calls it."""
        growth = self.recipe["growth"]
        if not isinstance(growth["schedule"], str):
            return "by hand"
        ratio = "" if growth["schedule"] == "original" else f" {growth['smallest']:g}Ω"
        return NAMES[growth["schedule"]] + ratio

    @property
    def stages(self) -> str:
        """The trained networks, as in "16x4 -> 28x8"; dots where more are to come."""
        if self.finished:
            return " -> ".join(f"{s['resolution']}x{s['depth']}" for s in self.results["stages"])
        return " -> ".join([*(_size(s.network) for s in self.segments if s.phase == "train"), "..."])


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
    read = [read_run(folder, name) for folder, name in zip(folders, _names(folders))]
    groups = _groups(read)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScaleprogError(f"{out}: no folder for a report can be made there: {error.strerror}") from error
    draw_accuracy(out / "accuracy_over_time.png", [_curve(group, run) for group in groups for run in group.runs])
    draw_schedules(out / "schedule.png", _timelines(groups))
    searches = {run.name: run.searches for run in read if run.searches}
    if searches:
        draw_searches(out / "search.png", searches)
    lives = [run.life for run in read if run.life is not None]
    if lives:
        draw_lives(out / "life.png", lives)
    baseline = next((g for g in groups if g.runs[0].schedule == "Original" and g.values("train_seconds")), None)
    speedup = _speedup(baseline)
    rows = [_row(run, speedup) for run in read]
    parts = [
        "# Comparison of runs",
        _about_baseline(baseline, read),
        _markdown(rows),
        "train s: forward, backward and optimizer of all training steps, supernets included; CPU s: CPU time of rank 0 "
        "during these; scoring s: measuring the candidates of the searches; wall s: everything.",
        *_means(groups, speedup),
        "## Accuracy over training time\n\n![Top-1 against training seconds](accuracy_over_time.png)",
        "## Growth schedules\n\n![Resolution and depth over the steps](schedule.png)",
        *_searches([run for run in read if run.searches]),
        "## The runs' lives",
        *([LIVES, _markdown([table_row(life) for life in lives])] if lives else []),
        *(_life(run) for run in read),
    ]
    report = out / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return f"{_plain(rows, SHORT)}\n\n{report}"


# ---- reading


def read_run(folder: Path, name: str) -> Run:
    """Reads a run directory. Raises CheckpointError where there is none, or nothing was recorded in it yet."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run directory")
    rows = read_rows(folder / "metrics.jsonl")
    recipe = _parsed(folder / "recipe.yaml", yaml.safe_load, ("seed", "train", "growth", "search"))
    if recipe is None:
        raise CheckpointError(f"{folder}: no recipe.yaml; a run directory is what `scaleprog train` writes")
    events = read_rows(folder / "events.jsonl")
    if not rows and not events:
        raise CheckpointError(f"{folder}: metrics.jsonl is missing or empty; the run has not recorded anything yet")
    results = _parsed(folder / "results.json", json.loads, ("stages", *(key for key, _ in RESULTS.values())))
    steps = _last_told(row for row in rows if "step_seconds" in row)
    evaluations = _last_told(row for row in rows if "top1" in row)
    return Run(
        name, recipe, results is not None, results or _so_far(steps, evaluations), evaluations, _segments(steps),
        _read_searches(events, steps), events, read_life(folder, name, rows, events),
        steps[-1]["epoch"] if steps else 0.0,
    )  # fmt: skip


def _parsed(path: Path, parse: Callable[[str], Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """A file's mapping, which must hold `keys`; None where there is no such file."""
    if not path.exists():
        return None
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
    if not isinstance(values, dict) or not values.keys() >= set(keys):
        raise CheckpointError(f"{path}: expected the keys {', '.join(keys)}; was it written by another version?")
    return values


def _last_told(rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    """One row per step, in the order of the steps: the last that was written."""
    return sorted({row["step"]: row for row in rows}.values(), key=lambda row: row["step"])


def _so_far(steps: Sequence[Row], evaluations: Sequence[Row]) -> Row:
    last = evaluations[-1] if evaluations else {"top1": None, "top1_ema": None}
    return {
        "top1": last["top1"], "top1_ema": last["top1_ema"], "top1_best": _best(last) if evaluations else None,
        "train_seconds": sum(row["step_seconds"] for row in steps),
        "train_cpu_seconds": sum(row["cpu_seconds"] for row in steps), "search_seconds": None, "wall_seconds": None,
    }  # fmt: skip


def _best(evaluation: Row) -> float:
    return max(evaluation["top1"], evaluation["top1_ema"])


def _segments(steps: Sequence[Row]) -> list[Segment]:
    """The phases that the steps tell of."""
    before = list(accumulate((row["step_seconds"] for row in steps), initial=0.0))
    segments = []
    for (stage, phase), group in groupby(enumerate(steps), lambda item: (item[1]["stage"], item[1]["phase"])):
        indices, rows = zip(*group)
        largest = Subnet(max(row["resolution"] for row in rows), max(row["depth"] for row in rows))
        segments.append(Segment(stage, phase, rows[0]["step"] - 1, rows[-1]["step"], largest, before[indices[0]]))
    return segments


def _read_searches(events: Sequence[Row], steps: Sequence[Row]) -> list[Search]:
    """The searches in order, each with the measurements since the one before; the last may be undecided."""
    measured = _last_told(event for event in still_told(events) if event["event"] == "measurement")
    choices = {event["stage"]: event for event in still_told(events) if event["event"] == "choice"}
    searches, since = [], -1
    for stage, choice in sorted(choices.items()):
        own = [row for row in measured if since < row["step"] <= choice["step"]]
        searches.append(Search(stage, *_losses(own), decision_from_json(choice)))
        since = choice["step"]
    undecided = [row for row in measured if row["step"] > since]
    if undecided and steps:
        searches.append(Search(steps[-1]["stage"], *_losses(undecided), None))
    return searches


def _losses(measured: Sequence[Row]) -> tuple[tuple[int, ...], dict[Subnet, tuple[float, ...]]]:
    """The steps of some measurements, and per candidate the losses."""
    told = [unpaired(event["losses"]) for event in measured]
    losses = {subnet: tuple(losses[subnet] for losses in told) for subnet in (told[-1] if told else ())}
    return tuple(event["step"] for event in measured), losses


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


def _size(subnet: Subnet) -> str:
    return f"{subnet.resolution}x{subnet.depth}"


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
        f"The baseline is **{baseline.name}** with {mean(seconds):.1f} s of training steps{several}. "
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
        modelled = run.recipe["search"]["times"] == "modelled"
        unit, scale = ("GMACs", 1.0) if modelled else ("step ms", 1e3)
        rows, summary = [], []
        for search in run.searches:
            decision = search.decision
            if decision is None:
                summary.append(f"stage {search.stage} is not decided yet")
                continue
            summary.append(f"stage {search.stage} chose {_size(decision.chosen)}, {decision.because}")
            for subnet, loss, time, score in zip(
                decision.candidates, decision.losses, decision.times, decision.scores, strict=True
            ):
                rows.append({
                    "stage": str(search.stage), "candidate": _size(subnet), "loss": f"{loss:.4f}",
                    unit: f"{time * scale:.4g}", "score": _cell(score, ".4f"),
                    "chosen": "chosen" if subnet == decision.chosen else "",
                })  # fmt: skip
        parts += [f"### {run.name}", "; ".join(summary) + ".", *([_markdown(rows)] if rows else [])]
    return parts


def _life(run: Run) -> str:
    """Starts, growths, checkpoints, interruptions and errors of one run, and where its time went."""
    lines = [f"- {line}" for line in describe(run.life, run.events)]
    return "\n".join([f"### {run.name}{'' if run.finished else ' (unfinished)'}", "", *lines])


def _cell(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _padded(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> list[list[str]]:
    """Header and rows with cells of equal width."""
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    header = {column: column for column in columns}
    return [[r[c].ljust(widths[c]) if c in TEXT else r[c].rjust(widths[c]) for c in columns] for r in (header, *rows)]


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as a Markdown table."""
    escaped = [{key: cell.replace("|", "\\|") for key, cell in row.items()} for row in rows]
    header, *lines = _padded(escaped, list(rows[0]))
    rule = ["-" * len(cell) if c in TEXT else "-" * (len(cell) - 1) + ":" for c, cell in zip(rows[0], header)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def _plain(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> str:
    """Some columns of the rows for a terminal."""
    return "\n".join("  ".join(line).rstrip() for line in _padded(rows, columns))


# ---- for the pictures


def _curve(group: Group, run: Run) -> Curve:
    seconds = tuple(row["train_seconds"] for row in run.evaluations)
    top1 = tuple(map(_best, run.evaluations))
    return Curve(group.name, seconds, top1, stage_begins(run.segments), run.finished)


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
