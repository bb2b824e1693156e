"""What recording, watching for hangs, agreeing, and profiling on demand cost the host, per training step.

    python -m benchmarks.overheads [--steps 600] [--repeats 5] [--out docs/results/overheads.md]

One rank trains a small network by `scaleprog train`'s own loop, and each part is timed inside it, in CPU time of the
training thread: every call that the loop makes for the part, from its first line to its last. With one rank, nothing is
exchanged: what ranks tell each other costs the network, and docs/results/scale.md has rank 0's part in it. The median
of the calls of a kind stands for all of them, so that other programs and what is done once a stage (pictures) do not
count; then the median of the repeats. `log_every 1` writes rows and curves after every step.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from scaleprog.ranks.patience import Track
from scaleprog.ranks.stop import Watch
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import Recorder
from scaleprog.training.loop import train_rank
from scaleprog.training.profiling import Profiling
from tests.conftest import draw_patterns, short_recipe

PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "recording: rows, curves, slow ranks": ((Recorder, "step"), (Recorder, "flush")),
    "watching for hangs": ((Track, "at"),),
    "profiling on demand": ((Profiling, "before"), (Profiling, "after")),
    "agreeing on a stop": ((Watch, "agree"),),
}
LOG_EVERY = (20, 1)
STEPS_PER_EPOCH = 20
Seconds = dict[str, float]
"""Of a step, by part."""
Calls = dict[tuple[type, str], list[float]]
"""The seconds of every call, by method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/overheads.md"))
    options = parser.parse_args()
    found: dict[int, list[Seconds]] = {every: [] for every in LOG_EVERY}
    with tempfile.TemporaryDirectory() as name:
        shards = draw_patterns(Path(name) / "shards")
        for repeat in range(options.repeats):
            for every in LOG_EVERY:
                recipe = short_recipe(
                    shards,
                    train={"epochs": options.steps / STEPS_PER_EPOCH, "log_every": every},
                    growth={"schedule": "original"},
                    evaluate={"every": 100000},
                )
                found[every].append(measure(recipe, Path(name) / f"{repeat}-{every}"))
    options.out.write_text(page(found, options.steps))
    print(options.out.read_text())


def measure(recipe: Recipe, folder: Path) -> Seconds:
    """Trains, and returns the seconds of each part per step."""
    calls: Calls = defaultdict(list)
    with timed(calls):
        train_rank(recipe, folder)
    steps = len(calls[Recorder, "step"])
    return {
        part: sum(median(calls[each]) * len(calls[each]) for each in parts) / steps for part, parts in PARTS.items()
    }


@contextmanager
def timed(calls: Calls) -> Iterator[None]:
    """Adds to `calls` what each call in the block takes. No part calls another one."""
    kept = {(owner, name): getattr(owner, name) for parts in PARTS.values() for owner, name in parts}
    for each, function in kept.items():
        setattr(*each, measured(function, calls[each]))
    try:
        yield
    finally:
        for each, function in kept.items():
            setattr(*each, function)


def measured(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function, each of whose calls adds what it takes to `seconds`, without what reading the clock takes."""

    def call(*arguments: Any, **options: Any) -> Any:
        before = time.thread_time()
        began = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds.append(time.thread_time() - began - (began - before))

    return call


def page(found: dict[int, list[Seconds]], steps: int) -> str:
    """The table, in microseconds."""
    about = " ".join((__doc__ or "").split("\n\n")[2].split())
    lines = [
        "Written by `python -m benchmarks.overheads`.",
        "",
        f"{about} {steps} steps, {len(found[LOG_EVERY[0]])} repeats, on one of {os.cpu_count()} cores "
        f"({platform.machine()}).",
        "",
        "| microseconds per step | " + " | ".join(f"log_every {every}" for every in LOG_EVERY) + " |",
        "|---|" + "---:|" * len(LOG_EVERY),
    ]
    middles = {
        every: {part: 1e6 * median(each[part] for each in runs) for part in PARTS} for every, runs in found.items()
    }
    for part in PARTS:
        lines.append(f"| {part} | " + " | ".join(f"{middles[every][part]:.1f}" for every in LOG_EVERY) + " |")
    sums = " | ".join(f"{sum(middles[every].values()):.1f}" for every in LOG_EVERY)
    return "\n".join([*lines, f"| all | {sums} |"]) + "\n"


if __name__ == "__main__":
    main()
