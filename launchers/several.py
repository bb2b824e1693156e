"""Several runs, such as those of a sweep: their status as a table, and their end."""

from collections.abc import Sequence
from pathlib import Path

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.launchers.snapshot import JobFile
from scaleprog.launchers.status import Status, cancel, span, standing, status
from scaleprog.reporting.text_tables import cell, plain_table
from scaleprog.rundir.folders import runs_at, short_names


def statuses(paths: Sequence[Path]) -> tuple[list[Status], list[str]]:
    """The status of each run in `paths`: run directories, and folders of run directories.

    Returns:
        The statuses, in the order of `paths`, and what was left out, in words.

    Raises:
        ScaleprogError: none of `paths` leads to a run.
    """
    found: list[Status] = []
    without = [str(path) for path in paths if not runs_at(path)]
    left_out = [f"no run in {', '.join(without)}"] if without else []
    for run in {run.resolve(): run for path in paths for run in runs_at(path)}.values():
        try:
            found.append(status(run))
        except ScaleprogError as error:
            left_out.append(" ".join(map(str.strip, str(error).splitlines())))
    if not found:
        raise CheckpointError("; ".join(left_out))
    return found, left_out


def table(found: Sequence[Status]) -> str:
    """Statuses as a table for a terminal."""
    names = short_names([Path(each.run).resolve() for each in found])
    rows = [
        {
            "run": name,
            "state": each.state,
            "step": f"{each.step}{'' if each.steps is None else f'/{each.steps}'}",
            "network": each.network or "–",
            "top-1": cell(each.top1, ".2f"),
            "img/s": cell(each.images_per_second if each.state == "running" else None, ".0f"),
            "left": "–" if each.seconds_left is None else span(each.seconds_left),
            "restarts": str(len(each.restarts)),
        }
        for name, each in zip(names, found)
    ]
    return as_text(plain_table(rows, list(rows[0])), lines=True)


def cancel_all(runs: Sequence[Path]) -> str:
    """Ends the runs that are queued or running.

    Returns:
        A line about each run that was ended.

    Raises:
        ScaleprogError: there was none, or one could not be ended; the others are.
    """
    told: list[str] = []
    failed = False
    for run in runs:
        state = standing(run)[0]
        if state == "finished":
            continue
        try:
            if state == "stopped" and not _is_queued(run):
                continue
            told.append(f"{run.name}: {cancel(run)}")
        except ScaleprogError as error:
            failed = True
            told.append(f"{run.name}: {error}")
    if failed or not told:
        raise ScaleprogError("\n".join(told) or f"nothing to cancel; none of {len(runs)} runs is queued or running")
    return "\n".join(told)


def _is_queued(run: Path) -> bool:
    """Whether a run's job, according to Slurm, is not over. Raises NoAnswer: `standing` calls such a run stopped."""
    file = JobFile.read(run)
    job = None if file is None else file.ask()
    return job is not None and not job.over
