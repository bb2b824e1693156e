"""Trains several runs on this machine, each in a process of its own, one after the other or some at the same time."""

import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from ctypes import c_int
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from scaleprog.errors import ScaleprogError
from scaleprog.files.display import first_line, say
from scaleprog.launchers import local
from scaleprog.launchers.exits import CRASHED, FINISHED, STOPPED, exit_by
from scaleprog.launchers.local import (
    begin_process,
    interrupts_held,
    leave,
    passing_signals_on,
    signal_name,
)
from scaleprog.launchers.status import status
from scaleprog.launchers.world import Count

TELL_SECONDS = 15.0  # between two lines of progress
LOG = "log.txt"
"""What a run prints while others train at the same time, in its run directory."""
Slot = Mapping[str, str]
"""The environment variables of the run that trains in one of several places."""


@dataclass(frozen=True)
class Task:
    """A run that a process trains by calling `train`, which is pickled; the name of its directory is its name."""

    run: Path
    train: Callable[[], object]


@dataclass(frozen=True)
class Ended:
    """How a run's process ended: its exit code and, unless that is 0, why."""

    code: int
    why: str = ""


@dataclass(frozen=True)
class _Running:
    task: Task
    slot: Slot
    process: BaseProcess
    told: Connection


def slots(jobs: int, ranks: Count) -> list[Slot]:
    """Divides the CUDA devices of this machine, if any, among `jobs` runs at a time.

    Raises:
        ScaleprogError: there are too few devices, or the number of a run's ranks is not fixed.
    """
    if jobs == 1:
        return [{}]
    if not ranks.fixed:
        raise ScaleprogError(f"--jobs {jobs} --nproc {ranks}: for several runs at a time, give --nproc one number")
    each, devices = ranks.most, torch.cuda.device_count()
    if not devices:
        return [{}] * jobs
    if devices < jobs * each:
        raise ScaleprogError(
            f"--jobs {jobs} --nproc {ranks}: each of {jobs * each} ranks needs a CUDA device of its own; CUDA devices "
            f"available: {devices}; lower --jobs"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(devices)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[i * each : (i + 1) * each])} for i in range(jobs)]


def train_all(tasks: Sequence[Task], places: Sequence[Slot]) -> dict[Path, Ended]:
    """Trains runs, as many at a time as there are `places`, and prints a line when one starts or ends.

    Passes signals that ask to stop on to the runs. After such a signal, or if a run was stopped, no further run starts.

    Returns:
        How each run that has started ended.
    """
    waiting, free = deque(tasks), list(places)
    running: list[_Running] = []
    ended: dict[Path, Ended] = {}
    shown = time.monotonic()
    with passing_signals_on() as asked:
        while True:
            stopped = asked.value or any(end.code == STOPPED for end in ended.values())
            while waiting and free and not stopped:
                say(f"{waiting[0].run.name}: starts, {len(tasks) - len(waiting) + 1} of {len(tasks)}")
                running.append(_start(asked, waiting.popleft(), free.pop(0), logged=len(places) > 1))
            if not running:
                return ended
            ready = connection.wait([each.process.sentinel for each in running], TELL_SECONDS)
            for each in [each for each in running if each.process.sentinel in ready]:
                running.remove(each)
                free.append(each.slot)
                end = ended[each.task.run] = _end_of(each, bool(asked.value))
                say(f"{each.task.run.name}: {first_line(end.why) or 'finished'}")
            if len(places) > 1 and time.monotonic() - shown > TELL_SECONDS:
                shown = time.monotonic()
                for each in running:
                    say(f"{each.task.run.name}: {_progress(each.task.run)}")


def _start(asked: c_int, task: Task, slot: Slot, logged: bool) -> _Running:
    context: Any = multiprocessing.get_context(local.START_METHOD)
    told, telling = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(asked, task, slot, telling, logged))
    with interrupts_held():
        process.start()
    telling.close()
    return _Running(task, slot, process, told)


def _end_of(run: _Running, asked: bool) -> Ended:
    """How a process has ended. `asked`: whether it was asked to stop, after which every failure counts as a stop."""
    run.process.join()
    code, why = run.process.exitcode or FINISHED, ""
    with run.told, suppress(EOFError):  # it had nothing to tell
        if run.told.poll():  # if it was killed, processes that it has started may keep the pipe open
            code, why = run.told.recv()
    if code != FINISHED and asked:
        return Ended(STOPPED, why or "stopped before training began")
    if code < 0:
        return Ended(CRASHED, f"was killed by {signal_name(-code)}")
    return Ended(code, why or (f"exit code {code}" if code else ""))


def _train(asked: c_int, task: Task, slot: Slot, telling: Connection, logged: bool) -> None:
    """Trains one run. Tells the launcher why it fails."""
    begin_process(asked)
    os.environ |= slot
    try:
        if logged:
            task.run.mkdir(parents=True, exist_ok=True)
            log = os.open(task.run / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW)
            os.dup2(log, sys.stdout.fileno())
            os.dup2(log, sys.stderr.fileno())
        task.train()
    except Exception as error:
        end = exit_by(error)
        telling.send((end.code, end.cause))
        if logged or end.code == CRASHED:  # with the traceback of a bug; otherwise the launcher tells the cause
            say(end.text)
        leave(end.code)
    leave()


def _progress(run: Path) -> str:
    try:
        now = status(run)
    except ScaleprogError:  # it has not begun
        return "no step yet"
    loss = "" if now.loss is None else f", loss {now.loss:.3f}"
    rate = "" if now.images_per_second is None else f", {now.images_per_second:.0f} images/s"
    return f"step {now.step}{'' if now.steps is None else f' of {now.steps}'}{loss}{rate}"
