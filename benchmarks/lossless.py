"""The paper's claim at micro scale: Original, Prog, AutoProg 0.5 and 0.4 over several seeds, side by side.

A fifth row is a schedule by hand: four sevenths of the epochs at 16 px x 3 layers, the rest on the complete model.

    python benchmarks/lossless.py [--seeds 0 1 2] [--jobs 2] [--runs DIR] [--out DIR] [KEY=VALUE ...]

Each run is one process with one thread; runs are interleaved (all recipes of a seed before the next seed), finished
ones are not repeated. Costs are CPU seconds of the training steps and the search's scoring, so that neighbours on the
machine matter little; wall-clock seconds stand beside them. Accuracy is the better of online and EMA top-1 at the end.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from scaleprog.report import write_report

RECIPES = ("original", "prog", "late", "autoprog", "autoprog_04")
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
    text = table(options.runs, options.seeds)
    (options.out / "table.md").write_text(text)
    write_report([options.runs / name(*job) for job in jobs], options.out)
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


def table(runs: Path, seeds: list[int]) -> str:
    """Markdown: a row per recipe (mean and sample standard deviation over seeds) and the rows of each seed."""
    results = {
        (recipe, seed): json.loads((runs / name(recipe, seed) / "results.json").read_text())
        for recipe in RECIPES
        for seed in seeds
    }
    lines = [
        f"{len(seeds)} seeds, {datetime.now(UTC):%Y-%m-%d}, {platform.processor() or platform.machine()}, "
        "one thread a run. Top-1 is the better of online and EMA weights at the end; speedup as the paper counts it "
        "(Original / run - 1) in CPU seconds and in wall-clock seconds of training steps and scoring; "
        "each run against the Original of its own seed.",
        "",
        "| | top-1 % | Δ to Original | standard error of Δ | CPU s | speedup (CPU) | speedup (wall) | wall s in all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        mine = [results[recipe, seed] for seed in seeds]
        theirs = [results["original", seed] for seed in seeds]
        deltas = [m["top1_best"] - t["top1_best"] for m, t in zip(mine, theirs)]
        error = statistics.stdev(deltas) / len(deltas) ** 0.5 if len(deltas) > 1 else 0.0
        cpu = [t["train_cpu_seconds"] / m["train_cpu_seconds"] - 1 for m, t in zip(mine, theirs)]
        wall = [t["train_seconds"] / m["train_seconds"] - 1 for m, t in zip(mine, theirs)]
        lines.append(
            f"| {NAMES[recipe]} | {spread([m['top1_best'] for m in mine])} | {statistics.mean(deltas):+.2f} "
            f"| {error:.2f} | {statistics.mean(m['train_cpu_seconds'] for m in mine):.0f} "
            f"| {statistics.mean(cpu):+.0%} | {statistics.mean(wall):+.0%} "
            f"| {statistics.mean(m['wall_seconds'] for m in mine):.0f} |"
        )
    lines += [
        "",
        "| run | seed | stages | top-1 online | top-1 EMA | CPU s | wall s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (recipe, seed), result in results.items():
        stages = " → ".join(f"{s['resolution']}x{s['depth']}" for s in result["stages"])
        lines.append(
            f"| {NAMES[recipe]} | {seed} | {stages} | {result['top1']:.2f} | {result['top1_ema']:.2f} "
            f"| {result['train_cpu_seconds']:.0f} | {result['train_seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
