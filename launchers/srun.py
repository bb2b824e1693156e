"""Runs srun for the batch script, and ends it if it does not hear that its tasks have ended.

When a task fails, srun has Slurm end the others, and waits until every node has told it so. A node that reaches Slurm's
controller, but not the node of the batch script, never can: no task runs any more, and the job would keep its nodes.

`python -m scaleprog.launchers.srun RUN COMMAND...`, where COMMAND begins with srun, exits with its code, or with
UNHEARD if it had to end it.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from scaleprog.files.display import as_text
from scaleprog.launchers.exits import UNHEARD
from scaleprog.launchers.requeue import Attempt, reports_of, step_of
from scaleprog.rundir import slurm_queue

LOOK_SECONDS = 2.0
ASK_AFTER = 10.0
"""Seconds after the first report of a task from which on Slurm is asked whether it has ended the step."""
GIVE_UP_AFTER = 600.0
"""Seconds after which srun is ended, whatever Slurm says. By then it has noticed a lost node (`SlurmdTimeout`)."""


def attend(run: Path, command: Sequence[str], pause: Callable[[float], object] = time.sleep) -> int:
    """Runs a command that starts the tasks, and ends it if it outlives them.

    Args:
        run: the run directory.
        command: srun and its arguments.
        pause: called with the seconds to wait between two looks.

    Returns:
        The exit code for the batch script.
    """
    start, unheard = Attempt.current(), threading.Event()
    with subprocess.Popen(command) as process:

        def look() -> None:
            if why := outlived(run, start, process, pause):
                unheard.set()
                process.kill()
                print(f"scaleprog: {as_text(why)}; ended srun", file=sys.stderr, flush=True)

        threading.Thread(target=look, daemon=True).start()  # not in this thread: the file system may not answer
        code = process.wait()
    if unheard.is_set():
        return UNHEARD
    return code if code >= 0 else 128 - code


def outlived(
    run: Path, start: Attempt, process: subprocess.Popen[bytes], pause: Callable[[float], object] = time.sleep
) -> str | None:
    """Waits until srun has ended, and returns None, or until it has outlived its tasks, and returns why it has.

    Args:
        run: the run directory.
        start: the start whose tasks srun has started.
        process: srun.
        pause: called with the seconds to wait between two looks.
    """
    waited = 0.0
    while process.poll() is None:
        if waited >= GIVE_UP_AFTER:
            return f"srun has not ended {waited:.0f} s after a task failed"
        if waited >= ASK_AFTER:
            step = step_of(run, start)
            with suppress(slurm_queue.NoAnswer):
                if step is not None and slurm_queue.step_is_over(start.job, step):
                    return f"Slurm has ended step {step}, and srun has not heard so {waited:.0f} s after a task failed"
        pause(LOOK_SECONDS)
        if waited or reports_of(run, start):
            waited += LOOK_SECONDS
    return None


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # for the tasks; srun does not inherit it
    sys.exit(attend(Path(sys.argv[1]), sys.argv[2:]))
