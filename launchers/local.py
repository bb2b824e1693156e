"""Ranks as processes of this machine, watched by torch's elastic agent: if one fails, all end at once."""

import atexit
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from scaleprog.errors import ScaleprogError

USER_ERROR = "user error: "  # marks, in a rank's error file, what needs no traceback
ECHO_SECONDS = 3.0  # a failed collective is nearly always the echo of another rank's error, which is to be heard first


class RankFailed(ScaleprogError):
    """The first rank that failed, and why."""


def launch(ranks: int, function: Callable[..., object], *arguments: Any) -> None:
    """Runs `function(*arguments)` in `ranks` processes of this machine, with torch.distributed's environment set.

    Raises RankFailed with the error of the rank that failed first; the others have ended by then.
    """
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
    )
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # RankFailed says it
    try:
        elastic_launch(config, _rank)(function, arguments)
    except ChildFailedError as error:
        raise RankFailed(_describe(*error.get_first_failure())) from None


def _rank(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """What one process does; an exception goes into the agent's error file instead of over the other ranks' output."""
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
        os._exit(2 if user else 1)  # no tidy end: a collective that waits for another rank would never return


def _leave() -> None:
    """Ends a rank that is done, without the interpreter's tear-down: threads of gloo have been seen to abort in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _describe(rank: int, failure: ProcessFailure) -> str:
    text = str(failure.message)
    if failure.exitcode < 0:
        return f"rank {rank} was ended by {failure.signal_name()}; all other ranks were stopped"
    return f"rank {rank}: " + (text.removeprefix(USER_ERROR) if text.startswith(USER_ERROR) else f"failed\n{text}")
