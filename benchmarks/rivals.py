"""How cheap each method gets before it loses accuracy: this search, and what others do, against Original.

    python -m benchmarks.rivals [GRID.yaml] [--recipe FILE...] [--seeds 0 1 2] [--chosen-on 0 1 2] [--jobs 2]
                                [--records FILE] [--runs DIR] [--out DIR] [--only-table]

Runs are trained, recorded, and found again as by `benchmarks.search_lab`. A case of the grid is named `BUDGET,
METHOD`; the cases without a budget train the complete model for the whole length. The best of these is Original: that
with the highest mean over the seeds `--chosen-on`, among those that have run the most of them. By these seeds, what
`AutoProg` is was chosen by hand, too; the other seeds report.

A cost is counted twice. By GMACs, as EfficientTrain++ counts it: that of the steps, and of a search's measurements. And
as measured: a step of a kind has one price in all runs of a recipe, the median CPU time of its kind in complete steps;
where no run has measured a kind beside complete steps, GMACs set its price. On a CPU, small networks cost more than
their GMACs say.

An interval holds the mean difference with 90 % confidence, by Student's t over the seeds, of which each pairs two runs.
Top-1 is the better of online and EMA at the end.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

from benchmarks.figures import draw_rivals
from benchmarks.prices import by_gmacs, of_searches, shared
from benchmarks.search_lab import Grid, Record, Records, Trial, attempt, costs
from scaleprog.errors import ScaleprogError
from tests.chaos.harness import put_section

MARGIN = 0.1
"""Points of top-1 below Original that count as nothing lost."""
CONFIDENCE = 0.95
"""Of one end of an interval; both ends leave out 10 %."""
NOTE = """\
Top-1 is the better of online and EMA at the end. Δ pairs the runs of a seed; its interval holds the mean with 90 %
confidence (Student's t). Costs are parts of Original's: by GMACs, and by CPU time, with one price for a kind of step.
`python -m benchmarks.rivals --only-table --out docs/results/frontier` makes these tables from `rivals.jsonl`."""
"""Stands above the tables of each recipe."""
OURS = "AutoProg"
"""The method that is this project's, and with what the names of its variants begin."""


@dataclass(frozen=True)
class Gap:
    """A method's mean distance to Original over seeds, and how far it may be off, in points of top-1."""

    mean: float
    error: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> "Gap":
        """Of paired runs; of a single pair nobody knows the error."""
        if len(differences) < 2:
            return cls(mean(differences), inf)
        quantile = float(t.ppf(CONFIDENCE, len(differences) - 1))
        return cls(mean(differences), quantile * stdev(differences) / len(differences) ** 0.5)

    @property
    def least(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.error

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + (f" ± {self.error:.2f}" if self.error < inf else "")


@dataclass(frozen=True)
class Row:
    """A case over its seeds: `cost`, `measured`: parts of Original's cost, by GMACs and by CPU time; `search`: the
    searches' part of the run's own CPU time."""

    budget: str
    method: str
    seeds: tuple[int, ...]
    top1: float
    gap: Gap
    cost: float
    measured: float
    search: float


class Runs:
    """The finished runs of a grid."""

    def __init__(self, grid: Grid, trials: Sequence[Trial], records: Records, chosen_on: Sequence[int]) -> None:
        """`chosen_on`: the seeds by which Original and the best rivals are chosen."""
        done = [trial for trial in trials if trial in records]
        self.chosen_on = set(chosen_on)
        self.names = tuple(case.name for case in grid.cases)
        self.ingredients = grid.ingredients
        self.found = {(trial.case.name, trial.seed): records[trial] for trial in done}
        prices = shared(done, records)
        self.measured = {t.digest: costs(records[t].counts, prices[t.digest])[-1] for t in done}
        self.searches = {t.digest: of_searches(records[t], prices[t.digest]) for t in done}
        self.gmacs = {t.digest: by_gmacs(t, records[t]) for t in done}
        whole = [name for name in self.names if not budget_of(name) and self.seeds(name)]
        if not whole:
            raise ScaleprogError(
                "no run has trained the complete model for the whole length, so nothing can be compared"
            )
        choosing = {name: self.seeds(name) & self.chosen_on for name in whole}
        widest = max(choosing.values(), key=len)
        self.original = max(
            (name for name in whole if choosing[name] >= widest),
            key=lambda name: self.top1(name, widest or self.seeds(name)),
        )

    def seeds(self, name: str) -> set[int]:
        """The seeds of which a case has finished."""
        return {seed for case, seed in self.found if case == name}

    def rows(self, *, reporting: bool) -> list[Row]:
        """The rows over the seeds that report, or over those that chose."""
        every = {seed for _, seed in self.found}
        seeds = every - self.chosen_on if reporting else every & self.chosen_on
        return [row for name in self.names if (row := self.row(name, seeds))]

    def of(self, name: str, seeds: Sequence[int] | set[int]) -> list[Record]:
        return [self.found[name, seed] for seed in sorted(seeds)]

    def top1(self, name: str, seeds: Sequence[int] | set[int]) -> float:
        return mean(record.best for record in self.of(name, seeds))

    def gap(self, name: str, other: str, seeds: set[int]) -> Gap:
        """How much better a case is than another one, over seeds that both have."""
        pairs = zip(self.of(name, seeds), self.of(other, seeds), strict=True)
        return Gap.of([mine.best - theirs.best for mine, theirs in pairs])

    def row(self, name: str, seeds: set[int] | None = None) -> Row | None:
        """A case against Original over the seeds that both have, among `seeds`; None if there are none."""
        both = self.seeds(name) & self.seeds(self.original)
        both &= both if seeds is None else seeds
        if not both:
            return None
        mine, theirs = self.of(name, both), self.of(self.original, both)
        cost, measured = (
            mean(of[record.digest] for record in mine) / mean(of[record.digest] for record in theirs)
            for of in (self.gmacs, self.measured)
        )
        search = sum(self.searches[r.digest] for r in mine) / sum(self.measured[r.digest] for r in mine)
        gap, top1 = self.gap(name, self.original, both), self.top1(name, both)
        return Row(budget_of(name), method_of(name), tuple(sorted(both)), top1, gap, cost, measured, search)


def budget_of(name: str) -> str:
    """`40 %, AutoProg` -> `40 %`; empty for a case without a budget."""
    budget, _, method = name.partition(", ")
    return budget if method and budget.endswith("%") else ""


def method_of(name: str) -> str:
    """`40 %, AutoProg` -> `AutoProg`."""
    return name.removeprefix(f"{budget_of(name)}, ")


# ---- tables


def page(runs: Runs) -> str:
    """The tables of a recipe."""
    parts = [NOTE]
    if reported := runs.rows(reporting=True):
        parts += ["The seeds that report:", each_case(reported), cheapest(reported)]
        parts += [table] if (table := duels(runs)) else []
    if chosen := runs.rows(reporting=False):
        parts += ["The seeds that chose:", each_case(chosen)]
    if table := ingredients(runs):
        parts += ["What each ingredient brings, alone in a run that has none, and as the last that a run lacks:", table]
    return "\n\n".join(parts)


def each_case(rows: Sequence[Row]) -> str:
    """Every case against Original."""
    lines = [
        "| budget | method | seeds | top-1 | Δ to Original | cost, GMACs | × cheaper | cost, measured | × cheaper "
        "| searches, of the run |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.budget or '–'} | {row.method} | {', '.join(map(str, row.seeds))} | {row.top1:.2f} | {row.gap} "
            f"| {row.cost:.1%} | {1 / row.cost:.2f} | {row.measured:.1%} | {1 / row.measured:.2f} "
            f"| {format(row.search, '.1%') if row.search else '–'} |"
        )
    return "\n".join(lines)


def cheapest(rows: Sequence[Row]) -> str:
    """The largest saving at which a method has lost nothing, by its mean and by the lower end of its interval."""
    lines = [
        f"How many times cheaper than Original (by GMACs) a method is where it is {MARGIN} points below Original, by "
        "its mean, and by the lower end of its interval, below which it lies in one of twenty such comparisons:\n",
        "| method | by the mean | by the lower end |\n|---|---|---|",
    ]
    cheap = sorted((row for row in rows if row.budget and row.cost < 1), key=lambda row: row.cost)
    for method in dict.fromkeys(row.method for row in cheap):
        own = [row for row in cheap if row.method == method]
        means = [(row.cost, row.gap.mean) for row in own]
        lowest = [(row.cost, row.gap.least) for row in own if row.gap.error < inf]
        lines.append(f"| {method} | {saving(means)} | {saving(lowest)} |")
    return "\n".join(lines)


def saving(points: Sequence[tuple[float, float]]) -> str:
    """How many times cheaper than Original the cheapest point is that has lost nothing.

    Between two neighboring points, the logarithm of the cost is interpolated; nothing is extrapolated.

    Args:
        points: (part of Original's cost, distance to Original) in ascending order of cost.
    """
    good = [index for index, (_, gap) in enumerate(points) if gap >= -MARGIN]
    if not good:
        return "not reached" if points else "–"
    first = good[0]
    if first == 0:
        return f"≥ {1 / points[0][0]:.2f}"
    (cheap, low), (dear, high) = points[first - 1], points[first]
    part = (-MARGIN - low) / (high - low)
    return f"{1 / exp(log(cheap) + part * (log(dear) - log(cheap))):.2f}"


def duels(runs: Runs) -> str:
    """Ours against each rival at each budget, on the seeds that report; empty if there is none."""
    lines = []
    for name in runs.names:
        budget, rival = budget_of(name), method_of(name)
        ours = f"{budget}, {OURS}"
        seeds = (runs.seeds(ours) & runs.seeds(name)) - runs.chosen_on
        if seeds and not rival.startswith(OURS):
            named = ", ".join(map(str, sorted(seeds)))
            lines.append(f"| {budget} | {OURS} | {rival} | {named} | {runs.gap(ours, name, seeds)} |")
    head = ["| budget | ours | rival | seeds | ours - rival |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def ingredients(runs: Runs) -> str:
    """What each ingredient brings alone and last, on the seeds that chose; empty if none has been measured."""
    lines = []
    for told, pairs in runs.ingredients.items():
        cells = []
        for having, lacking in (pairs["alone"], pairs["last"]):
            seeds = runs.seeds(having) & runs.seeds(lacking) & runs.chosen_on
            cells += [str(runs.gap(having, lacking, seeds)), ", ".join(map(str, sorted(seeds)))] if seeds else ["–"] * 2
        if set(cells) != {"–"}:
            lines.append(f"| {told} | {' | '.join(cells)} |")
    head = ["| ingredient | alone | seeds | last | seeds |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) if lines else ""


def curves(runs: Runs) -> dict[str, list[tuple[float, Gap]]]:
    """By method, the part of Original's cost by GMACs and the distance to Original at each budget, on the seeds that
    report."""
    drawn: dict[str, list[tuple[float, Gap]]] = {}
    for row in sorted(runs.rows(reporting=True), key=lambda row: row.cost):
        if row.budget and row.cost < 1:
            drawn.setdefault(row.method, []).append((row.cost, row.gap))
    return drawn


def without_variants(drawn: Mapping[str, list[tuple[float, Gap]]]) -> dict[str, list[tuple[float, Gap]]]:
    """`drawn`, but variants of `OURS` only where that has not run."""
    return {
        method: points for method, points in drawn.items() if OURS not in drawn or not method.startswith(f"{OURS}, ")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, nargs="?", default=Path("benchmarks/grids/rivals.yaml"))
    parser.add_argument("--recipe", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--chosen-on", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--records", type=Path, default=Path("docs/results/frontier/rivals.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    options = parser.parse_args()
    records, drawn = Records(options.records), {}
    for recipe in options.recipe or [None]:
        grid = Grid.load(options.grid, recipe)
        trials = [Trial(case, seed, options.runs) for seed in options.seeds or grid.seeds for case in grid.cases]
        if not options.only_table:
            for record in attempt(trials, records, options.jobs):
                print(f"{record.name}, seed {record.seed}: {record.best:.2f}", flush=True)
        name = Path(grid.cases[0].recipe).parent.name + "/" + Path(grid.cases[0].recipe).stem
        try:
            runs = Runs(grid, trials, records, options.chosen_on)
        except ScaleprogError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        text = page(runs)
        print(f"## {name}\n\n{text}\n")
        if found := without_variants(curves(runs)):
            drawn[name] = found
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            put_section(options.out / "rivals.md", name, text)
    if options.out is not None and drawn:
        draw_rivals(options.out / "rivals.png", drawn)


if __name__ == "__main__":
    main()
