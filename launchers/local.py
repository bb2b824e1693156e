"""Ranks as processes of this machine: if one fails, all end at once.

They meet in memory that has no name and belongs to this process, and tell it there why they fail. torch's elastic agent
would listen on every interface, and unpickle what anybody writes to it.
"""

import atexit
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_int
from dataclasses import replace
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

import torch

from launchers.exits import MISTAKE, STOPPED, exit_by
from launchers.world import Count, Demand, largest
from scaleprog.display import as_text
from scaleprog.errors import Preempted, ScaleprogError
from scaleprog.preemption import SIGNALS
from scaleprog.sharding.rendezvous import Place

GRACE_SECONDS = 30.0  # from the TERM of the ranks that are left after a failure to the KILL
PR_SET_PDEATHSIG = 1


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
    """Runs `function(*arguments)` in `ranks` processes of this machine, which `process_group()` joins.

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
                told = as_text(error, lines=True)
                print(f"scaleprog: {told}\nscaleprog: starting again, {left} more tries", file=sys.stderr, flush=True)


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
    """One start; returns when all ranks have ended well."""
    spawn = multiprocessing.get_context("spawn")
    with _memory() as (_, store), _memory() as (told, words):
        processes: list[SpawnProcess] = []
        try:
            for rank in range(ranks):
                place = Place(rank, ranks, rank, ranks, store)
                process = spawn.Process(target=_rank, args=(asked, place, words, function, arguments))
                try:
                    process.start()
                except OSError as error:
                    raise RankFailed(f"rank {rank}: cannot be started: {error}", mistake=False) from error
                processes.append(process)
            _watch(processes, told)
        finally:
            _end(processes)


@contextmanager
def _memory() -> Iterator[tuple[int, str]]:
    """A file in memory: its descriptor, and the path by which this user's processes, and no others, can open it."""
    descriptor = os.memfd_create("scaleprog")
    try:
        yield descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _watch(processes: Sequence[SpawnProcess], told: int) -> None:
    """Returns when all ranks have ended well; raises RankFailed or Preempted as soon as one has not."""
    running = dict(enumerate(processes))
    while running:
        ready = connection.wait([process.sentinel for process in running.values()])
        for rank in [rank for rank, process in running.items() if process.sentinel in ready]:
            process = running.pop(rank)
            process.join()
            if process.exitcode:
                raise _failure(rank, process.exitcode, os.pread(told, os.fstat(told).st_size, 0))


def _end(processes: Sequence[SpawnProcess]) -> None:
    """Ends the ranks that still run: TERM, and KILL for those that do not heed it."""
    for process in processes:
        process.terminate()
    give_up = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, give_up - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()


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


def _rank(asked: c_int, place: Place, words: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """What one process does. What it fails by goes into the launcher's memory, not over the other ranks' output."""
    for number in SIGNALS:
        signal.signal(number, _too_early)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)  # without its launcher it leaves, after a checkpoint
    if asked.value:
        os._exit(STOPPED)
    telling, store = os.open(words, os.O_WRONLY | os.O_APPEND), os.open(place.store, os.O_RDWR)
    try:
        os.environ |= replace(place, store=f"file:/proc/self/fd/{store}").variables()  # the launcher may be killed
        function(*arguments)
        atexit.register(_leave)
    except Exception as error:
        end = exit_by(error)
        time.sleep(end.delay)
        with suppress(OSError):
            row = {"rank": place.rank, "code": end.code, "text": end.text, "reason": end.reason}
            os.write(telling, f"{json.dumps(row)}\n".encode())
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


def _failure(rank: int, code: int, told: bytes) -> RankFailed | Preempted:
    """What it means that a rank was the first to leave, with `code`.

    `told`: a line of every rank that has said why it fails, in that order. The first of them is the first to fail, even
    if another was faster to leave.
    """
    line, end, _ = told.partition(b"\n")
    if end:
        first = json.loads(line)
        if first["code"] == STOPPED:
            return Preempted(first["text"], first["reason"])
        return RankFailed(f"rank {first['rank']}: {first['text']}", mistake=first["code"] == MISTAKE)
    if code == STOPPED:
        return Preempted("stopped by a signal")
    if code < 0:
        how = f"was ended by {_signal_name(-code)}; all other ranks were stopped"
        return RankFailed(f"rank {rank} {how}", mistake=False)
    return RankFailed(f"rank {rank}: failed with exit code {code}", mistake=False)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"
