"""Every recipe for ImageNet at full model size on two FSDP2 and two ZeRO-3 ranks, a few steps in every stage.

    python -m benchmarks.imagenet_recipes [NAME ...] [--runs DIR] [--out docs/results/imagenet_recipes.md]

NAME: a recipe of configs/imagenet without `.yaml`; default: all. Lengths, batch, lanes, and `search.subset` are short
(`tests.distributed.imagenet_runs.shortened`), all else is the recipe's. A run that has finished is not repeated, on any
machine: its row is in imagenet_recipes.jsonl beside the table, which has the rows of all runs there. Remove rows to
run them again.
"""

import argparse
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from scaleprog.rundir.recorder import read_rows
from tests.conftest import CONFIGS
from tests.distributed.imagenet_runs import ENGINES, Outcome, draw_shards, run_short

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs/imagenet_recipes"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/imagenet_recipes.md"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = options.names or sorted(path.stem for path in (CONFIGS / "imagenet").glob("*.yaml"))
    shards, outcomes = options.runs / "shards", options.out.with_suffix(".jsonl")
    if not shards.exists():
        shutil.rmtree(options.runs / "tree", ignore_errors=True)
        draw_shards(shards, options.runs / "tree")
    for name in names:
        for engine in ENGINES:
            found = read(outcomes)
            if (name, engine) not in found:
                folder = options.runs / f"{name} {engine}".replace(" ", "_")
                shutil.rmtree(folder, ignore_errors=True)
                outcome = run_short(name, engine, shards, folder)
                shutil.rmtree(folder)
                with outcomes.open("a") as lines:
                    lines.write(json.dumps({"name": name, "engine": engine, "outcome": asdict(outcome)}) + "\n")
            options.out.write_text(table(read(outcomes)))
    print(options.out.read_text())


def read(path: Path) -> dict[tuple[str, str], Outcome]:
    """The outcomes so far, by recipe and engine."""
    rows = read_rows(path) if path.exists() else []
    return {(row["name"], row["engine"]): Outcome(**row["outcome"]) for row in rows}


def table(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """The page."""
    lines = [
        "Written by `python -m benchmarks.imagenet_recipes`.",
        "",
        f"{len(outcomes)} of 52 runs: two ranks, full model size, 3 steps an epoch. Steps: of each phase, in order. "
        "Peak: the most bytes that tensors took on rank 0 in a step or a growth, counted by torch's profiler, without "
        "the copies on the host that checkpoints are written from; planned: by `scaleprog plan --world 2`.",
        "",
        "| recipe | engine | steps by stage and phase | finite losses | peak, MiB | planned, MiB | peak / planned |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, engine), outcome in sorted(outcomes.items()):
        steps = ", ".join(f"{phase}: {count}" for phase, count in outcome.steps.items())
        lines.append(
            f"| {name} | {engine} | {steps} | {'yes' if outcome.finite else 'no'} | {outcome.peak / MIB:.0f} "
            f"| {outcome.planned / MIB:.0f} | {outcome.peak / outcome.planned:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
