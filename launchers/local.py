"""Starts ranks as processes on this machine. If one fails, all of them end.

The ranks meet in unnamed memory that belongs to this process, and report there why they fail. This module does not use
torch's elastic agent, because that listens on every interface and unpickles whatever arrives there.
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
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from scaleprog.errors import Preempted, ScaleprogError
from scaleprog.files.display import say
from scaleprog.launchers.exits import CRASHED, MISTAKE, STOPPED, exit_by
from scaleprog.launchers.hangs import Guard
from scaleprog.launchers.world import Count, largest
from scaleprog.ranks.patience import LOOK_SECONDS
from scaleprog.ranks.processes import kill_with_children
from scaleprog.ranks.pulse import PULSE, Pulse, Stand
from scaleprog.ranks.rendezvous import Place
from scaleprog.ranks.stop import SIGNALS
from scaleprog.recipe.worlds import Worlds

START_METHOD = "spawn"  # by its name in multiprocessing; tests fork ranks from a process that has imported torch
GRACE_SECONDS = 30.0  # after a failure: time between TERM and KILL for the other ranks
KILL_SECONDS = 10.0  # until a process that was killed has ended
PR_SET_PDEATHSIG = 1


class RankFailed(ScaleprogError):
    """The first rank that failed, and why."""

    def __init__(self, message: str, mistake: bool) -> None:
        """`mistake`: whether only the user can fix the error, so that a retry would fail the same way."""
        super().__init__(message)
        self.mistake = mistake
        self.exit_code = MISTAKE if mistake else CRASHED


def launch(
    ranks: int | Callable[[], int],
    function: Callable[..., object],
    *arguments: Any,
    restarts: int = 0,
    progress: Callable[[], object] = lambda: None,
    folder: Path | None = None,
) -> None:
    """Runs `function(*arguments)` in `ranks` processes on this machine; `process_group()` connects them.

    Passes the signals TERM, INT, and USR2 on to the ranks, which then stop by themselves. After the first such signal,
    the ranks are not restarted, whatever happens to them.

    Args:
        ranks: the number of ranks, or a function that returns it; called at each start.
        function: runs in every rank; pickled.
        arguments: the arguments of `function`; pickled.
        restarts: how many consecutive times to restart the ranks after one of them crashed or was killed.
        progress: returns a value that changes when the ranks make progress, which resets the count of restarts.
        folder: the run directory in which they train, for where hung ranks stand (None: hangs are not noticed here).

    Raises:
        RankFailed: a rank failed. Has the error of the first rank that failed; the other ranks have ended by then.
        Preempted: the ranks were asked to stop, and did.
    """
    with passing_signals_on() as asked:
        left, before = restarts, progress()
        while True:
            try:
                if asked.value:
                    raise Preempted("stopped before the ranks started")
                return _launch_once(asked, ranks() if callable(ranks) else ranks, function, arguments, folder)
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
                say(error)
                say(f"restarting the ranks; retries left: {left}")


def ranks_to_start(count: Count, worlds: Worlds) -> int:
    """The largest number of ranks in a range that fits on this machine and can train.

    If that is less than `count.most`, prints the reason.

    Raises:
        ScaleprogError: no number in the range fits and can train.
    """
    room, of = room_here()
    if room < count.least:
        check_devices(count.least)
        raise ScaleprogError(
            f"--nproc {count}: {of} available: {room}; to start N ranks anyway, pass --nproc N instead of a range"
        )
    wanted = min(count.most, room)
    option = "--nproc" if wanted == count.most else f"--nproc {count} ({of} available: {room}), narrowed to"
    taken = largest(option, Count(count.least, wanted), worlds)
    why = []
    if wanted < count.most:
        why.append(f"{of} available: {room}")
    if taken < wanted:
        why.append(worlds.obstacle(wanted))
    if why:
        say(f"starting {taken} of at most {count.most} ranks; {'; '.join(why)}")
    return taken


def check_devices(ranks: int) -> None:
    """Raises ScaleprogError if this machine has CUDA devices, but fewer than `ranks`."""
    devices = torch.cuda.device_count()
    if 0 < devices < ranks:
        fits = "1" if devices == 1 else f"{devices} or fewer, or a range such as 1:{devices}"
        raise ScaleprogError(
            f"--nproc {ranks}: each rank needs a CUDA device of its own; CUDA devices available: {devices}; use "
            f"--nproc {fits}, or set CUDA_VISIBLE_DEVICES= (nothing) to train on the CPU"
        )


def room_here() -> tuple[int, str]:
    """How many ranks fit on this machine, and what limits them: its CUDA devices, or the CPU cores of this process."""
    if devices := torch.cuda.device_count():
        return devices, "CUDA devices"
    return len(os.sched_getaffinity(0)), "CPU cores"


def _stopped(name: str, error: Exception) -> Preempted:
    """Converts the `error` that ended the ranks after the signal `name` to Preempted."""
    if not isinstance(error, Preempted):
        return Preempted(f"stopped by {name}; {error}", name)
    return error if error.reason else Preempted(f"stopped by {name}", name)


def _launch_once(
    asked: c_int, ranks: int, function: Callable[..., object], arguments: tuple[Any, ...], folder: Path | None
) -> None:
    """Starts the ranks once; returns when all of them have ended without an error."""
    context: Any = multiprocessing.get_context(START_METHOD)
    with _memory() as (_, store), _memory() as (told, words), _memory() as (seen, pulses), threads_shared(ranks):
        guard = None if folder is None else Guard(folder, [Pulse(seen, rank) for rank in range(ranks)])
        processes: list[BaseProcess] = []
        try:
            for rank in range(ranks):
                place = Place(rank, ranks, rank, ranks, store)
                process = context.Process(
                    target=_rank, args=(asked, place, words, guard and pulses, function, arguments)
                )
                try:
                    with interrupts_held():
                        process.start()
                except OSError as error:
                    raise RankFailed(f"rank {rank}: cannot be started: {error}", mistake=False) from error
                processes.append(process)
            _watch(processes, told, guard)
        finally:
            _end(processes)


@contextmanager
def threads_shared(ranks: int) -> Iterator[None]:
    """Processes that start inside share the cores: each has its part of the threads, unless OMP_NUM_THREADS is set."""
    if os.environ.get("OMP_NUM_THREADS"):
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // ranks))  # read when torch is imported
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


@contextmanager
def interrupts_held() -> Iterator[None]:
    """A process that starts inside has SIGINT blocked: Ctrl-C in a terminal waits until it has handlers."""
    resource_tracker.ensure_running()  # starting it would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _memory() -> Iterator[tuple[int, str]]:
    """A file in memory: its descriptor, and its path. Only processes of this user can open the path."""
    descriptor = os.memfd_create("scaleprog")
    try:
        yield descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _watch(processes: Sequence[BaseProcess], told: int, guard: Guard | None) -> None:
    """Returns when all ranks have ended without an error.

    Raises:
        RankFailed: a rank failed, or hung.
        Preempted: a rank was asked to stop.
    """
    running = dict(enumerate(processes))
    look = None if guard is None else LOOK_SECONDS
    while running or (guard is not None and guard.has_noticed):
        ready = connection.wait([process.sentinel for process in running.values()], look)
        if guard is not None and (stands := guard.look(last=not running)):
            raise _hung(processes, guard, stands)
        for rank in [rank for rank, process in running.items() if process.sentinel in ready]:
            process = running.pop(rank)
            process.join()
            if process.exitcode and not (guard is not None and guard.has_noticed):
                raise _failure(rank, process.exitcode, os.pread(told, os.fstat(told).st_size, 0))


def _hung(processes: Sequence[BaseProcess], guard: Guard, stands: Sequence[Stand]) -> RankFailed:
    """Kills ranks of which some hang, writes the event, and returns the error to raise."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            kill_with_children(process.pid)
    hang = guard.conclude(stands)
    return RankFailed(hang.message, mistake=False)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Ends the ranks that still run: with TERM, then with KILL if they ignore it.

    Leaves behind what not even KILL ends, because it waits in the kernel, and says so.
    """
    for process in processes:
        process.terminate()
    give_up = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, give_up - time.monotonic()))
    for process in processes:
        process.kill()
        process.join(KILL_SECONDS)
        if process.is_alive():
            say(f"process {process.pid} waits in the kernel; left behind")


@contextmanager
def passing_signals_on() -> Iterator[c_int]:
    """Inside this context, a signal that asks to stop goes to the ranks, and this process waits for them to end.

    Yields the number of the first signal (0 until one arrives), in memory that is shared with ranks that start later.
    """
    asked = multiprocessing.get_context(START_METHOD).RawValue(c_int, 0)
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


def _rank(
    asked: c_int,
    place: Place,
    words: str,
    pulses: str | None,
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    """Runs one rank. Its error goes into the launcher's memory, so that it does not mix with other ranks' output."""
    begin_process(asked)
    telling, store = os.open(words, os.O_WRONLY | os.O_APPEND), os.open(place.store, os.O_RDWR)
    if pulses is not None:
        os.environ[PULSE] = f"{os.open(pulses, os.O_RDWR)}:{place.rank}"
    try:
        os.environ |= replace(place, store=f"file:/proc/self/fd/{store}").variables()  # the launcher may be killed
        function(*arguments)
        atexit.register(leave)
    except Exception as error:
        end = exit_by(error)
        time.sleep(end.delay)
        with suppress(OSError):
            row = {"rank": place.rank, "code": end.code, "text": end.text, "reason": end.reason}
            os.write(telling, f"{json.dumps(row)}\n".encode())
        leave(end.code)  # no clean shutdown: a collective that waits for another rank would never return


def begin_process(asked: c_int) -> None:
    """Prepares a process that was started inside `interrupts_held` and `passing_signals_on`, which yielded `asked`."""
    for number in SIGNALS:
        signal.signal(number, _too_early)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked since `interrupts_held`
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)  # if the launcher dies, save a checkpoint and stop
    if asked.value:
        os._exit(STOPPED)


def leave(code: int = 0) -> NoReturn:
    """Ends this process without the interpreter's teardown, in which gloo's threads sometimes abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _too_early(number: int, _: FrameType | None) -> None:
    """Ends a rank that is asked to stop before or after training: it has nothing to save."""
    os._exit(STOPPED)


def _failure(rank: int, code: int, told: bytes) -> RankFailed | Preempted:
    """The error to raise when `rank` exits first.

    Args:
        rank: the rank that exited first.
        code: its exit code, not 0.
        told: one JSON line from each rank that has reported an error, in order. The first line names the first rank
            that failed, even if another rank exited sooner.
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
        how = f"was killed by {signal_name(-code)}; the launcher stopped all other ranks"
        return RankFailed(f"rank {rank} {how}", mistake=False)
    return RankFailed(f"rank {rank}: failed with exit code {code}", mistake=False)


def signal_name(number: int) -> str:
    """The name of a signal, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"
