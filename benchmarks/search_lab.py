"""A laboratory of schedules: a grid of recipes and seeds, run to the end, in one table and pictures.

    python -m benchmarks.search_lab GRID.yaml [--recipe FILE] [--seeds 0 1 2] [--jobs 2] [--records FILE] [--runs DIR]
                                    [--out DIR] [--only-table]

A grid names a recipe (`--recipe`: another) and cases, each settings of it; `schedule: 4 * 16x3 + 4 * 28x6` is short
for `growth.schedule`; `cost: 0.4` trains for as many epochs as cost 0.4 of what the complete model costs in the
recipe's epochs; `times: {optimizer.lr: 2}` doubles the recipe's own. Where a grid names `budgets`, each of its
`methods` is one more case at each, unless there is one of that name: a budget is that of a search, and the cost of
what does not search. A case with `only: FILE` is for that recipe. `group` gives cases a common color, `curve: true`
draws a case's accuracy over its cost. `benchmarks.rivals` compares the pairs of cases under `ingredients`.

Runs are trained in niced processes of one thread each, interleaved (all cases of a seed before the next seed). One that
was interrupted goes on. What is kept of a finished run is a line in the file of records, by which every grid knows it
again, on any machine: it stands for all settings that differ from their defaults, so a changed default wants new lines.

A cost is counted in steps of the complete model: a step costs the median CPU seconds of its kind over those of a
complete step of the same run, and scoring its CPU seconds likewise. So a faster machine does not move it, and other
programs on the same cores move it only where they are there for a part of the run.
Accuracy is the better of online and EMA top-1 at the end.

`--out` gets the table and pictures: accuracy against cost and, from the run directories that are still there, the
chosen schedules and each candidate's loss over the searches.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.figures import draw_cloud
from benchmarks.grid import Case, Grid
from benchmarks.grid import by_hand as by_hand
from scaleprog.errors import ScaleprogError
from scaleprog.growth.space import Subnet
from scaleprog.planning.plan import gmacs_of, outline, steps_per_epoch
from scaleprog.recipe import Recipe
from scaleprog.reporting.figures import COST, Curve, draw_accuracy, draw_schedules, draw_searches
from scaleprog.reporting.history import RunRecord as Told
from scaleprog.reporting.history import read_run
from scaleprog.reporting.timeline import still_told
from scaleprog.rundir.recorder import read_rows
from scaleprog.training.loop import train_rank
from scaleprog.training.resume import CHANGES
from scaleprog.version import ARITHMETIC

CHOICE = "choice"
"""Beside the kinds of steps, what has a price: all measurements of a search."""


class Trial:
    """One case with one seed, to be run."""

    def __init__(self, case: Case, seed: int, runs: Path) -> None:
        self.case, self.seed = case, seed
        self._settings = [*case.settings, f"seed={seed}", "sharding.engine=replicated", "data.workers=1"]
        self.recipe = recipe = Recipe.load(case.recipe, self._settings)
        chosen = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"evaluate", "checkpoint"})
        if recipe.growth.schedule != "automatic":
            chosen.pop("search", None)  # searches nothing
        self.digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = runs / self.digest

    def do(self) -> "Record":
        """Trains to the end in this process; the output goes beside the run directory."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
            train_rank(self.recipe, self.folder)
        return Record.of(self)


def times_larger(recipe: Recipe, row: Mapping[str, Any]) -> float:
    """How many times the GMACs of a recorded step's network the complete model has."""
    family, schedule = outline(recipe, steps_per_epoch(recipe))
    gmacs = partial(gmacs_of, recipe, family, schedule)
    return gmacs(schedule.full) / gmacs(Subnet(row["resolution"], row["depth"]))


@dataclass(frozen=True)
class Record:
    """What is kept of a finished run. Costs in steps of the complete model, accuracies in percent.

    `loss`: of training, the mean over the last twentieth of the steps: where these train the complete model, it
    says what accuracy does with less noise; `scoring`: the part of `cost` that the searches' measurements were;
    `prices`: of a step, by phase and size, and of a choice, with all its measurements; `stages`: what was trained,
    and for how many epochs; `curve`: (cost, accuracy) of each evaluation; `searches`: of each, its candidates'
    losses at each measurement; `counts`: how much of what has a price was done before each evaluation (records from
    before 2026-11-28 may lack it); `arithmetic`: of the scaleprog that trained it.
    """

    digest: str
    name: str
    seed: int
    date: str
    top1: float
    top1_ema: float
    loss: float
    cost: float
    scoring: float
    steps: int
    prices: dict[str, float]
    stages: list[tuple[str, float]]
    curve: list[tuple[float, float]]
    searches: list[list[dict[str, float]]]
    counts: list[dict[str, int]] = field(default_factory=list)
    arithmetic: int = ARITHMETIC

    @classmethod
    def of(cls, run: Trial) -> "Record":
        results = json.loads((run.folder / "results.json").read_text())
        rows, events = read_rows(run.folder / "metrics.jsonl"), still_told(read_rows(run.folder / "events.jsonl"))
        steps = [row for row in rows if "loss" in row]
        seconds: dict[str, list[float]] = defaultdict(list)
        for row in steps:
            seconds[_kind(row)].append(row["cpu_seconds"])
        largest = max(steps, key=lambda row: (row["resolution"], row["depth"], row["phase"] == "train"))
        complete = statistics.median(seconds[_kind(largest)]) * times_larger(run.recipe, largest)
        prices = {kind: statistics.median(found) / complete for kind, found in seconds.items()}
        choices = [event["step"] for event in events if event["event"] == "choice"]
        scoring = (results["train_cpu_seconds"] - sum(row["cpu_seconds"] for row in steps)) / complete
        if choices:
            prices[CHOICE] = scoring / len(choices)
        evaluations = [row for row in rows if "top1" in row]
        counts = [
            Counter(_kind(row) for row in steps if row["step"] <= evaluation["step"])
            + Counter(CHOICE for step in choices if step <= evaluation["step"])
            for evaluation in evaluations
        ]
        spent = costs(counts, prices)
        sizes = [(f"{s['resolution']}x{s['depth']}", s["epochs"]) for s in results["stages"]]
        searches: list[list[dict[str, float]]] = []
        for event in events:
            if event["event"] == "growth" and event["phase"] == "supernet":
                searches.append([])
            elif event["event"] == "measurement":
                searches[-1].append({f"{r}x{d}": round(loss, 5) for r, d, loss in event["losses"]})
        return cls(
            digest=run.digest,
            name=run.case.name,
            seed=run.seed,
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            top1=results["top1"],
            top1_ema=results["top1_ema"],
            loss=round(statistics.mean(row["loss"] for row in steps[-len(steps) // 20 :]), 5),
            cost=round(spent[-1], 1),
            scoring=round(scoring, 1),
            steps=len(steps),
            prices={kind: round(price, 4) for kind, price in prices.items()},
            stages=[(size, round(sum(e for _, e in same), 3)) for size, same in groupby(sizes, key=lambda s: s[0])],
            curve=[(round(cost, 1), max(row["top1"], row["top1_ema"])) for cost, row in zip(spent, evaluations)],
            searches=searches,
            counts=list(map(dict, counts)),
        )

    @property
    def best(self) -> float:
        """The better of online and EMA top-1."""
        return max(self.top1, self.top1_ema)

    @property
    def schedule(self) -> str:
        """What was trained, and for how many epochs."""
        return " → ".join(f"{epochs:.3g} · {size}" for size, epochs in self.stages)


def costs(counts: Sequence[Mapping[str, int]], prices: Mapping[str, float]) -> list[float]:
    """What a run had cost at each evaluation, if all that it did has these prices."""
    return [sum(prices[kind] * count for kind, count in done.items()) for done in counts]


def _kind(row: dict[str, Any]) -> str:
    return f"{row['phase']} {row['resolution']}x{row['depth']}"


class Records:
    """All records, by the digest of their settings; a file of JSON lines to which several processes may add.

    A record does not count for a run that this scaleprog would compute otherwise.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = read_rows(path) if path.exists() else []
        self._found = {row["digest"]: Record(**row) for row in rows}

    def __getitem__(self, run: Trial) -> Record:
        return self._found[run.digest]

    def __contains__(self, run: Trial) -> bool:
        found = self._found.get(run.digest)
        return found is not None and not any(
            change.version > found.arithmetic and change.affects(run.recipe) for change in CHANGES
        )

    def add(self, record: Record) -> None:
        """Appends a line."""
        self._found[record.digest] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps(vars(record)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--records", type=Path, default=Path("docs/results/search/runs.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs/lab"))
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only-table", action="store_true", help="write the table of the finished runs, and run nothing"
    )
    options = parser.parse_args()
    grid, records = Grid.load(options.grid, options.recipe), Records(options.records)
    runs = [Trial(case, seed, options.runs) for seed in options.seeds or grid.seeds for case in grid.cases]
    if not options.only_table:
        for _ in attempt(runs, records, options.jobs):
            pass
    runs = [run for run in runs if run in records]
    if not runs:
        raise ScaleprogError(f"{options.records}: has no run of this grid that this scaleprog would compute likewise")
    text = table(grid, runs, records)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{grid.name}.md").write_text(text)
        points = [(run.case.group, records[run].cost, records[run].best) for run in runs]
        draw_cloud(options.out / f"{grid.name}.png", points)
        if curves := [curve(run, records[run]) for run in runs if run.case.curve]:
            draw_accuracy(options.out / f"{grid.name}_curves.png", curves, COST)
        draw_choices(options.out / grid.name, runs)


def attempt(runs: Sequence[Trial], records: Records, jobs: int) -> Iterator[Record]:
    """Trains those of the runs that have no record, `jobs` at a time; gives each record when it is there."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn"), os.nice, (10,)) as pool:
        futures = {pool.submit(run.do): run for run in runs if run not in records}
        for future in as_completed(futures):
            run = futures[future]
            try:
                record = future.result()
            except Exception as error:  # the other runs shall not be lost
                print(f"failed: {run.case.name}, seed {run.seed}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            records.add(record)
            yield record


def table(grid: Grid, runs: Sequence[Trial], records: Records) -> str:
    """Markdown: a row per case, against the first case with the same seeds, and a row per run."""
    of = {(run.case.name, run.seed): records[run] for run in runs}
    reference = grid.cases[0].name
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, one thread a run. Top-1 in percent, mean and standard "
        f"deviation over seeds; Δ (with its standard error) and speedup ({reference} / run - 1) are against "
        f"{reference} with the same seed; costs in thousands of steps of the complete model.",
        "",
        "| case | seeds | top-1 | Δ | speedup | cost | scoring, of the cost |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in grid.cases:
        seeds = [seed for name, seed in of if name == case.name and (reference, seed) in of]
        if not seeds:
            continue
        mine, theirs = ([of[name, seed] for seed in seeds] for name in (case.name, reference))
        deltas = [m.best - t.best for m, t in zip(mine, theirs)]
        error = f" ± {statistics.stdev(deltas) / len(deltas) ** 0.5:.2f}" if len(deltas) > 1 else ""
        speedup = statistics.mean(t.cost / m.cost - 1 for m, t in zip(mine, theirs))
        cost = statistics.mean(record.cost for record in mine)
        scoring = statistics.mean(record.scoring / record.cost for record in mine)
        lines.append(
            f"| {case.name} | {', '.join(map(str, seeds))} | {mean_and_deviation([r.best for r in mine])} "
            f"| {statistics.mean(deltas):+.2f}{error} | {speedup:+.0%} | {cost / 1000:.2f} | {scoring:.1%} |"
        )
    lines += ["", "| run | seed | stages, epochs | online | EMA | cost |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {seed} | {r.schedule} | {r.top1:.2f} | {r.top1_ema:.2f} | {r.cost / 1000:.2f} |"
        for (name, seed), r in of.items()
    ]
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def curve(run: Trial, record: Record) -> Curve:
    """Accuracy against what was spent, as the paper's Fig. 4."""
    return Curve(run.case.name, *zip(*record.curve), (), finished=True)


def draw_choices(stem: Path, runs: Sequence[Trial]) -> None:
    """What was trained when, and what the searches measured: of each case the first run whose directory is here."""
    here: dict[str, Told] = {}
    for run in runs:
        if run.case.name not in here and run.folder.is_dir():
            here[run.case.name] = read_run(run.folder, run.case.name)
    if here:
        draw_schedules(Path(f"{stem}_schedules.png"), [(name, told.segments) for name, told in here.items()])
    if searches := {name: told.searches for name, told in here.items() if told.searches}:
        draw_searches(Path(f"{stem}_searches.png"), searches)


if __name__ == "__main__":
    main()
