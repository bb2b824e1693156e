"""What `scaleprog simulate` predicts, held against runs under faults on this machine.

    python -m benchmarks.simulate [--steps 700] [--seed 0] [--out docs/results/simulate.md]

Two ranks train a small network, whose steps are made a fifth of a second long by sleeping, so that other programs on
the machine hardly lengthen them. While ranks run, faults come at random: one rank is killed, and the launcher starts
both again; or the run is asked to stop, and is launched again at once. Effective training time is the time of the steps
that count, at their median length, by the wall time from the first launch of ranks to the end. The prediction's inputs
are the medians of a separate calibration run with two faults of each kind, and the rates at which faults came.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import multiprocessing
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
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import scaleprog.training.loop
from scaleprog.errors import Preempted
from scaleprog.launchers import local
from scaleprog.planning.interval import DAY
from scaleprog.planning.simulation import Scenario, simulate
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from tests.chaos.harness import put_section
from tests.conftest import draw_patterns, short_recipe

RANKS, STEP_SECONDS, POLL_SECONDS = 2, 0.2, 0.02
STEPS_LOG, RANKS_LOG = "steps.log", "ranks.log"
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
        return self.steps * self.step / (self.lives[-1].ended - self.lives[0].launched)

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
        train(Path(sys.argv[2]), Path(sys.argv[3]))
        return
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
        known = run(folder / "calibration", shards, 200, 25, lambda: next(((20.0, kind) for kind in kinds), (1e9, "")))
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
    command = [sys.executable, "-m", "benchmarks.simulate", "--train", str(file), str(folder)]
    lives = list(lives_of(command, folder, next_fault))
    words = [line.split() for line in (folder / STEPS_LOG).read_text().splitlines()]
    ticks = [(float(at), int(step)) for at, step in words]
    return Measured(lives, steps, ticks, read_rows(folder / "events.jsonl"))


def lives_of(command: list[str], folder: Path, next_fault: Callable[[], Fault]) -> Iterator[Life]:
    """Runs a command, with a fault for each launch of its ranks."""
    process = subprocess.Popen(command)
    for start in count(1):
        if not (ranks := wait_for_ranks(process, folder, start)):
            break
        launched = time.time()
        seconds, kind = next_fault()
        while (now := time.time()) < launched + seconds and all(map(is_alive, ranks)):
            time.sleep(POLL_SECONDS)
        struck = now >= launched + seconds
        if struck and kind == "crash":
            os.kill(random.choice(ranks), signal.SIGKILL)
        elif struck:
            process.send_signal(signal.SIGTERM)
        while any(map(is_alive, ranks)):
            time.sleep(POLL_SECONDS)
        yield Life(launched, now, kind if struck else None, time.time())
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")


def wait_for_ranks(process: subprocess.Popen[bytes], folder: Path, start: int) -> list[int]:
    """The processes of the ranks of a start, once all have begun; empty if the command has ended before."""
    while process.poll() is None:
        with suppress(FileNotFoundError):
            begun = list(map(int, (folder / RANKS_LOG).read_text().split()))
            if len(begun) == start * RANKS:
                return begun[-RANKS:]
        time.sleep(POLL_SECONDS)
    return []


def is_alive(pid: int) -> bool:
    """Whether a process has not ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def train(recipe: Path, folder: Path) -> None:
    """What the command does: trains, and again after it was asked to stop. Ranks are forked: no import delays them."""
    local.START_METHOD = "forkserver"
    multiprocessing.set_forkserver_preload(["scaleprog.training.loop"])
    folder.mkdir()
    while True:
        with suppress(Preempted):
            local.launch(RANKS, train_rank, Recipe.load(recipe), folder, restarts=10**6)
            return


def train_rank(recipe: Recipe, folder: Path) -> None:
    """A rank of it, whose steps are long and whose moments are written down."""
    original = scaleprog.training.loop.train_step

    def slow_step(run: Any, *arguments: Any) -> None:
        began = time.monotonic()
        original(run, *arguments)
        time.sleep(max(0.0, began + STEP_SECONDS - time.monotonic()))
        if run.coordinator.rank == 0:
            append(folder / STEPS_LOG, f"{time.time()} {run.state.step}")

    append(folder / RANKS_LOG, str(os.getpid()))
    scaleprog.training.loop.train_step = slow_step
    scaleprog.training.loop.train_rank(recipe, folder)


def append(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    main()
