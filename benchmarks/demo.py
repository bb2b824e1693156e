"""The demo over seeds: does its promise hold every time?

    python -m benchmarks.demo [--seeds 0 1 2 ...] [--clones 3] [--runs runs/demo_seeds] [--out docs/results/demo.md]

The first seeds by `make demo` in fresh clones of this repository, with everything that it installs; the others by its
two training commands. All are new processes of two FSDP2 ranks each, one after the other on an idle machine. Seconds by
the wall are those of the whole command, from its start to the end of its process. What is finished is not run again.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

RECIPES = ("original", "autoprog")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--clones", type=int, default=3, help="number of seeds to run in fresh clones")
    parser.add_argument("--runs", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    demos = {seed: make(seed, options.runs) for seed in options.seeds[: options.clones]}
    rows = [[train(recipe, seed, options.runs) for recipe in RECIPES] for seed in options.seeds]
    text = table(options.seeds, rows) + whole(demos)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def make(seed: int, runs: Path) -> dict[str, float]:
    """Seconds of `make demo` in a fresh clone: `install`, and `demo` for all that follows. Its two runs are kept."""
    done = runs / f"make-{seed}.json"
    if not done.exists():
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "clone", "--quiet", ".", folder], check=True)
            steps = stamped(["make", "demo", f"SEED={seed}"], Path(folder))
            for (command, began), (_, ended) in pairwise(steps):
                for recipe in RECIPES:
                    if f" train configs/digits/{recipe}.yaml" in command:
                        shutil.copytree(Path(folder) / "runs/demo" / recipe, runs / f"{recipe}-{seed}")
                        finish(runs / f"{recipe}-{seed}", ended - began)
            shutil.copytree(Path(folder) / "runs/demo/report", runs / f"report-{seed}")
        began, installed = (next(at for line, at in steps if word in line) for word in ("", " shards digits "))
        done.write_text(json.dumps({"install": installed - began, "demo": steps[-1][1] - installed}))
    return json.loads(done.read_text())


def stamped(command: Sequence[str], folder: Path) -> list[tuple[str, float]]:
    """Runs a command; the lines that it prints, between an empty one at its start and at its end, and when."""
    lines = [("", time.perf_counter())]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if ".venv/bin/" in line:
                lines.append((line, time.perf_counter()))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return [*lines, ("", time.perf_counter())]


def train(recipe: str, seed: int, runs: Path) -> dict[str, float]:
    """`top1` in percent, `train` and `wall` in seconds of one run."""
    folder = runs / f"{recipe}-{seed}"
    done = folder / "demo.json"
    if not done.exists():
        began = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "scaleprog",
            "train",
            f"configs/digits/{recipe}.yaml",
            f"seed={seed}",
            "--nproc",
            "2",
            "--run-dir",
            str(folder),
        ]
        subprocess.run(command, check=True)
        finish(folder, time.perf_counter() - began)
    return json.loads(done.read_text())


def finish(folder: Path, wall: float) -> None:
    """Notes what a run came to."""
    results = json.loads((folder / "results.json").read_text())
    row = {"top1": results["top1_best"], "train": results["train_seconds"], "wall": wall}
    (folder / "demo.json").write_text(json.dumps(row))


def table(seeds: Sequence[int], rows: Sequence[Sequence[dict[str, float]]]) -> str:
    """Markdown: a row per seed, and what is promised of all of them."""
    lines = [
        f"# The demo over {len(seeds)} seeds\n\n{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} "
        "CPU cores; `python -m benchmarks.demo`. scikit-learn's digits, 897 training and 900 test images, 2 FSDP2 "
        "ranks. Top-1 in percent, the better of online and EMA weights; seconds of training steps with the search, and "
        "of wall time of the whole command.",
        "",
        "| seed | Original | AutoProg | Δ | Original, s | AutoProg, s | speedup | Original, wall s | AutoProg, wall s "
        "| wall speedup |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    deltas, speedups = [], []
    for seed, (theirs, mine) in zip(seeds, rows):
        delta = mine["top1"] - theirs["top1"]
        training, wall = (theirs[key] / mine[key] - 1 for key in ("train", "wall"))
        deltas.append(delta)
        speedups.append((training, wall))
        lines.append(
            f"| {seed} | {theirs['top1']:.2f} | {mine['top1']:.2f} | {delta:+.2f} | {theirs['train']:.1f} "
            f"| {mine['train']:.1f} | {training:+.0%} | {theirs['wall']:.1f} | {mine['wall']:.1f} | {wall:+.0%} |"
        )
    training, wall = (statistics.median(column) for column in zip(*speedups))
    fast = sum(min(pair) >= 0.6 for pair in speedups)
    lines += [
        "",
        f"Δ: mean {statistics.mean(deltas):+.2f}, worst {min(deltas):+.2f} points. Speedup: median {training:+.0%} by "
        f"training time and {wall:+.0%} by wall time; +60 % by both in {fast} of {len(seeds)} seeds.",
    ]
    return "\n".join(lines) + "\n"


def whole(demos: dict[int, dict[str, float]]) -> str:
    """Markdown: seconds of `make demo` by seed."""
    rows = [f"| {seed} | {took['install']:.0f} | {took['demo']:.0f} |" for seed, took in demos.items()]
    head = [
        "",
        "`make demo` on fresh clones, in seconds:",
        "",
        "| seed | installing | everything else |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n" if rows else ""


if __name__ == "__main__":
    main()
