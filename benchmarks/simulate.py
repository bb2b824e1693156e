"""What `scaleprog simulate` predicts, held against runs under faults on this machine.

    python -m benchmarks.simulate [--steps 700] [--seed 0] [--out docs/results/simulate.md]

Two ranks train a small network, whose steps are made a fifth of a second long by sleeping, so that other programs on
the machine hardly lengthen them. While ranks run, faults come at random: one rank is killed, and the launcher starts
both again; or the run is asked to stop, and the same command follows. Effective training time is the time of the steps
that count, at their median length, by the wall time from the first command to the end. The prediction's inputs are the
medians of a separate calibration run with two faults of each kind, and the rates at which faults came.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import scaleprog.training.loop
from scaleprog.errors import EXIT_CODE, Preempted
from scaleprog.launchers.local import launch
from scaleprog.planning.interval import DAY
from scaleprog.planning.simulation import Scenario, simulate
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from tests.chaos.harness import put_section
from tests.conftest import draw_patterns, short_recipe

RANKS, STEP_SECONDS, POLL_SECONDS = 2, 0.2, 0.02
STEPS_LOG = "steps.log"
Fault = tuple[float, str]
"""Seconds from the launch of the ranks, and the kind."""


@dataclass(frozen=True)
class Case:
    """Mean seconds between two faults of each kind (None: never), and steps between two saves."""

    crashes: float
    preemptions: float | None
    save_steps: int

    def draw(self, rng: random.Random) -> Fault:
        """The next fault."""
        waits = {"crash": self.crashes, "preemption": self.preemptions}
        return min((rng.expovariate(1 / mean), kind) for kind, mean in waits.items() if mean is not None)


CASES = (Case(60, None, 50), Case(60, None, 150), Case(120, 120, 50))


@dataclass(frozen=True)
class Life:
    """Moments of one start: the ranks are launched; a fault of a `kind` strikes, or None; all ranks have ended."""

    launched: float
    struck: float
    kind: str | None
    ended: float


@dataclass(frozen=True)
class Measured:
    """A run under faults: its starts, the moments (of rank 0) at which each start's steps ended, and its events."""

    lives: list[Life]
    began: float
    steps: int
    ticks: list[tuple[float, int]]
    events: list[dict[str, Any]]

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return median(after - before for (before, i), (after, j) in pairwise(self.ticks) if j == i + 1)

    @property
    def effective(self) -> float:
        """Effective training time."""
        return self.steps * self.step / (self.lives[-1].ended - self.began)

    def count(self, kind: str) -> int:
        """How many faults of a kind there were."""
        return sum(life.kind == kind for life in self.lives)

    def scenario(self, save_steps: int) -> Scenario:
        """A run as long as this one with its medians, without faults."""
        again = [(life, after) for life, after in pairwise(self.lives)]
        firsts = [min((at for at, _ in self.ticks if at > life.launched), default=life.ended) for life in self.lives]
        starts = [first - life.launched - self.step for life, first in zip(self.lives, firsts) if first < life.struck]
        saves = [event for event in self.events if event["event"] == "checkpoint"]
        pause, save = (median(event[key] for event in saves) for key in ("stall", "seconds"))
        leaving = median(life.ended - life.struck for life in self.lives if life.kind == "preemption")
        return Scenario(
            nodes=1,
            training=self.steps * self.step,
            **dict.fromkeys(("crash", "hang", "preemption", "node"), 0.0),
            crash_detection=median(after.launched - life.struck for life, after in again if life.kind == "crash"),
            hang_detection=0.0,
            node_detection=0.0,
            leaving=max(0.0, leaving - pause - save),
            queue_least=median(after.launched - life.ended for life, after in again if life.kind == "preemption"),
            queue_mean=0.0,
            start_up=median(starts),
            reading=0.0,  # a part of the start-up here
            interval=save_steps * self.step,
            pause=pause,
            save=save,
        )


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(Path(sys.argv[2]), Path(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/simulate.md"))
    options = parser.parse_args()
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = draw_patterns(folder / "shards")
        kinds = iter(("crash", "preemption") * 2)
        known = run(folder / "calibration", shards, 200, 25, lambda: next(((40.0, kind) for kind in kinds), (1e9, "")))
        print(known.scenario(25), flush=True)
        for number, case in enumerate(CASES):
            measured = run(folder / f"run-{number}", shards, options.steps, case.save_steps, partial(case.draw, rng))
            rows.append(row(case, known, measured))
            print(rows[-1], flush=True)
    put_section(options.out, "Held against runs on this machine", text(known.scenario(25), rows))


def row(case: Case, known: Measured, measured: Measured) -> str:
    """One line of the table: a run, and what was predicted of it."""
    exposed = sum(life.struck - life.launched for life in measured.lives)
    rates = {kind: measured.count(kind) / exposed * 1000 * DAY for kind in ("crash", "preemption")}
    scenario = replace(known.scenario(case.save_steps), training=measured.steps * known.step, **rates)
    predicted = simulate(scenario, 1000, 0)
    low, high = predicted.spread
    off = 100 * (predicted.mean - measured.effective)
    return (
        f"| {case.crashes} | {case.preemptions or '-'} | {scenario.interval:.0f} | {measured.count('crash')} + "
        f"{measured.count('preemption')} | {measured.effective:.1%} | {predicted.mean:.1%} | {low:.1%} to {high:.1%} "
        f"| {off:+.1f} |"
    )


def text(known: Scenario, rows: list[str]) -> str:
    """The section of the page."""
    about = " ".join((__doc__ or "").split("\n\n")[-1].split())
    return "\n".join(
        [
            "Written by `python -m benchmarks.simulate`.",
            "",
            about,
            "",
            f"{os.cpu_count()} CPU cores, which other programs used, too. Calibration, in seconds: start-up "
            f"{known.start_up:.1f}, from a rank's end to the next launch {known.crash_detection:.1f}, leaving "
            f"{known.leaving:.1f}, from there to the next launch {known.queue_least:.1f}, save {known.save:.2f}, of "
            f"which training pauses for {known.pause:.3f}.",
            "",
            "| a crash every, s | a request to stop every, s | a save every, s | faults | measured | predicted "
            "| 95 % of simulated runs | points |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )


# ---- a run


def run(folder: Path, shards: Path, steps: int, save_steps: int, next_fault: Callable[[], Fault]) -> Measured:
    """Trains under faults until the run has finished."""
    recipe = short_recipe(
        shards,
        growth={"schedule": "original"},
        train={"epochs": steps / 20, "log_every": 5},
        evaluate={"every": 1000},
        checkpoint={"every_steps": save_steps, "every_minutes": None},
    )
    file = folder.with_suffix(".yaml")
    file.write_text(recipe.dump())
    began = time.time()
    lives = list(lives_of([sys.executable, "-m", "benchmarks.simulate", "--train", str(file), str(folder)], next_fault))
    words = [line.split() for line in (folder / STEPS_LOG).read_text().splitlines()]
    ticks = [(float(at), int(step)) for at, step in words]
    return Measured(lives, began, steps, ticks, read_rows(folder / "events.jsonl"))


def lives_of(command: list[str], next_fault: Callable[[], Fault]) -> Iterator[Life]:
    """Runs a command, again and again while it asks for that, with a fault for each launch of its ranks."""
    code = EXIT_CODE
    while code == EXIT_CODE:
        process = subprocess.Popen(command)
        seen: set[int] = set()
        while ranks := wait_for_ranks(process, seen):
            seen |= set(ranks)
            launched = time.time()
            seconds, kind = next_fault()
            while (now := time.time()) < launched + seconds and all(map(lives, ranks)):
                time.sleep(POLL_SECONDS)
            struck = now >= launched + seconds
            if struck:
                with suppress(ProcessLookupError):
                    if kind == "crash":
                        os.kill(random.choice(ranks), signal.SIGKILL)
                    else:
                        process.send_signal(signal.SIGTERM)
            while any(map(lives, ranks)):
                time.sleep(POLL_SECONDS)
            yield Life(launched, now, kind if struck else None, time.time())
        code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {code}")


def wait_for_ranks(process: subprocess.Popen[bytes], seen: set[int]) -> list[int]:
    """The processes of all ranks that the command has launched since those `seen`; empty once it has ended."""
    while process.poll() is None:
        with suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks = [pid for pid in map(int, children) if pid not in seen and is_rank(pid)]
            if len(ranks) == RANKS:
                return ranks
        time.sleep(POLL_SECONDS)
    return []


def is_rank(pid: int) -> bool:
    """Whether a process is one that multiprocessing has spawned."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def lives(pid: int) -> bool:
    """Whether a process has not ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def train(recipe: Path, folder: Path) -> int:
    """What the command does. Returns its exit code."""
    try:
        launch(RANKS, train_rank, Recipe.load(recipe), folder, restarts=10**6)
    except Preempted:
        return EXIT_CODE
    return 0


def train_rank(recipe: Recipe, folder: Path) -> None:
    """A rank of it, whose steps are long and whose moments are written down."""
    original = scaleprog.training.loop.train_step

    def slow_step(run: Any, *arguments: Any) -> None:
        began = time.monotonic()
        original(run, *arguments)
        time.sleep(max(0.0, began + STEP_SECONDS - time.monotonic()))
        if run.coordinator.rank == 0:
            with open(folder / STEPS_LOG, "a") as file:
                file.write(f"{time.time()} {run.state.step}\n")

    scaleprog.training.loop.train_step = slow_step
    scaleprog.training.loop.train_rank(recipe, folder)


if __name__ == "__main__":
    main()
