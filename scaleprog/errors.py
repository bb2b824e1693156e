"""What the user can be told: every mistake that is not a bug of ours ends in one of these, without a traceback."""

EXIT_CODE = 75
"""Of a process that left with a checkpoint because it was asked to; BSD's EX_TEMPFAIL, "try again"."""


class ScaleprogError(Exception):
    """Something the user can put right; the message says what, where and how."""


class RecipeError(ScaleprogError):
    """A recipe that cannot be run: unknown key, bad value, settings that contradict each other."""


class DataError(ScaleprogError):
    """Shards, manifest or samples that are missing, damaged or do not fit the recipe."""


class CheckpointError(ScaleprogError):
    """A checkpoint or run directory that is missing, damaged or of another recipe."""


class OtherFormat(CheckpointError):
    """A sound checkpoint of another version of scaleprog: nothing to skip as if it were damaged."""


class OtherRun(CheckpointError):
    """A sound checkpoint in the wrong place: of another run, or of another step than its name says."""


class Unavailable(ScaleprogError):
    """Something that another try may find in order: a full disk, a file system that does not answer, a lost worker.

    Launchers treat it as a crash, and start again.
    """


class Diverged(ScaleprogError):
    """A loss that is not a number any more."""


class Disagreement(ScaleprogError):
    """Ranks that would have acted on different values."""


class Superseded(ScaleprogError):
    """A run directory that a later start has taken over; whoever reads this must write nothing into it any more."""


class Preempted(ScaleprogError):
    """A run that was asked to stop and has left; the same command goes on from its last checkpoint."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        """`reason`: what asked, a signal's name or "time limit"; None where that is not known."""
        super().__init__(message)
        self.reason = reason
