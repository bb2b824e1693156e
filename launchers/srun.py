"""Runs srun for the batch script, and ends it if it does not hear that its tasks have ended.

When a task fails, srun has Slurm end the others, and waits until every node has told it so. A node that reaches Slurm's
controller, but not the node of the batch script, never can: no task runs any more, and the job would keep its nodes.

`python -m scaleprog.launchers.srun RUN COMMAND...`, where COMMAND begins with srun, exits with its code, or with
UNHEARD if it had to end it. Where tasks start again inside their job, it adds options to srun, see `again_options`.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scaleprog.files.display import say
from scaleprog.launchers.attempt import Attempt, reports_of, step_of
from scaleprog.launchers.exits import FINISHED, UNHEARD
from scaleprog.ranks.stop import SIGNALS
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.reading import read_results

LOOK_SECONDS, TELL_SECONDS = 2.0, 5.0
STEP_SECONDS = 300
"""For how long srun may wait until Slurm lets the tasks start again."""


@dataclass(frozen=True)
class Patience:
    """Seconds: until Slurm is asked whether the step is over, after a task's report, and without one between two times;
    for how long it must say so; and after the report until srun is ended, whatever Slurm says.

    By then, Slurm has noticed a lost node (`SlurmdTimeout`) and a task that cannot be killed (`UnkillableStepTimeout`).
    """

    ask: float = 10.0
    between: float = 60.0
    sure: float = 10.0
    most: float = 1800.0


def attend(run: Path, command: Sequence[str], patience: Patience = Patience(), look: float = LOOK_SECONDS) -> int:
    """Runs a command that starts the tasks, and ends it if it outlives them.

    Args:
        run: the run directory.
        command: srun and its arguments.
        patience: for how long it may outlive them.
        look: seconds between two looks.

    Returns:
        The exit code for the batch script.
    """
    start, unheard = Attempt.current(), threading.Event()
    with subprocess.Popen(command) as process:

        def watch() -> None:
            outliving = Outliving(run, start, patience)
            while process.poll() is None:
                time.sleep(look)
                why = outliving.look(time.monotonic())
                if why and process.poll() is None:
                    unheard.set()
                    process.kill()
                    say(f"{why}; ended srun")

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()  # not in this thread: the file system may not answer
        code = process.wait()
        if unheard.is_set():
            watching.join(TELL_SECONDS)  # or its message would be lost
    if unheard.is_set():
        return UNHEARD if read_results(run) is None else FINISHED
    return code if code >= 0 else 128 - code


class Outliving:
    """Whether srun has outlived the tasks of a start."""

    def __init__(self, run: Path, start: Attempt, patience: Patience) -> None:
        self._run, self._start, self._patience = run, start, patience
        self._reported: float | None = None
        self._asked: float | None = None
        self._over: float | None = None

    def look(self, now: float) -> str | None:
        """Why srun has outlived its tasks; None if it has not.

        Args:
            now: the seconds of a clock that is never set back.
        """
        with suppress(OSError):  # at the next look, the file system may answer
            if self._reported is None and reports_of(self._run, self._start):
                self._reported = now
            since = now if self._reported is None else self._reported
            if now - since >= self._patience.most:
                return f"srun has not ended {now - since:.0f} s after a task failed"
            if self._is_due(now):
                self._asked = now
                step = step_of(self._run, self._start)
                over = step is not None and self._is_over(step)
                self._over = (self._over or now) if over else None
                if self._over is not None and now - self._over >= self._patience.sure:
                    return f"Slurm has ended step {step}, and srun has not heard so for {now - self._over:.0f} s"
        return None

    def _is_due(self, now: float) -> bool:
        if self._over is not None or (self._reported is not None and now - self._reported >= self._patience.ask):
            return True
        self._asked = now if self._asked is None else self._asked
        return now - self._asked >= self._patience.between

    def _is_over(self, step: str) -> bool:
        with suppress(slurm_queue.NoAnswer):
            return slurm_queue.step_is_over(self._start.job, step)
        return False


def again_options(variables: Mapping[str, str]) -> list[str]:
    """Options of srun for tasks that start again inside their job, by the environment of its batch script.

    A step that a lost node took part in may stay in Slurm's books (before 23.11, if its other nodes had ended first),
    and no step would get its cores: so the tasks do without those nodes, and share what is left with that step. What
    Slurm does not let start at all ends with an error, and the job is requeued.
    """
    options = []
    if lost := variables.get(slurm_queue.LOST):
        options += [f"--exclude={lost}", "--overlap"]
    if variables.get(slurm_queue.REPEAT, "0") != "0":
        options.append(f"--immediate={STEP_SECONDS}")
    return options


if __name__ == "__main__":
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # for the tasks; srun does not inherit it
    program, *arguments = sys.argv[2:]
    sys.exit(attend(Path(sys.argv[1]), [program, *again_options(os.environ), *arguments]))
