"""Ranks as processes of this machine, watched by torch's elastic agent: if one fails, all end at once."""

import atexit
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import c_int
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from launchers.exits import MISTAKE, STOPPED, exit_by
from launchers.world import Count, Demand, largest
from scaleprog.errors import Preempted, ScaleprogError
from scaleprog.preemption import SIGNALS


class RankFailed(ScaleprogError):
    """The first rank that failed, and why."""

    def __init__(self, message: str, mistake: bool) -> None:
        """`mistake`: whether only the user can put it right, so that another try would end the same."""
        super().__init__(message)
        self.mistake = mistake


def launch(
    ranks: int | Callable[[], int],
    function: Callable[..., object],
    *arguments: Any,
    restarts: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Runs `function(*arguments)` in `ranks` processes of this machine, with torch.distributed's environment set.

    Signals that ask to stop (TERM, INT, USR2) are passed on to the ranks, which end by themselves. From the first one
    on nothing is started again, however the ranks end.

    Args:
        ranks: how many, or what is asked for the number at each start.
        restarts: how many times in a row the ranks are started again after one crashed or was killed.
        progress: a value that has changed since the last start where the ranks got on; the count then begins anew.

    Raises:
        RankFailed: with the error of the rank that failed first; the others have ended by then.
        Preempted: the ranks were asked to stop, and did.
    """
    with _passing_signals_on() as asked:
        left, before = restarts, progress()
        while True:
            try:
                if asked.value:
                    raise Preempted("stopped before it started")
                return _launch_once(asked, ranks() if callable(ranks) else ranks, function, arguments)
            except Exception as error:
                if asked.value:
                    raise _stopped(signal.Signals(asked.value).name, error) from None
                if not isinstance(error, RankFailed):
                    raise
                if (now := progress()) != before:
                    left, before = restarts, now
                if error.mistake or left == 0:
                    raise
                left -= 1
                print(f"scaleprog: {error}\nscaleprog: starting again, {left} more tries", file=sys.stderr, flush=True)


def ranks_to_start(count: Count, demand: Demand) -> int:
    """The largest number in a range that this machine has room for and that can train; says why if it is not the most.

    Raises:
        ScaleprogError: there is no such number.
    """
    room, of = room_here()
    if room < count.least:
        raise ScaleprogError(
            f"--nproc {count}: {of} here: {room}; --nproc N, a number and no range, starts N ranks all the same"
        )
    wanted = min(count.most, room)
    option = "--nproc" if wanted == count.most else f"--nproc {count}, {of} here: {room}; with"
    taken = largest(option, Count(count.least, wanted), demand)
    why = [f"{of} here: {room}"] * (wanted < count.most) + [demand.obstacle(wanted)] * (taken < wanted)
    if why:
        print(f"scaleprog: {taken} of at most {count.most} ranks; {'; '.join(why)}", file=sys.stderr, flush=True)
    return taken


def room_here() -> tuple[int, str]:
    """How many ranks this machine has room for, and what of: CUDA devices, or the CPU cores that are ours."""
    if devices := torch.cuda.device_count():
        return devices, "CUDA devices"
    return len(os.sched_getaffinity(0)), "CPU cores"


def _stopped(name: str, error: Exception) -> Preempted:
    """What it means that ranks ended by `error` after a signal of this name."""
    if not isinstance(error, Preempted):
        return Preempted(f"stopped by {name}; {error}", name)
    return error if error.reason else Preempted(f"stopped by {name}", name)


def _launch_once(asked: c_int, ranks: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"scaleprog-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
        signals_to_handle="",  # else the agent kills its ranks instead of letting them finish
    )
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # RankFailed says it
    try:
        elastic_launch(config, _rank)(asked, function, arguments)
    except ChildFailedError as error:
        raise _failure(*error.get_first_failure()) from None


@contextmanager
def _passing_signals_on() -> Iterator[c_int]:
    """Inside, a signal that asks to stop goes to the ranks, and this process waits for them to end.

    Gives the first one's number, 0 until there is one, in memory that ranks which are started later see, too.
    """
    asked = multiprocessing.get_context("spawn").RawValue(c_int, 0)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.value = asked.value or number
        for rank in multiprocessing.active_children():
            if rank.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _rank(asked: c_int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """What one process does; an exception goes into the agent's error file instead of over the other ranks' output."""
    for number in SIGNALS:
        signal.signal(number, _too_early)
    if asked.value:
        os._exit(STOPPED)
    try:
        function(*arguments)
        atexit.register(_leave)
    except Exception as error:
        end = exit_by(error)
        time.sleep(end.delay)
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": end.text, "timestamp": int(time.time()), "reason": end.reason}, file)
        sys.stdout.flush()
        sys.stderr.flush()
        # no tidy end: a collective that waits for another rank would never return
        os._exit(end.code)


def _leave() -> None:
    """Ends a rank that is done, without the interpreter's tear-down: threads of gloo have been seen to abort in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _too_early(number: int, _: FrameType | None) -> None:
    """Ends a rank that is asked to stop before it trains, or after: there is nothing to save."""
    os._exit(STOPPED)


def _failure(rank: int, failure: ProcessFailure) -> RankFailed | Preempted:
    """What it means that a rank has ended so."""
    said = failure.error_file_data
    spoke = "reason" in said  # else it was ended from outside, or left at once
    if failure.exitcode == STOPPED:
        return Preempted(said["message"], said["reason"]) if spoke else Preempted("stopped by a signal")
    if failure.exitcode < 0:
        how = f"was ended by {failure.signal_name()}; all other ranks were stopped"
        return RankFailed(f"rank {rank} {how}", mistake=False)
    text = said["message"] if spoke else f"failed with exit code {failure.exitcode}"
    return RankFailed(f"rank {rank}: {text}", mistake=spoke and failure.exitcode == MISTAKE)
