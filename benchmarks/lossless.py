"""The paper's claim at micro scale: Original, Prog, AutoProg 0.5 and 0.4 over several seeds, side by side.

A fifth row is a schedule by hand: four sevenths of the epochs at 16 px x 3 layers, the rest on the complete model.

    python benchmarks/lossless.py [--seeds 0 1 2] [--jobs 2] [--runs DIR] [--out DIR] [KEY=VALUE ...]

Each run is one process with one thread; runs are interleaved (all recipes of a seed before the next seed), finished
ones are not repeated. Costs are those of the training steps and the search's scoring, three times: in wall-clock
seconds; in CPU seconds; and priced, every step at the median CPU seconds that steps of its sub-network took over all
runs, so that what neighbours on the machine do to one run or another falls out of the comparison. Accuracy is the
better of online and EMA top-1 at the end.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

from scaleprog.figures import Curve, draw_accuracy
from scaleprog.metrics import read_rows
from scaleprog.report import write_report

RECIPES = ("original", "prog", "late", "autoprog", "autoprog_04")
Key = tuple[str, int]  # recipe and seed
NAMES = dict(zip(RECIPES, ("Original", "Prog", "by hand: 4/7 small", "AutoProg 0.5 Ω", "AutoProg 0.4 Ω")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--runs", type=Path, default=Path("runs/lossless"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/lossless"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    jobs = [(recipe, seed) for seed in options.seeds for recipe in RECIPES]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: run(*job, options.runs, options.overrides), jobs))
    options.out.mkdir(parents=True, exist_ok=True)
    folders = {job: options.runs / name(*job) for job in jobs}
    results = {job: json.loads((folder / "results.json").read_text()) for job, folder in folders.items()}
    clocks = priced(folders, results)
    text = table(options.seeds, results, clocks)
    (options.out / "table.md").write_text(text)
    write_report(list(folders.values()), options.out)
    picture(options.out / "accuracy_over_priced_time.png", folders, clocks)
    print(text)


def name(recipe: str, seed: int) -> str:
    return f"{recipe}-seed{seed}"


def run(recipe: str, seed: int, runs: Path, overrides: Iterable[str]) -> None:
    """One run in a process and thread of its own; its output goes beside its run directory."""
    folder = runs / name(recipe, seed)
    if (folder / "results.json").exists():
        return
    runs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "scaleprog", "train", f"configs/fashion_mnist/{recipe}.yaml", f"seed={seed}"]
    command += [*overrides, "sharding.engine=replicated", "--run-dir", str(folder)]
    with open(folder.with_suffix(".log"), "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)


def table(seeds: list[int], results: dict[Key, dict[str, Any]], clocks: dict[Key, Callable[[int], float]]) -> str:
    """Markdown: a row per recipe (mean and sample standard deviation over seeds) and the rows of each run."""
    prices = {key: clock(results[key]["steps"]) for key, clock in clocks.items()}
    lines = [
        f"{len(seeds)} seeds, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, one thread a run, several runs at a "
        "time. Top-1 is the better of online and EMA weights at the end, in percent; Δ and speedup (Original / run - 1 "
        "as the paper counts it) are against the Original of the same seed. Priced: every step at the median CPU time "
        "of its sub-network over all runs.",
        "",
        "| | top-1 | Δ to Original | standard error of Δ | speedup, priced | by CPU | by wall-clock | CPU s | wall s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        mine = [results[recipe, seed] for seed in seeds]
        theirs = [results["original", seed] for seed in seeds]
        deltas = [m["top1_best"] - t["top1_best"] for m, t in zip(mine, theirs)]
        error = statistics.stdev(deltas) / len(deltas) ** 0.5 if len(deltas) > 1 else 0.0
        price = [prices["original", seed] / prices[recipe, seed] - 1 for seed in seeds]
        cpu = [t["train_cpu_seconds"] / m["train_cpu_seconds"] - 1 for m, t in zip(mine, theirs)]
        wall = [t["train_seconds"] / m["train_seconds"] - 1 for m, t in zip(mine, theirs)]
        lines.append(
            f"| {NAMES[recipe]} | {spread([m['top1_best'] for m in mine])} | {statistics.mean(deltas):+.2f} "
            f"| {error:.2f} | {statistics.mean(price):+.0%} | {statistics.mean(cpu):+.0%} "
            f"| {statistics.mean(wall):+.0%} "
            f"| {statistics.mean(m['train_cpu_seconds'] for m in mine):.0f} "
            f"| {statistics.mean(m['train_seconds'] for m in mine):.0f} |"
        )
    lines += [
        "",
        "| run | seed | stages | online | EMA | priced s | CPU s | wall s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, seed), result in results.items():
        sizes = [f"{s['resolution']}x{s['depth']}" for s in result["stages"]]
        stages = " → ".join(size if n == 1 else f"{n} · {size}" for size, n in repeated(sizes))
        lines.append(
            f"| {NAMES[recipe]} | {seed} | {stages} | {result['top1']:.2f} | {result['top1_ema']:.2f} "
            f"| {prices[recipe, seed]:.0f} | {result['train_cpu_seconds']:.0f} | {result['train_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def priced(folders: dict[Key, Path], results: dict[Key, dict[str, Any]]) -> dict[Key, Callable[[int], float]]:
    """For each run: seconds up to a step, every step at the median CPU time of its kind over all runs, and the scoring
    as it was measured, spread evenly over the run's searches."""
    rows = {
        key: [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row] for key, folder in folders.items()
    }
    kinds: dict[tuple, list[float]] = defaultdict(list)
    for row in chain.from_iterable(rows.values()):
        kinds[kind(row)].append(row["cpu_seconds"])
    medians = {kind: statistics.median(seconds) for kind, seconds in kinds.items()}

    def clock(key: Key) -> Callable[[int], float]:
        before = list(accumulate((medians[kind(row)] for row in rows[key]), initial=0.0))
        choices = {e["stage"]: e["step"] for e in read_rows(folders[key] / "events.jsonl") if e["event"] == "choice"}
        scoring = results[key]["search_seconds"] / max(1, len(choices))
        return lambda step: before[step] + scoring * sum(chosen <= step for chosen in choices.values())

    return {key: clock(key) for key in folders}


def kind(row: dict[str, Any]) -> tuple[str, int, int]:
    """What a step's cost depends on."""
    return row["phase"], row["resolution"], row["depth"]


def picture(path: Path, folders: dict[Key, Path], clocks: dict[Key, Callable[[int], float]]) -> None:
    """Accuracy against priced time, as the paper's Fig. 4."""
    curves = []
    for key, folder in folders.items():
        rows = read_rows(folder / "metrics.jsonl")
        points = [(clocks[key](r["step"]), max(r["top1"], r["top1_ema"])) for r in rows if "top1" in r]
        growths = {e["step"] for e in read_rows(folder / "events.jsonl") if e["event"] == "growth" and e["step"]}
        begins = tuple(clocks[key](step) for step in sorted(growths))
        curves.append(Curve(NAMES[key[0]], *zip(*points), begins, finished=True))
    draw_accuracy(path, curves)


def repeated(values: list[str]) -> list[tuple[str, int]]:
    """Each value with how often it follows itself."""
    return [(value, len(list(group))) for value, group in groupby(values)]


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
