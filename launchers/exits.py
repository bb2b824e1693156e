"""How a rank exits on an error, and what the exit tells its launcher (on this machine, or as a task of a Slurm job)."""

import traceback
from dataclasses import dataclass

from scaleprog.errors import CRASH_CODE, EXIT_CODE, MISTAKE_CODE, Preempted, ScaleprogError

FINISHED, CRASHED, MISTAKE, STOPPED = 0, CRASH_CODE, MISTAKE_CODE, EXIT_CODE
"""Exit codes of a rank. Only the user can fix a mistake: a retry would fail the same way."""
UNHEARD = 80
"""Exit code for the batch script where srun had to be ended, because it did not hear that its tasks had ended."""
ECHO_SECONDS = 3.0  # a failed collective almost always echoes another rank's error; that rank must report first


@dataclass(frozen=True)
class Exit:
    """How a rank exits: its exit code and its report."""

    code: int
    cause: str
    text: str
    """The cause for the log; for a bug, with the traceback."""
    delay: float = 0.0
    """Seconds to wait before reporting."""
    reason: str | None = None
    """The `reason` of a Preempted."""


def exit_by(error: Exception) -> Exit:
    """How a rank exits after `error`."""
    text = str(error)
    if isinstance(error, Preempted):
        return Exit(STOPPED, text, text, reason=error.reason)
    if isinstance(error, ScaleprogError):
        return Exit(error.exit_code, text, text)
    cause = f"{type(error).__name__}: {text}".splitlines()[0]
    trace = "".join(traceback.format_exception(error))
    return Exit(CRASHED, cause, f"failed\n{trace}", ECHO_SECONDS if isinstance(error, RuntimeError) else 0.0)
