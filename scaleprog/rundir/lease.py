"""Who may write into a run directory: only the latest start.

After a network failure, Slurm may restart a job while its old processes keep running for minutes. So each start takes
the directory over with a generation, a number higher than the last one. An older start that wants to commit or delete
a checkpoint finds the higher number and must exit.

A start is a process, not a job: a shell inside an allocation, or one that has outlived it, can start several. A process
takes over from an earlier attempt of its own job, and from a start that has ended. Two living starts on one directory
are a mistake, and the second one fails.
"""

import json
import os
import re
import signal
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from scaleprog.errors import CheckpointError, ScaleprogError, Superseded, Unavailable
from scaleprog.files.atomic import lock, open_regular, read_text, unlock, write_whole
from scaleprog.files.plain_yaml import RECIPE
from scaleprog.recipe import Recipe
from scaleprog.rundir import slurm_queue
from scaleprog.rundir.folders import committed_step
from scaleprog.rundir.owner import BATCH, FITS, OWNER, Owner
from scaleprog.rundir.reading import kind_of

if TYPE_CHECKING:  # a caller that only asks who owns a run should not wait for torch
    from scaleprog.ranks.coordinator import Coordinator

BEAT_SECONDS = 20.0  # between two heartbeats, whatever the rank is doing
SILENT_SECONDS = 120.0  # without a heartbeat for this long, an unreachable owner on another host counts as gone
LOCK_SECONDS = 90.0  # longer than the holder of the lock waits for Slurm
SHARED_SECONDS = 60.0  # a network file system may take this long to show a new file on other nodes
OWNER_BYTES = 2**16


@dataclass(frozen=True)
class Lease:
    """A start's right to write into a run directory."""

    folder: Path
    generation: int
    nonce: str

    @contextmanager
    def fence(self) -> Iterator[None]:
        """Inside, no other start can take the directory over. Raises Superseded if one already has."""
        with _lock(self.folder):
            self._check()
            yield

    def beat(self) -> None:
        """Sends a heartbeat. Raises Superseded if another start has taken over."""
        with suppress(CheckpointError, Unavailable, OSError):  # what cannot be read now, commits check again
            self._check()
            os.utime(self.folder / OWNER)

    def _check(self) -> None:
        owner = read_owner(self.folder)
        if owner is None or owner.generation != self.generation:
            by = "an unknown start" if owner is None else f"generation {owner.generation} ({owner})"
            raise Superseded(f"{self.folder}: generation {self.generation} was superseded by {by}; nothing was written")


def take_lease(folder: Path, recipe: Recipe, coordinator: "Coordinator") -> Lease:
    """Makes `folder` the run directory of `recipe`, or takes over the one that it already is. Every rank calls this.

    Raises:
        CheckpointError: on every rank: it belongs to another recipe, another start is alive in it, or some ranks
            cannot see what rank 0 writes there.
        Superseded: a later restart of the same job has taken it over.
        Unavailable: it cannot be read or written now, or another process holds its lock for too long.
    """
    generation, nonce = coordinator.on_rank_0("run directory", lambda: _take_over(folder, recipe))
    give_up = time.monotonic() + SHARED_SECONDS
    while not (seen := _sees(folder, nonce)) and time.monotonic() < give_up:
        time.sleep(0.1)
    ranks = list(enumerate(coordinator.gather([seen, socket.gethostname()])))
    blind = [f"rank {rank} on {host}" for rank, (saw, host) in ranks if not saw]
    if blind:
        raise CheckpointError(
            f"{folder}: {', '.join(blind)} cannot see what rank 0 on {ranks[0][1][1]} wrote there; "
            "use a --run-dir on a file system that all nodes share"
        )
    lease = Lease(folder, generation, nonce)
    if coordinator.rank == 0:
        threading.Thread(target=_keep_beating, args=(weakref.ref(lease),), name="heartbeat", daemon=True).start()
    return lease


def _keep_beating(held: "weakref.ref[Lease]") -> None:
    """Sends heartbeats while someone holds the lease; runs in a thread, because a step may take long."""
    while (lease := held()) is not None:
        try:
            lease.beat()
        except Superseded:
            return
        del lease
        time.sleep(BEAT_SECONDS)


def _take_over(folder: Path, recipe: Recipe) -> tuple[int, str]:
    """Writes the next generation and the recipe into `folder`. Returns generation and nonce."""
    with _lock(folder):
        other = read_owner(folder)
        me = _this_process(1 if other is None else other.generation + 1)
        own_job = other is not None and me.job is not None and other.job == me.job
        if other is None or (own_job and other.attempt < me.attempt):
            pass  # Slurm has ended the earlier attempt, or cannot reach it
        elif own_job and other.attempt > me.attempt:
            raise Superseded(f"{folder}: {other} has already taken over from restart {me.restart}")
        elif runs(other, folder) if own_job else is_alive(other, folder):
            raise CheckpointError(f"{folder} is in use by {other}; wait for it, cancel it, or use another --run-dir")
        if not FITS["generation"](me.generation):
            raise CheckpointError(f"{folder / OWNER}: the generation is at its maximum; delete the file")
        check_recipe(folder, recipe)
        check_folders(folder)
        try:
            if not (folder / RECIPE).exists() or _names_other_weights(recipe, Recipe.of_run(folder)):
                write_whole(folder / RECIPE, recipe.dump())  # nothing has been trained yet, see `check_recipe`
            write_whole(folder / OWNER, json.dumps(asdict(me)))
            os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # never closed: `ask_to_stop` looks for it
        except OSError as error:
            raise Unavailable(f"{folder}: cannot write there: {error}") from error
    return me.generation, me.nonce


@contextmanager
def held_idle(folder: Path) -> Iterator[None]:
    """Inside, no start can take the run directory over. Raises CheckpointError if one trains there."""
    with _lock(folder):
        owner = read_owner(folder)
        if owner is not None and is_alive(owner, folder):
            raise CheckpointError(f"{folder} is in use by {owner}; wait for it, or cancel it")
        yield


def job_of(variables: Mapping[str, str] = os.environ) -> tuple[str | None, int, str | None]:
    """The job, its restart count, and the step of a process that Slurm started; (None, 0, None) for any other.

    A shell of `salloc` has SLURM_JOB_ID, but only the processes that Slurm starts have SLURM_PROCID or a restart count.
    """
    job, restart = slurm_queue.own_job(variables), variables.get("SLURM_RESTART_COUNT", "")
    if job is None or not ("SLURM_PROCID" in variables or restart):
        return None, 0, None
    step = variables.get("SLURM_STEP_ID")
    return (
        job,
        slurm_queue.own_start(variables)[0],
        step if step and FITS["step"](step) else BATCH,
    )


def _this_process(generation: int) -> Owner:
    from scaleprog.ranks.rendezvous import launcher  # needs torch

    (job, restart, step), parent = job_of(), launcher()
    return Owner(
        generation,
        nonce=uuid.uuid4().hex,
        job=job,
        restart=restart,
        step=step,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        repeat=0 if job is None else slurm_queue.own_start()[1],
        launcher=parent,
        launcher_started=None if parent is None else _started(parent),
    )


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises CheckpointError if `folder` is the run directory of another recipe, or began with other weights."""
    if not (folder / RECIPE).exists():
        return
    theirs = Recipe.of_run(folder)
    if differences := recipe.differences(theirs):
        listing = "\n".join(f"  {line}" for line in differences)
        raise CheckpointError(
            f"{folder} is the run directory of another recipe:\n{listing}\nuse another --run-dir, or that recipe"
        )
    if committed_step(folder) and _names_other_weights(recipe, theirs):
        raise CheckpointError(
            f"{folder} began with other weights: init is {recipe.init.told} here, {theirs.init.told} there; use "
            "another --run-dir, or resume without init"
        )


def _names_other_weights(recipe: Recipe, theirs: Recipe) -> bool:
    """Whether a recipe names other weights to begin with than that of a run; one that names none resumes any run."""
    return recipe.init.source is not None and recipe.init != theirs.init


def check_folders(folder: Path) -> None:
    """Raises CheckpointError if a folder in a run directory is a symlink, because its files would lie elsewhere."""
    own = (folder / name for name in ("checkpoints", "tensorboard", "tracking", "wandb", "profiles"))
    for path in (*own, *folder.glob("rank_*")):
        if path.is_symlink():
            raise CheckpointError(
                f"{path}: a symbolic link; a run directory needs folders of its own. To use another disk, link the "
                "whole run directory, or use another --run-dir"
            )


def read_owner(folder: Path) -> Owner | None:
    """The latest start in a run directory; None if there was none. Raises CheckpointError or Unavailable."""
    try:
        return Owner.of(json.loads(read_text(folder / OWNER, OWNER_BYTES)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        kind = kind_of(error)
        remedy = "" if kind is Unavailable else "; delete it if nothing trains there"
        raise kind(f"{folder / OWNER}: not readable ({error}){remedy}") from error


def is_alive(owner: Owner, folder: Path) -> bool:
    """Whether that start still runs, or belongs to a batch job that is not over and may start it again."""
    if runs(owner, folder):
        return True
    if owner.job is not None:
        with suppress(slurm_queue.NoAnswer):
            job = slurm_queue.find(owner.job)
            return job is not None and not job.over and job.batch
    return False


def runs(owner: Owner, folder: Path) -> bool:
    """Whether that start still runs: here, according to its process; elsewhere, to Slurm and to its heartbeat."""
    if owner.host != socket.gethostname() and owner.job is not None:
        with suppress(slurm_queue.NoAnswer):
            job = slurm_queue.find(owner.job)
            if job is None or job.over or job.restarts > owner.restart:
                return False
            if owner.step is not None and owner.step != BATCH and slurm_queue.step_is_over(owner.job, owner.step):
                return False
    if owner.host == socket.gethostname():
        return owner.pid != os.getpid() and owner.started is not None and _started(owner.pid) == owner.started
    try:
        silent = time.time() - (folder / OWNER).stat().st_mtime
    except OSError:
        return False
    return abs(silent) < SILENT_SECONDS  # a heartbeat in the future comes from a wrong clock or is forged


def between_starts(owner: Owner | None) -> str:
    """That a start's launcher lives on this host, and may start its ranks again, as a sentence; empty if it does not.

    For a start whose process has ended.
    """
    if owner is None or owner.launcher is None or owner.launcher_started is None:
        return ""
    if owner.host != socket.gethostname() or _started(owner.launcher) != owner.launcher_started:
        return ""
    return f"its ranks have ended; their launcher, process {owner.launcher}, still runs"


def ask_to_stop(owner: Owner, folder: Path) -> None:
    """Sends SIGTERM to the process on this host that trains in `folder`.

    Raises ScaleprogError and signals nothing unless the process that `owner` names is provably the right one: it
    started when `owner` says, belongs to this user, has scaleprog's command line, and has this folder open.
    """
    named = f"{folder / OWNER} names process {owner.pid}"
    try:
        handle = os.pidfd_open(owner.pid)  # unlike its number, the handle cannot come to mean another process
    except OSError as error:
        raise ScaleprogError(f"{named}, which cannot be signaled: {error.strerror}") from error
    try:
        if doubt := _doubt(owner, folder):
            raise ScaleprogError(f"{named}, {doubt}; nothing was signaled")
        signal.pidfd_send_signal(handle, signal.SIGTERM)
    except OSError as error:
        raise ScaleprogError(f"{named}, which cannot be signaled: {error.strerror}") from error
    finally:
        os.close(handle)


def _doubt(owner: Owner, folder: Path) -> str:
    """Why the process that `owner` names is not the one that trains in `folder`; empty if it is. May raise OSError."""
    process = Path(f"/proc/{owner.pid}")
    if owner.started is None or _started(owner.pid) != owner.started:
        return "which was started at another time"
    if os.geteuid() not in (0, process.stat().st_uid):
        return "which belongs to another user"
    words = (process / "cmdline").read_bytes().split(b"\0")
    known = {b"--multiprocessing-fork", b"scaleprog.launchers.task"} & set(words)
    if not known and b"scaleprog" not in [os.path.basename(word) for word in words]:
        return "whose command line is not scaleprog's"
    here = folder.stat()
    for link in (process / "fd").iterdir():
        with suppress(OSError):  # closed in the meantime
            if os.path.samestat(link.stat(), here):
                return ""
    return "which does not have this run directory open"


def _started(pid: int) -> str | None:
    """When a process on this host started, in kernel clock ticks; None if it does not exist or will run no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pending = re.findall(r"^(?:Sig|Shd)Pnd:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    kill = 1 << (signal.SIGKILL - 1)
    killed = any(int(mask, 16) & kill for mask in pending)  # and waits in the kernel, such as for a disk
    return None if killed or fields[0] == "Z" else fields[19]


def _sees(folder: Path, nonce: str) -> bool:
    try:
        owner = read_owner(folder)
    except (CheckpointError, Unavailable):
        return False
    return owner is not None and owner.nonce == nonce


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes out, if the file system supports locks. Raises CheckpointError or Unavailable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # whatever lies there must not be followed, block this process or be truncated
        file = open_regular(folder / ".lock", "r+b", os.O_CREAT | os.O_NOFOLLOW, buffering=0)
    except OSError as error:
        raise kind_of(error)(f"{folder}: cannot be a run directory: {error}") from error
    with file:
        try:
            lock(file, LOCK_SECONDS, pause=0.05)  # on a file system without locks the generation number alone decides
        except TimeoutError as error:
            raise Unavailable(f"{folder}: another process holds its lock") from error
        try:
            yield
        finally:
            unlock(file)
