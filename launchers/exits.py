"""How a rank leaves by an error: what that means to whoever started it, on this machine or as a task of a Slurm job."""

import traceback
from dataclasses import dataclass

from scaleprog.errors import EXIT_CODE, Preempted, ScaleprogError, Unavailable

FINISHED, CRASHED, MISTAKE, STOPPED = 0, 1, 2, EXIT_CODE
"""What a rank ends with. Only the user can put a mistake right: another try would end the same."""
ECHO_SECONDS = 3.0  # a failed collective is nearly always the echo of another rank's error, which is to be heard first


@dataclass(frozen=True)
class Exit:
    """What a rank leaves with."""

    code: int
    cause: str
    text: str
    """The cause for the log; that of a bug has its traceback."""
    delay: float = 0.0
    """Seconds to wait before anything is said."""
    reason: str | None = None
    """That of a Preempted."""


def exit_by(error: Exception) -> Exit:
    """How a rank leaves that has met `error`."""
    text = str(error)
    if isinstance(error, Preempted):
        return Exit(STOPPED, text, text, reason=error.reason)
    if isinstance(error, ScaleprogError):
        return Exit(CRASHED if isinstance(error, Unavailable) else MISTAKE, text, text)
    cause = f"{type(error).__name__}: {text}".splitlines()[0]
    trace = "".join(traceback.format_exception(error))
    return Exit(CRASHED, cause, f"failed\n{trace}", ECHO_SECONDS if isinstance(error, RuntimeError) else 0.0)
