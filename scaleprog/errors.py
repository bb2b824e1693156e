"""Errors for the user: every failure that is not a bug in scaleprog ends in one of these, without a traceback."""

CRASH_CODE = 1
"""Exit code of a process that failed by a bug, or by something that may go away: worth another start."""
EXIT_CODE = 75
"""Exit code of a process that was asked to stop and left a checkpoint; BSD's EX_TEMPFAIL, "try again"."""
MISTAKE_CODE = 2
"""Exit code of a process that failed by what only the user can fix."""
HANG_CODE = 76
"""Exit code of a process that ended itself because it made no progress for too long: worth another start."""
INTERRUPTED_CODE = 130
"""Exit code of a process that was interrupted at the keyboard: 128 and the number of SIGINT."""


class ScaleprogError(Exception):
    """A problem that the user can fix; the message says what, where and how."""

    exit_code = MISTAKE_CODE
    """Exit code of a process that ends by this error."""


class RecipeError(ScaleprogError):
    """A recipe that cannot be run: unknown key, bad value, settings that contradict each other."""


class OverBudget(RecipeError):
    """A promised budget that the run cannot keep at the measured step times; a larger budget resumes the run."""


class DataError(ScaleprogError):
    """Shards, manifest or samples that are missing, damaged or do not fit the recipe."""


class Absent(ScaleprogError):
    """A file or folder that is not there: on a node of a job, perhaps because only another machine has it."""

    def __init__(self, message: str, what: str = "") -> None:
        """`what`: the part of the message that says what is not there; the rest is advice if no machine has it."""
        super().__init__(message)
        self.what = what or message


class AbsentData(DataError, Absent):
    """Shards, a manifest, or token labels that are not there."""


class AbsentWeights(RecipeError, Absent):
    """Given weights that are not there."""


class DamagedSample(DataError):
    """An image whose bytes no decoder can read, in a shard that is as the manifest says."""

    def __init__(self, message: str, where: str = "") -> None:
        """`where`: the location of the sample, as in `decode.Encoded`."""
        super().__init__(message)
        self.where = where


class CheckpointError(ScaleprogError):
    """A checkpoint or run directory that is missing, damaged or of another recipe."""


class InUse(CheckpointError):
    """A run directory in which another job or process trains, or is about to."""


class OtherFormat(CheckpointError):
    """A sound checkpoint of another version of scaleprog; it must not be skipped like a damaged one."""


class OtherRun(CheckpointError):
    """A sound checkpoint in the wrong place: it belongs to another run, or to another step than its name says."""


class Unavailable(ScaleprogError):
    """A problem that may go away: a full disk, a file system that does not respond, a lost worker.

    Launchers treat it as a crash and start the run again.
    """

    exit_code = CRASH_CODE


class WorkerDied(DataError, Unavailable):
    """A worker that builds or checks shards was killed, perhaps because memory ran out."""


class Diverged(ScaleprogError):
    """A loss or a gradient that is no longer a finite number."""


class OutOfMemory(ScaleprogError):
    """A step that needs more memory than a rank has: it would fail the same way at the next start."""


class Disagreement(ScaleprogError):
    """Ranks that were about to act on different values."""


class Superseded(ScaleprogError):
    """A run directory that a later start has taken over; this process must no longer write into it."""


class Preempted(ScaleprogError):
    """A run that has stopped because it was asked to; the same command resumes it from its last checkpoint."""

    exit_code = EXIT_CODE

    def __init__(self, message: str, reason: str | None = None) -> None:
        """`reason`: the name of a signal, or "time limit"; None if unknown."""
        super().__init__(message)
        self.reason = reason


def to_plain(error: ScaleprogError) -> dict[str, str | None]:
    """An error as values that survive JSON, so that it can be raised on another rank."""
    reason = error.reason if isinstance(error, Preempted) else None
    return {"kind": type(error).__name__, "message": str(error), "reason": reason}


def of_plain(values: dict[str, str | None]) -> ScaleprogError:
    """The inverse of `to_plain`. An error whose class is not in this file becomes a plain ScaleprogError."""
    kind, message = globals().get(values["kind"] or ""), values["message"] or ""
    if kind is Preempted:
        return Preempted(message, values["reason"])
    if isinstance(kind, type) and issubclass(kind, ScaleprogError):
        return kind(message)
    return ScaleprogError(message)
