"""Accuracy over cost, from runs too short to learn to runs trained to their ceiling: is a method ever a bad bargain?

    python -m benchmarks.frontier [GRID.yaml] [--jobs 2] [--records FILE] [--runs DIR] [--out DIR] [--only-table]

For every data set, length and seed of the grid three runs: Original; the method; and Original trained only for as many
steps as the method's run has cost, so that both have cost the same. All decay their learning rate over their own length
and warm up for a twentieth of it. Costs are counted as in `benchmarks.search_lab`, whose records this shares.

The tables give, by length, the method's distance to either Original, and by accuracy the cost at which each gets there,
between two lengths by the logarithm of the cost. Intervals hold 90 % of 10,000 bootstrap samples of the seeds, which
both methods share.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml

from benchmarks.figures import draw_frontier
from benchmarks.search_lab import Case, Record, Records, Trial, attempt
from scaleprog.planning.plan import steps_per_epoch
from scaleprog.recipe import Recipe

ORIGINAL, SAME_COST = "Original", "Original at the same cost"
SAMPLES, INTERVAL = 10_000, (5, 95)
TARGETS = (1.0, 0.5, 0.0)
"""Accuracies whose cost is compared: so many points below the best that Original reaches."""


Found = dict[tuple[str, int, int, str], Record]
"""By data set, length, seed and method."""


@dataclass(frozen=True)
class Grid:
    """What is run: of each data set, by name, a recipe and its settings; the method's settings; seeds by length."""

    data: dict[str, tuple[str, tuple[str, ...]]]
    name: str
    settings: tuple[str, ...]
    seeds: dict[int, tuple[int, ...]]

    @classmethod
    def load(cls, path: Path) -> "Grid":
        """Reads a grid's YAML."""
        values = yaml.safe_load(path.read_text())
        (name, settings), *_ = values["method"].items()
        return cls(
            {data: (each["recipe"], tuple(each.get("settings", ()))) for data, each in values["data"].items()},
            name,
            tuple(settings),
            {int(length): tuple(seeds) for length, seeds in values["seeds"].items()},
        )

    def run(self, data: str, name: str, length: int, seed: int, runs: Path) -> Trial:
        """One run of `length` steps."""
        recipe, settings = self.data[data]
        epoch = steps_per_epoch(Recipe.load(recipe, settings))
        assert epoch is not None, f"{recipe}: build its shards first"
        method = self.settings if name == self.name else ("growth.schedule=original",)
        lengths = (f"train.epochs={length / epoch!r}", f"optimizer.warmup_epochs={length / epoch / 20!r}")
        once = ("evaluate.every=100000", "search.times=modelled")
        return Trial(Case(f"{data}: {name}", name, recipe, (*settings, *method, *lengths, *once), False), seed, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, nargs="?", default=Path("benchmarks/frontier.yaml"))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--records", type=Path, default=Path("docs/results/frontier/runs.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--only-table", action="store_true", help="write the table of the finished runs, and run nothing"
    )
    options = parser.parse_args()
    grid, records = Grid.load(options.grid), Records(options.records)
    cells = [(data, length, seed) for length, seeds in grid.seeds.items() for seed in seeds for data in grid.data]
    cells.sort(key=lambda cell: (cell[2], cell[1]))
    methods = (grid.name, ORIGINAL)
    first = [grid.run(data, name, length, seed, options.runs) for data, length, seed in cells for name in methods]
    if not options.only_table:
        for record in attempt(first, records, options.jobs):
            print(f"{record.name}, {record.steps} steps, seed {record.seed}: {record.best:.2f} at {record.cost:.0f}")
    found: Found = {}
    second = []
    for cell in cells:
        for name in methods:
            if (run := grid.run(cell[0], name, cell[1], cell[2], options.runs)) in records:
                found[*cell, name] = records[run]
        if (*cell, grid.name) in found:
            cost = max(1, round(found[*cell, grid.name].cost))
            second.append((cell, grid.run(cell[0], ORIGINAL, cost, cell[2], options.runs)))
    if not options.only_table:
        for record in attempt([run for _, run in second], records, options.jobs):
            print(f"{record.name}, {record.steps} steps, seed {record.seed}: {record.best:.2f} (same cost)")
    found |= {(*cell, SAME_COST): records[run] for cell, run in second if run in records}
    text = tables(grid, found)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "frontier.md").write_text(text)
        for data in grid.data:
            draw_frontier(options.out / f"frontier_{data}.png", points(data, grid, found))


def points(data: str, grid: Grid, found: Found) -> dict[str, list[tuple[float, float]]]:
    """(cost, accuracy) of every run of a data set, by method; Original's are all that there are."""
    drawn: dict[str, list[tuple[float, float]]] = {ORIGINAL: [], grid.name: []}
    for (of, _, _, name), record in found.items():
        if of == data:
            drawn[grid.name if name == grid.name else ORIGINAL].append((record.cost, record.best))
    return drawn


# ---- tables


def tables(grid: Grid, found: Found) -> str:
    """Markdown: by length, and by accuracy."""
    columns = (
        "steps",
        "seeds",
        ORIGINAL,
        grid.name,
        "cost",
        "Δ at the same cost",
        "Δ to Original of that length",
        "doubling Original gains",
    )
    parts = []
    for data in grid.data:
        lines = [f"## {data}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for length in sorted(grid.seeds):
            seeds = [s for s in grid.seeds[length] if all((data, length, s, n) in found for n in (grid.name, ORIGINAL))]
            if not seeds:
                continue
            theirs, mine, same_cost = (
                [found[data, length, seed, name].best for seed in seeds if (data, length, seed, name) in found]
                for name in (ORIGINAL, grid.name, SAME_COST)
            )
            cost = np.mean([found[data, length, seed, grid.name].cost for seed in seeds])
            cells = (
                f"{length}",
                f"{len(seeds)}",
                f"{np.mean(theirs):.2f}",
                f"{np.mean(mine):.2f}",
                f"{cost:.0f}",
                distance(mine, same_cost),
                distance(mine, theirs),
                doubling(data, length, grid, found),
            )
            lines.append(f"| {' | '.join(cells)} |")
        parts += ["\n".join(lines), by_accuracy(data, grid, found)]
    return "\n\n".join(parts) + "\n"


def distance(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """The mean difference of paired accuracies and its interval; a dash where not all pairs are there."""
    if len(mine) != len(theirs):
        return "–"
    gaps = np.asarray(mine) - np.asarray(theirs)
    return f"{gaps.mean():+.2f} {interval(len(gaps), lambda chosen: float(gaps[chosen].mean()))}"


def doubling(data: str, length: int, grid: Grid, found: Found) -> str:
    """What Original gains by twice the length: its gain up to the next length, shared out by the logarithm."""
    longer = min((n for n in grid.seeds if n > length), default=0)
    both = [s for s in grid.seeds.get(longer, ()) if {(data, n, s, ORIGINAL) for n in (length, longer)} <= found.keys()]
    if not both:
        return "–"
    gain = np.mean([found[data, longer, s, ORIGINAL].best - found[data, length, s, ORIGINAL].best for s in both])
    return f"{gain / np.log2(longer / length):+.2f}"


def by_accuracy(data: str, grid: Grid, found: Found) -> str:
    """The cost at which both methods reach an accuracy, on the means of the seeds that have all lengths."""
    lengths = [n for n in sorted(grid.seeds) if any((data, n, s, grid.name) in found for s in grid.seeds[n])]
    needed = grid.name, ORIGINAL, SAME_COST
    each_length = [{s for s in grid.seeds[n] if all((data, n, s, name) in found for name in needed)} for n in lengths]
    seeds = sorted(set.intersection(*each_length)) if each_length else []
    if not seeds:
        return ""

    def curves(name: str) -> list[list[tuple[float, float]]]:
        names = (ORIGINAL, SAME_COST) if name == ORIGINAL else (name,)
        cells = [[found[data, n, s, each] for n in lengths for each in names] for s in seeds]
        return [[(record.cost, record.best) for record in records] for records in cells]

    mine, theirs = curves(grid.name), curves(ORIGINAL)

    def costs(chosen: Sequence[int], below: float) -> tuple[float, float, float]:
        """The accuracy, and the cost of either method at it."""
        original, ours = (mean_curve([each[i] for i in chosen]) for each in (theirs, mine))
        target = original[-1][1] - below
        return target, cost_of(target, original), cost_of(target, ours)

    def ratio(chosen: Sequence[int], below: float) -> float:
        _, original, ours = costs(chosen, below)
        return original / ours

    lines = [f"| top-1 | Original's cost | {grid.name}'s | ratio |\n|---|---|---|---|"]
    for below in TARGETS:
        target, original, ours = costs(range(len(seeds)), below)
        reached = f"{ours:.0f}" if np.isfinite(ours) else "not reached"
        fits = f"{original / ours:.2f} {interval(len(seeds), partial(ratio, below=below))}"
        lines.append(f"| {target:.2f} (the best of Original - {below:g}) | {original:.0f} | {reached} | {fits} |")
    return "\n".join(lines)


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The k-th points of some seeds' curves averaged, ascending in cost; accuracy as the best so far."""
    points = sorted(map(tuple, np.mean([sorted(curve) for curve in curves], axis=0).tolist()))
    best = np.maximum.accumulate([accuracy for _, accuracy in points])
    return [(cost, float(accuracy)) for (cost, _), accuracy in zip(points, best)]


def cost_of(target: float, curve: Sequence[tuple[float, float]]) -> float:
    """The cost at which a curve reaches an accuracy, between two points by the logarithm; infinite if it does not."""
    for (cheap, low), (dear, high) in pairwise(curve):
        if low < target <= high:
            return float(np.exp(np.interp(target, (low, high), np.log((cheap, dear)))))
    return curve[0][0] if curve[0][1] >= target else float("inf")


def interval(seeds: int, statistic: Callable[[list[int]], float]) -> str:
    """Of a statistic of the chosen seeds, by bootstrap; empty for a single one."""
    if seeds < 2:
        return ""
    drawn = np.random.default_rng(0).integers(0, seeds, (SAMPLES, seeds))
    known = {tuple(row): 0.0 for row in np.sort(drawn).tolist()}
    for row in known:
        known[row] = statistic(list(row))
    low, high = np.percentile([known[tuple(row)] for row in np.sort(drawn).tolist()], INTERVAL)
    return f"[{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    main()
