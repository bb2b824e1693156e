"""Copies a job's code and recipe into its run directory, so that later edits to the working tree do not change the job.

`python -m scaleprog.launchers.snapshot RECIPE RUN [key=value]...` does this for slurm/train.sbatch at the job's first
start, and prints the folder of the code.
"""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import scaleprog
from scaleprog.errors import CheckpointError, InUse, ScaleprogError
from scaleprog.files.atomic import read_text, write_whole
from scaleprog.files.display import as_text, clock, say
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.launchers import integrity
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.reading import kind_of
from scaleprog.rundir.records import JOB_ID

if TYPE_CHECKING:  # a job that starts again does not need this import
    from scaleprog.recipe import Recipe

PACKAGES = ("scaleprog", "scaleprog/launchers", "scaleprog/shards")  # the last two may be links
JOB = "job.json"


@dataclass(frozen=True)
class JobFile:
    """The content of a run directory's `job.json`: the Slurm job that trains the run, or the last one that did.

    Attributes:
        job: the id of the job.
        name: the name of the job.
        code: the folder of the job's code, relative to the run directory.
        log: the job's log, relative to the run directory; empty if not known.
        host: the machine where `scaleprog submit` found all that the recipe names; empty for a job of plain sbatch.
        time: when it did, in seconds since 1970.

    The runs of a sweep share one array, whose code and logs are in the folder of the sweep, `..`.
    """

    job: str
    name: str
    code: str
    log: str = ""
    host: str = ""
    time: float = 0.0

    def write(self, run: Path) -> None:
        """Writes `job.json` into a run directory."""
        write_whole(run / JOB, json.dumps(asdict(self)))

    @classmethod
    def read(cls, run: Path) -> "JobFile | None":
        """Reads the `job.json` of a run directory; None if there is none.

        Raises CheckpointError if it is invalid, or Unavailable if it cannot be read now.
        """
        try:
            file = cls(**json.loads(read_text(run / JOB, 2**16)))
            file._check()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise kind_of(error)(f"{run / JOB}: not readable: {error}") from error
        return file

    def _check(self) -> None:
        """Raises ValueError for a value that a job cannot have: anyone may have written the file."""
        forms = {
            "job": JOB_ID,
            "code": r"(\.\./)?code/[0-9a-z]+",
            "log": r"|(\.\./)?jobs/[^/]+/[^/]+",
            "name": r".*",
            "host": r".*",
        }
        for key, form in forms.items():
            value = getattr(self, key)
            if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
                raise ValueError(f"{key} is not printable text")
            if not re.fullmatch(form, value) or "/../" in f"/{value.removeprefix('../')}/":
                raise ValueError(f"{key} cannot be {value[:100]!r}")
        if not isinstance(self.time, int | float) or not 0 <= self.time < slurm_queue.LAST_SECOND:
            raise ValueError("time is not a time")

    def seen(self) -> str:
        """For the error about something that a node does not have: who has seen it. Empty if nobody has looked."""
        if not self.host:
            return ""
        return (
            f"it was seen on {self.host} when the job was submitted at {clock(self.time)}; is it on a file system "
            "that all nodes share?"
        )

    def ask(self) -> slurm_queue.Job | None:
        """Slurm's record of the job; None if Slurm no longer knows it. Raises NoAnswer."""
        job = slurm_queue.find(self.job)
        return job if job is not None and job.name == self.name else None  # a new cluster reuses job ids


def code_folder(run: Path) -> Path:
    """The folder where `take` puts the current code."""
    return run / "code" / integrity.digest(_sources())


def take(recipe: "Recipe", run: Path) -> Path:
    """Copies the current code and `recipe` into `run`; see `take_code`."""
    folder = take_code(run)
    write_recipe(recipe, run)
    return folder


def write_recipe(recipe: "Recipe", run: Path) -> None:
    """Writes `recipe` into `run`. Raises ScaleprogError."""
    from scaleprog.recipe import directories  # a job that starts again does not need this import

    try:
        run.mkdir(parents=True, exist_ok=True)
        write_whole(run / RECIPE, recipe.dump())
        directories.note(run)
    except OSError as error:
        raise ScaleprogError(f"{run}: cannot be used as a run directory: {error}") from error


def take_code(run: Path) -> Path:
    """Copies the current code into `run`.

    If the folder of the code already exists, this compares it file by file, because anyone may have written it.

    Returns:
        The folder of the code.

    Raises:
        ScaleprogError: `run` cannot be written, or holds something else where the code belongs.
    """
    sources = _sources()
    folder = run / "code" / integrity.digest(sources)
    try:
        if folder.parent.is_symlink():  # the code must not go where a link leads
            raise CheckpointError(
                f"{folder.parent} is a link, but code must be in the run directory itself; remove the link"
            )
        if not folder.exists():
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
            try:
                for name, content in sources.items():
                    path = temporary / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                with suppress(OSError):  # another process created the folder first
                    temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        verify(folder)
    except OSError as error:
        raise ScaleprogError(f"{run}: cannot be used as a run directory: {error}") from error
    return folder


def verify(folder: Path) -> None:
    """Raises CheckpointError unless a folder of code holds exactly the files whose digest is its name."""
    if problem := integrity.problem(str(folder), folder.name):
        raise CheckpointError(f"{folder}: does not match the digest in its name: {problem}; remove it and start again")


def check_name(run: Path) -> None:
    """Raises ScaleprogError if the name of a run directory does not work in a batch script or in PYTHONPATH."""
    if "%" in str(run):
        raise ScaleprogError(f"--run-dir {run}: Slurm would replace the %; choose a name without it")
    if not str(run).isprintable() or {"\\", ":"} & set(str(run)):
        raise ScaleprogError(
            f"--run-dir {str(run)!r}: a job's run directory cannot have control characters, backslashes, or colons in "
            "its name, because Slurm and Python would misread it; choose another name"
        )


def check_free(recipe: "Recipe", run: Path, mine: str | None = None, sure: bool = False) -> None:
    """Raises CheckpointError if `run` is not free.

    Args:
        recipe: the recipe to train. `run` is not free if it belongs to another recipe.
        run: the run directory.
        mine: the id of this job, if any. `run` is not free if a queued or running job, or a live process that does not
            belong to job `mine`, owns it.
        sure: see `check_job`.
    """
    from scaleprog.rundir.lease import check_recipe, is_alive, read_owner

    check_recipe(run, recipe)
    check_job(run, sure)
    owner = read_owner(run)
    if owner is not None and (mine is None or owner.job != mine) and is_alive(owner, run):
        raise InUse(f"{run} is in use by process {owner.pid} on {owner.host}; use another --run-dir")


def check_job(run: Path, sure: bool = False) -> None:
    """Raises CheckpointError if the Slurm job that `job.json` names is queued or running.

    `sure`: raise NoAnswer if Slurm does not say; otherwise the job counts as over.
    """
    job = None
    if (last := JobFile.read(run)) is not None:
        try:
            job = last.ask()
        except slurm_queue.NoAnswer as error:
            if sure:
                unknown = f"{run}: Slurm does not say whether job {last.job} is over: {error}"
                raise slurm_queue.NoAnswer(unknown) from error
    if job is not None and not job.over:
        quoted = shlex.quote(str(run))
        raise InUse(
            f"{run} belongs to job {job.id}, which is {job.state}; follow it with `scaleprog status {quoted} "
            f"--follow`, cancel it with `scaleprog cancel {quoted}`, or use another --run-dir"
        )


def prepare(recipe: Path, run: Path, overrides: Sequence[str]) -> Path:
    """The first action of a job started by train.sbatch. Restarts find the code that the first start copied.

    At its first start, the job trusts nothing that is already in the run directory, whatever job id it names.

    Args:
        recipe: the recipe file.
        run: the run directory.
        overrides: `key=value` settings that override the recipe.

    Returns:
        The folder of the code.

    Raises:
        ScaleprogError: the recipe is invalid, or the run directory belongs to something else or is damaged.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(JOB_ID, job):
        raise ScaleprogError(f"SLURM_JOB_ID is {as_text(job, most=60)!r}, so this is not a Slurm job")
    last = JobFile.read(run)
    restart = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    if restart and last is not None and last.job == job and (run / last.code).is_dir():
        verify(run / last.code)
        return run / last.code
    from scaleprog.recipe import Recipe

    check_name(run)
    loaded = Recipe.load(recipe, overrides)
    check_free(loaded, run, job)  # a refused job may have replaced this job's job.json
    code = take(loaded, run)
    JobFile(job, os.environ.get("SLURM_JOB_NAME", ""), str(code.relative_to(run))).write(run)
    return code


def _sources() -> dict[str, bytes]:
    """Every module of the checkout, as {path below the checkout: content}."""
    root = Path(scaleprog.__file__).parents[1]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


if __name__ == "__main__":
    try:
        print(prepare(Path(sys.argv[1]), Path(sys.argv[2]).absolute(), sys.argv[3:]))
    except ScaleprogError as mistake:
        say(mistake)
        sys.exit(mistake.exit_code)
