"""What can happen to a run, and the ranks it happens to: those of `scaleprog train` and of Slurm jobs."""

import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scaleprog.ranks.patience
import scaleprog.ranks.stop
import scaleprog.rundir.checkpoint
import scaleprog.rundir.storage
import scaleprog.training.between_steps
import scaleprog.training.loop
from scaleprog.errors import EXIT_CODE, Preempted, ScaleprogError
from scaleprog.launchers.local import launch
from scaleprog.models.elastic import ElasticModel
from scaleprog.ranks.processes import children_of
from scaleprog.recipe import Recipe
from scaleprog.rundir.storage import committed

MOMENTS = ("warm-up", "supernet", "search", "growth", "last stage")
HANGS = ("stopped", "sleeping decoder", "raises")
WAIT_LONG = (*HANGS, "parted nodes")
"""After these, ranks wait until their patience ends."""
SIGNALS = {"TERM": signal.SIGTERM, "USR2": signal.SIGUSR2, "INT": signal.SIGINT}
KINDS = (
    *SIGNALS,
    "second signal",
    "kill one",
    "kill all",
    "kill while writing",
    "kill before the rename",
    "kill in retention",
    "flipped bit",
    "truncation",
    "full disk",
    "not a number",
    "other data",
    "dot files lost",
    "clock set back",
    *HANGS,
)  # fmt: skip
KILLS_ALL = ("kill all", "flipped bit", "truncation", "other data", "dot files lost", "clock set back")
DAY = 86400.0
IN_JOB = ("task killed", "parted nodes")
"""After these, the job starts its tasks again itself."""
SLURM_KINDS = (
    "preemption, USR2",
    "preemption, TERM",
    "scontrol requeue",
    "time limit",
    "power cut",
    "network cut",
    *IN_JOB,
)
STRUCK, GO_ON = "struck.json", "go-on"
LATER_STEPS = 0.02  # seconds longer is each step once a fault has struck: a signal must not come after the last one


@dataclass(frozen=True)
class Fault:
    """One fault."""

    kind: str
    moment: str
    rank: int
    """That it strikes, or that tells of the moment where it strikes from outside."""
    delay: float
    """Seconds after the moment began."""
    by: str = "train"
    """What starts the run: `scaleprog train`, `scaleprog submit`, or sbatch with slurm/train.sbatch."""

    def strike(self, folder: Path, step: int) -> None:
        """Does it to this process, or to all; returns only where that does not end the process."""
        (folder / STRUCK).write_text(json.dumps({**asdict(self), "step": step}))
        if self.kind in SLURM_KINDS:
            while not (folder / GO_ON).exists():
                time.sleep(0.02)
        elif self.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.kind])
        elif self.kind == "second signal":
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(2.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(2.5)  # a step so long that the second signal arrives in it
        elif self.kind == "not a number":
            _poison_next_loss()
        elif self.kind == "raises":
            raise RuntimeError("the network card is gone")
        elif self.kind in HANGS:
            workers = children_of(os.getpid()) if self.kind == "sleeping decoder" else []
            for pid in workers or [os.getpid()]:
                os.kill(pid, signal.SIGSTOP)
        elif self.kind in KILLS_ALL:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # the launcher, too; the harness is in a group of its own
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def damage(fault: Fault, folder: Path) -> None:
    """Harms a run that lies still: its newest checkpoint, or what a copy would leave out."""
    if fault.kind == "dot files lost":
        for path in sorted(folder.rglob(".*"), reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = committed(folder / "checkpoints")[-1:]
    if fault.kind not in ("flipped bit", "truncation") or not newest:
        return
    file = max(newest[0].iterdir(), key=lambda path: path.stat().st_size)
    if fault.kind == "truncation":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[random.Random(str(folder)).randrange(len(content))] ^= 16
        file.write_bytes(content)


def train_rank(recipe: Recipe, folder: Path, fault: Fault) -> None:
    """A rank of the run, with the fault in its way until it has struck."""
    arm(fault, folder, int(os.environ["RANK"]))
    scaleprog.training.loop.train_rank(recipe, folder)


def arm_task() -> None:
    """Does so in a task of a Slurm job; a hook of tests/slurm/hook."""
    arm(Fault(**json.loads(os.environ["CHAOS_FAULT"])), Path(os.environ["CHAOS_RUN"]), int(os.environ["SLURM_PROCID"]))


def arm(fault: Fault, folder: Path, rank: int) -> None:
    """Wraps what the moment is made of, if it is to strike this rank and has not yet."""
    scaleprog.ranks.stop.LOOK_SECONDS = 0.05  # the whole run takes few seconds
    if fault.kind in WAIT_LONG:
        scaleprog.ranks.patience.LONG_SECONDS = 100.0  # also the first measurement of a start may be struck
    if fault.kind == "clock set back" and (folder / STRUCK).exists():
        time.time = lambda now=time.time: now() - DAY
    if rank == fault.rank and not (folder / STRUCK).exists():
        _wrap(fault, folder)


def _wrap(fault: Fault, folder: Path) -> None:
    skip = random.Random(f"{fault}").randrange(2)  # the first or the second time that the moment comes

    def reached(run: Any) -> None:
        nonlocal skip
        if skip:
            skip -= 1
            return
        disarm()
        if fault.kind.startswith("kill ") and fault.kind not in ("kill one", "kill all"):
            _in_the_next_save(fault, folder, run.state.step)
        elif fault.kind == "full disk":
            _fill_disk(fault, folder, run)
        elif fault.delay:
            threading.Timer(fault.delay, fault.strike, (folder, run.state.step)).start()
        else:
            fault.strike(folder, run.state.step)

    original_measure, original_enter, original_step = (
        scaleprog.training.between_steps.measure, scaleprog.training.loop.enter, scaleprog.training.loop.train_step
    )  # fmt: skip

    def disarm() -> None:
        scaleprog.training.between_steps.measure, scaleprog.training.loop.enter = original_measure, original_enter
        scaleprog.training.loop.train_step = slow_step

    def slow_step(*arguments: Any) -> None:
        original_step(*arguments)
        time.sleep(LATER_STEPS)

    def measure(run: Any, phase: Any) -> None:
        if fault.moment == "search":
            reached(run)
        original_measure(run, phase)

    def enter(run: Any, phases: Any, index: int) -> None:
        original_enter(run, phases, index)
        if fault.moment == "growth" and index > 0:
            reached(run)

    def train_step(run: Any, phase: Any, *arguments: Any) -> None:
        original_step(run, phase, *arguments)
        last = phase.stop == run.plan.schedule.phases(run.state.choices)[-1].stop and not phase.searched
        here = {
            "warm-up": run.state.step in (3, 6),
            "supernet": phase.searched and phase.start > 0 and phase.start + 2 <= run.state.step < phase.stop,
            "last stage": last and run.state.step >= phase.start + 3 and run.state.step % 7 == 3,
        }  # fmt: skip
        if here.get(fault.moment):
            reached(run)

    scaleprog.training.between_steps.measure, scaleprog.training.loop.enter, scaleprog.training.loop.train_step = (
        measure,
        enter,
        train_step,
    )


def _poison_next_loss() -> None:
    loss = ElasticModel.loss

    def poisoned(*arguments: Any) -> Any:
        ElasticModel.loss = loss  # type: ignore[method-assign]
        return loss(*arguments) * math.nan

    ElasticModel.loss = poisoned  # type: ignore[assignment,method-assign]


def _in_the_next_save(fault: Fault, folder: Path, step: int) -> None:
    """Kills this rank at a point of the next save."""
    storage, checkpoint = scaleprog.rundir.storage, scaleprog.rundir.checkpoint

    def killing(_: Any) -> Callable[..., Any]:
        return lambda *_, **__: fault.strike(folder, step)

    if fault.kind == "kill while writing":
        checkpoint.write_tensors = _half_written(fault, folder, step)
    elif fault.kind == "kill before the rename":
        storage.os = _With(os, rename=killing(None))  # type: ignore[assignment]
    else:
        storage.shutil = _With(storage.shutil, rmtree=_rmtree_of_old(fault, folder, step))  # type: ignore[assignment]


def _half_written(fault: Fault, folder: Path, step: int) -> Callable[..., Any]:
    write = scaleprog.rundir.checkpoint.write_tensors

    def write_half(temporary: Path, *arguments: Any) -> None:
        for name, (size, _) in write(temporary, *arguments).items():
            os.truncate(temporary / name, size // 2)
        fault.strike(folder, step)

    return write_half


def _rmtree_of_old(fault: Fault, folder: Path, step: int) -> Callable[..., None]:
    remove = scaleprog.rundir.storage.shutil.rmtree

    def rmtree(path: Path, *arguments: Any, **keywords: Any) -> None:
        if Path(path).name.endswith(".old") and Path(path).exists():
            next(Path(path).iterdir()).unlink()  # half deleted
            fault.strike(folder, step)
        remove(path, *arguments, **keywords)

    return rmtree


def _fill_disk(fault: Fault, folder: Path, run: Any) -> None:
    """Fills the run's file system (the harness mounts a small one) until a save or more have failed."""
    (folder / STRUCK).write_text(json.dumps({**asdict(fault), "step": run.state.step}))
    ballast, failed, tell = folder / "ballast", threading.Event(), run.recorder.event
    for path in (ballast, *folder.glob("*.jsonl")):  # of these, what is left of their last blocks, too
        with open(path, "ab", buffering=0) as file, suppress(OSError):
            while file.write(b"\n" * 2**16):
                pass
    run.recorder.curve(run.state.step, "ballast", {str(number): 0.0 for number in range(1000)})  # more than a block

    def event(kind: str, **fields: Any) -> None:  # what is told cannot be written down now
        tell(kind, **fields)
        if kind == "checkpoint_failed":
            failed.set()

    def make_room() -> None:
        failed.wait()
        time.sleep(fault.delay)
        ballast.unlink()

    run.recorder.event = event
    threading.Thread(target=make_room, daemon=True).start()


class _With:
    """A module with some functions replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self._module = module
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def main() -> None:
    """python -m tests.chaos.faults RECIPE FOLDER RANKS FAULT: one command of the user's."""
    recipe, folder, ranks = Recipe.load(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    fault = Fault(**json.loads(sys.argv[4]))
    try:
        launch(ranks, train_rank, recipe, folder, fault, restarts=3, folder=folder)
    except ScaleprogError as error:
        print(f"scaleprog: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE if isinstance(error, Preempted) else 2)


if __name__ == "__main__":
    main()
