"""Runs in which one of two ranks hangs once, each time in another way.

    python -m tests.distributed.hanging RECIPE FOLDER KIND

trains one of them as `scaleprog train --nproc 2` would.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import scaleprog.rundir.checkpoint
import scaleprog.training.loop
from scaleprog.data.reader import TrainReader
from scaleprog.launchers.local import launch
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.recipe import Recipe
from scaleprog.training.process import Run

STEP = 12  # at which it strikes
STRUCK, BLOCKED = "struck", "blocked"
Strike = Callable[[], object]


def train(recipe: Recipe, folder: Path, kind: str, restarts: int = 1) -> None:
    """Trains on two ranks to the end; rank 1 hangs once."""
    folder.mkdir(parents=True, exist_ok=True)
    launch(2, train_rank, recipe, folder, kind, restarts=restarts, folder=folder)


def train_rank(recipe: Recipe, folder: Path, kind: str) -> None:
    """A rank of the run."""
    if kind == "partition":
        link("up")
    if os.environ["RANK"] == "1" and not (folder / STRUCK).exists():
        KINDS[kind](folder)
    scaleprog.training.loop.train_rank(recipe, folder)


def struck(folder: Path) -> None:
    (folder / STRUCK).touch()


def block(folder: Path) -> NoReturn:
    """Opens a file that does not answer: a FIFO that nobody else opens."""
    struck(folder)
    os.mkfifo(folder / BLOCKED)
    with open(folder / BLOCKED, "rb"):
        raise AssertionError("somebody has opened it")


def link(state: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", state], check=True)


def in_step(strike: Callable[[Path], object], folder: Path) -> None:
    """Strikes in the middle of a training step."""
    original = scaleprog.training.loop.forward_and_backward

    def forward_and_backward(run: Run, *arguments: Any) -> Any:
        if run.state.step + 1 == STEP:
            struck(folder)
            strike(folder)
        return original(run, *arguments)

    scaleprog.training.loop.forward_and_backward = forward_and_backward


def stop(folder: Path) -> None:
    in_step(lambda _: os.kill(os.getpid(), signal.SIGSTOP), folder)


def sleep(folder: Path) -> None:
    in_step(lambda _: time.sleep(600), folder)


def part(folder: Path) -> None:
    in_step(lambda _: link("down"), folder)


def decode(folder: Path) -> None:
    """A worker waits for its shard for ever."""
    original = TrainReader._fill

    def fill(self: TrainReader, lanes: Any, request: Any, batch: Any) -> None:
        if request.step + 1 == STEP:
            block(folder)
        original(self, lanes, request, batch)

    TrainReader._fill = fill  # type: ignore[method-assign]


def save(folder: Path) -> None:
    """The file system takes no checkpoint."""
    original = scaleprog.rundir.checkpoint.write_tensors

    def write(temporary: Path, *arguments: Any) -> Any:
        if int(temporary.name.split("-")[1].split(".")[0]) >= STEP:
            block(folder)
        return original(temporary, *arguments)

    scaleprog.rundir.checkpoint.write_tensors = write


def fail(folder: Path) -> None:
    """A collective raises on this rank; the other one waits in it."""
    original = Coordinator.mean

    def mean(self: Coordinator, values: list[float]) -> list[float]:
        if not (folder / STRUCK).exists() and (folder / "checkpoints").exists():
            struck(folder)
            raise RuntimeError("the network card is gone")
        return original(self, values)

    Coordinator.mean = mean  # type: ignore[method-assign]


KINDS: dict[str, Callable[[Path], object]] = {
    "stopped": stop, "asleep": sleep, "partition": part, "decoder": decode, "save": save, "raises": fail,
}  # fmt: skip

if __name__ == "__main__":
    train(Recipe.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
