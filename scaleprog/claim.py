"""Who may write into a run directory: the latest start, and nobody else.

After a network cut Slurm starts a job anew while its old processes may run on, somewhere, for minutes. Each start takes
the directory over with a number higher than the last, its generation; an older one that comes to commit or to delete
a checkpoint finds the higher number and must leave. Two jobs on one directory are a mistake; the second is told so.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaleprog import queue
from scaleprog.errors import CheckpointError, Superseded, Unavailable
from scaleprog.files import lock, unlock, write_whole
from scaleprog.recipe import Recipe
from scaleprog.sharding.coordinator import Coordinator

OWNER = "owner.json"
SILENT_SECONDS = 120.0  # an owner on another host that cannot be asked about is gone after so long without a heartbeat
LOCK_SECONDS = 90.0  # longer than its holder waits for Slurm's answer
SHARED_SECONDS = 60.0  # a network file system shows a new file on other nodes within so long


@dataclass(frozen=True)
class Claim:
    """A start's hold on a run directory."""

    folder: Path
    generation: int
    nonce: str

    @contextmanager
    def fence(self) -> Iterator[None]:
        """Nobody can take the directory over inside. Raises Superseded if somebody has."""
        with _lock(self.folder):
            self._check()
            yield

    def beat(self) -> None:
        """Says that this start is alive. Raises Superseded if another has taken over."""
        with suppress(CheckpointError, OSError):  # a file system that does not answer now; commits look again
            self._check()
            os.utime(self.folder / OWNER)

    def _check(self) -> None:
        owner = read_owner(self.folder)
        if owner is None or owner["generation"] != self.generation:
            by = "nobody" if owner is None else f"generation {owner['generation']} ({_who(owner)})"
            raise Superseded(f"{self.folder}: generation {self.generation} was superseded by {by}; nothing was written")


def claim_run(folder: Path, recipe: Recipe, coordinator: Coordinator) -> Claim:
    """Makes `folder` the run directory of `recipe`, or goes on with it if it is that; every rank calls this.

    Raises CheckpointError on every rank: it is another recipe's, another start is alive in it, or some ranks cannot see
    what rank 0 writes there.
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
    return Claim(folder, generation, nonce)


def _take_over(folder: Path, recipe: Recipe) -> tuple[int, str]:
    """Writes the next generation down, and the recipe; returns generation and nonce."""
    me = {
        "nonce": uuid.uuid4().hex,
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }
    with _lock(folder):
        other = read_owner(folder)
        if other is not None and me["job"] is not None and other["job"] == me["job"]:
            if other["restart"] > me["restart"]:
                raise Superseded(f"{folder}: restart {me['restart']} of this job comes after {_who(other)}")
        elif other is not None and is_alive(other, folder):
            raise CheckpointError(
                f"{folder} is in use by {_who(other)}; wait for it, cancel it, or use another --run-dir"
            )
        check_recipe(folder, recipe)
        generation = 1 if other is None else other["generation"] + 1
        try:
            if not (folder / "recipe.yaml").exists():
                write_whole(folder / "recipe.yaml", recipe.dump())
            write_whole(folder / OWNER, json.dumps({"generation": generation, **me}))
        except OSError as error:
            raise Unavailable(f"{folder}: cannot be written to: {error}") from error
    return generation, str(me["nonce"])


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises CheckpointError if `folder` is the run directory of another recipe."""
    path = folder / "recipe.yaml"
    if path.exists() and (differences := recipe.differences(Recipe.of_run(folder))):
        listing = "\n".join(f"  {line}" for line in differences)
        raise CheckpointError(
            f"{folder} is the run directory of another recipe:\n{listing}\nuse another --run-dir, or this recipe"
        )


def read_owner(folder: Path) -> dict[str, Any] | None:
    """The latest start's `owner.json`; None where there was none."""
    try:
        return json.loads((folder / OWNER).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / OWNER}: not readable ({error}); delete it if nothing trains there") from error


def is_alive(owner: dict[str, Any], folder: Path) -> bool:
    """Whether that start still runs, as far as can be told: by Slurm, by its process, or by its heartbeat."""
    if owner["job"] is not None:
        with suppress(queue.NoAnswer):
            job = queue.find(owner["job"])
            return job is not None and not job.over
    if owner["host"] == socket.gethostname():
        return owner["pid"] != os.getpid() and _started(owner["pid"]) == owner["started"]
    return time.time() - (folder / OWNER).stat().st_mtime < SILENT_SECONDS


def _started(pid: int) -> str | None:
    """When a process of this host was started, in kernel ticks; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _sees(folder: Path, nonce: str) -> bool:
    try:
        owner = read_owner(folder)
    except CheckpointError:
        return False
    return owner is not None and owner["nonce"] == nonce


def _who(owner: dict[str, Any]) -> str:
    job = "" if owner["job"] is None else f"job {owner['job']} restart {owner['restart']}, "
    return f"{job}process {owner['pid']} on {owner['host']}"


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Excludes other holders, where the file system knows locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be a run directory: {error}") from error
    with file:
        try:
            lock(file, LOCK_SECONDS, pause=0.05)  # on a file system without locks the generation number alone decides
        except TimeoutError as error:
            raise Unavailable(f"{folder}: another process holds its lock") from error
        try:
            yield
        finally:
            unlock(file)
