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
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scaleprog.errors import EXIT_CODE, Preempted, ScaleprogError
from scaleprog.preemption import SIGNALS

USER_ERROR = "user error: "  # marks, in a rank's error file, what needs no traceback
ECHO_SECONDS = 3.0  # a failed collective is nearly always the echo of another rank's error, which is to be heard first


class RankFailed(ScaleprogError):
    """The first rank that failed, and why."""

    def __init__(self, message: str, mistake: bool) -> None:
        """`mistake`: whether only the user can put it right, so that another try would end the same."""
        super().__init__(message)
        self.mistake = mistake


def launch(
    ranks: int,
    function: Callable[..., object],
    *arguments: Any,
    restarts: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Runs `function(*arguments)` in `ranks` processes of this machine, with torch.distributed's environment set.

    Signals that ask to stop (TERM, INT, USR2) are passed on to the ranks, which end by themselves.

    Args:
        restarts: how many times in a row the ranks are started again after one crashed or was killed.
        progress: a value that has changed since the last start where the ranks got on; the count then begins anew.

    Raises:
        RankFailed: with the error of the rank that failed first; the others have ended by then.
        Preempted: the ranks were asked to stop, and did.
    """
    left, before = restarts, progress()
    while True:
        try:
            return _launch_once(ranks, function, arguments)
        except RankFailed as error:
            if (now := progress()) != before:
                left, before = restarts, now
            if error.mistake or left == 0:
                raise
            left -= 1
            print(f"scaleprog: {error}\nscaleprog: starting again, {left} more tries", file=sys.stderr, flush=True)


def _launch_once(ranks: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
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
        with _passing_signals_on():
            elastic_launch(config, _rank)(function, arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message, mistake = _describe(rank, failure)
        if failure.exitcode == EXIT_CODE:
            raise Preempted(message) from None
        raise RankFailed(message, mistake) from None


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """Inside, a signal that asks to stop goes to the ranks, and this process waits for them to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, _: FrameType | None) -> None:
        for rank in multiprocessing.active_children():
            if rank.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _rank(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """What one process does; an exception goes into the agent's error file instead of over the other ranks' output."""
    for number in SIGNALS:
        signal.signal(number, _too_early)
    try:
        function(*arguments)
        atexit.register(_leave)
    except Exception as error:
        user = isinstance(error, ScaleprogError)
        text = f"{USER_ERROR}{error}" if user else traceback.format_exc()
        if isinstance(error, RuntimeError):
            time.sleep(ECHO_SECONDS)
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)
        sys.stdout.flush()
        sys.stderr.flush()
        # no tidy end: a collective that waits for another rank would never return
        os._exit(EXIT_CODE if isinstance(error, Preempted) else 2 if user else 1)


def _leave() -> None:
    """Ends a rank that is done, without the interpreter's tear-down: threads of gloo have been seen to abort in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _too_early(number: int, _: FrameType | None) -> None:
    """Ends a rank that is asked to stop before it trains, or after: there is nothing to save."""
    os._exit(EXIT_CODE)


def _describe(rank: int, failure: ProcessFailure) -> tuple[str, bool]:
    """What to tell, and whether it is a mistake of the user's."""
    text = str(failure.message)
    if failure.exitcode == EXIT_CODE and not text.startswith(USER_ERROR):
        return "stopped by a signal", False
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()}; all other ranks were stopped", False
    if text.startswith(USER_ERROR):
        text = text.removeprefix(USER_ERROR)
        return (text if failure.exitcode == EXIT_CODE else f"rank {rank}: {text}"), True
    return f"rank {rank}: failed\n{text}", False
