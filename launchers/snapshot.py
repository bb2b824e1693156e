"""What a job runs is copied into its run directory, so that a working tree edited meanwhile does not change the job.

`python -m launchers.snapshot RECIPE RUN [key=value]...` does it for slurm/train.sbatch, at the job's first start, and
prints where the code lies.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import launchers
from launchers import integrity
from scaleprog import queue
from scaleprog.display import as_text
from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.files import read_text, write_whole
from scaleprog.records import JOB_ID

if TYPE_CHECKING:  # it imports torch, for which a job that starts again need not wait
    from scaleprog.recipe import Recipe

PACKAGES = ("scaleprog", "launchers", "shards")
JOB = "job.json"


@dataclass(frozen=True)
class JobFile:
    """`job.json` of a run directory: the Slurm job that trains it, or the last that did; paths are relative to it."""

    job: str
    name: str
    code: str
    log: str = ""

    def write(self, run: Path) -> None:
        """Puts it into a run directory."""
        write_whole(run / JOB, json.dumps(asdict(self)))

    @classmethod
    def read(cls, run: Path) -> "JobFile | None":
        """That of a run directory; None where there is none. Raises CheckpointError."""
        try:
            file = cls(**json.loads(read_text(run / JOB, 2**16)))
            file._check()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{run / JOB}: not readable: {error}") from error
        return file

    def _check(self) -> None:
        """Raises ValueError for what no job has: the file may be somebody else's."""
        forms = {"job": JOB_ID, "code": r"code/[0-9a-z]+", "log": r"|jobs/[^/]+/[^/]+", "name": r".*"}
        for key, form in forms.items():
            value = getattr(self, key)
            if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
                raise ValueError(f"{key} is no text that can be shown")
            if not re.fullmatch(form, value) or "/../" in f"/{value}/":
                raise ValueError(f"{key} is {value[:100]!r}")

    def ask(self) -> queue.Job | None:
        """What Slurm says of it; None if it does not know it any more. Raises NoAnswer."""
        job = queue.find(self.job)
        return job if job is not None and job.name == self.name else None  # a new cluster counts its jobs anew


def code_folder(run: Path) -> Path:
    """Where `take` puts the present code."""
    return run / "code" / integrity.digest(_sources())


def take(recipe: "Recipe", run: Path) -> Path:
    """Copies the present code and `recipe` into `run`; returns the folder of the code. Raises ScaleprogError.

    Code that is there already is compared, file by file: the run directory may be somebody else's.
    """
    sources = _sources()
    folder = run / "code" / integrity.digest(sources)
    try:
        if folder.parent.is_symlink():  # and not where else it leads
            raise CheckpointError(
                f"{folder.parent}: is a link, and code is kept in the run directory itself; remove it"
            )
        if not folder.exists():
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
            for name, content in sources.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            try:
                temporary.rename(folder)
            except OSError:
                shutil.rmtree(temporary)  # another process was faster
        verify(folder)
        write_whole(run / "recipe.yaml", recipe.dump())
    except OSError as error:
        raise ScaleprogError(f"{run}: cannot be a run directory: {error}") from error
    return folder


def verify(folder: Path) -> None:
    """Raises CheckpointError unless a folder of code holds what its name says, and nothing else."""
    if problem := integrity.problem(str(folder), folder.name):
        raise CheckpointError(f"{folder}: not the code that it is named after: {problem}; remove it and start again")


def check_name(run: Path) -> None:
    """Raises ScaleprogError for a run directory that a batch script or the path of Python's modules cannot name."""
    if "%" in str(run):
        raise ScaleprogError(f"--run-dir {run}: Slurm would replace the %")
    if not str(run).isprintable() or {"\\", ":"} & set(str(run)):
        raise ScaleprogError(
            f"--run-dir {str(run)!r}: neither control characters nor a backslash or a colon can be in the name of a "
            "run directory of a job, because Slurm and Python would take it for another"
        )


def check_free(recipe: "Recipe", run: Path, mine: str | None = None) -> None:
    """Raises CheckpointError if `run` belongs to another recipe, or to a job (but `mine`) or process that is alive."""
    from scaleprog.claim import check_recipe, is_alive, read_owner

    check_recipe(run, recipe)
    job = None
    if (last := JobFile.read(run)) is not None:
        with suppress(queue.NoAnswer):
            job = last.ask()
    if job is not None and not job.over:
        raise CheckpointError(
            f"{run} belongs to job {job.id}, which is {job.state}; `scaleprog cancel {run}` ends it, or use another "
            "--run-dir"
        )
    owner = read_owner(run)
    if owner is not None and (mine is None or owner.job != mine) and is_alive(owner, run):
        raise CheckpointError(f"{run} is in use by process {owner.pid} on {owner.host}; use another --run-dir")


def prepare(recipe: Path, run: Path, overrides: Sequence[str]) -> Path:
    """What a job started by train.sbatch does first; its restarts find what its first start laid down.

    At its first start what it finds is somebody else's, whatever job it names.
    """
    job = os.environ["SLURM_JOB_ID"]
    last = JobFile.read(run)
    restart = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    if restart and last is not None and last.job == job and (run / last.code).is_dir():
        verify(run / last.code)
        return run / last.code
    from scaleprog.recipe import Recipe

    check_name(run)
    loaded = Recipe.load(recipe, overrides)
    check_free(loaded, run, job)  # a job that was refused may have put its job.json in place of this one's
    code = take(loaded, run)
    JobFile(job, os.environ["SLURM_JOB_NAME"], str(code.relative_to(run))).write(run)
    return code


def _sources() -> dict[str, bytes]:
    """The text of every module, by its path below the checkout."""
    root = Path(launchers.__file__).parents[1]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


if __name__ == "__main__":
    try:
        print(prepare(Path(sys.argv[1]), Path(sys.argv[2]).absolute(), sys.argv[3:]))
    except ScaleprogError as mistake:
        print(f"scaleprog: {as_text(mistake, lines=True)}", file=sys.stderr)
        sys.exit(2)
