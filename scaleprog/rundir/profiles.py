"""Profiles of a running run: the file by which one is asked for, and where its parts lie. No torch.

`profiles/request.json` asks; the run moves it into `profiles/step_N/` when it agrees to profile from step N on. There
each rank writes `rank_R.json.gz`, a Chrome trace, and with `memory` also `memory_rank_R.pickle`; `rank_R.error` says
why it could not.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict

from scaleprog.errors import CheckpointError, ScaleprogError, Unavailable
from scaleprog.files.atomic import read_text, write_whole
from scaleprog.files.display import say
from scaleprog.rundir.reading import read_object
from scaleprog.rundir.records import STRICT

PROFILES, REQUEST = "profiles", "request.json"
PARTS = ("rank_*.json.gz", "memory_rank_*.pickle", "rank_*.error")  # of a profile, see below
LOOK_SECONDS = 1.0  # between two looks for a request
MOST_STEPS = 1000
Rank = Annotated[int, Field(ge=0, lt=2**16)]


@with_config(STRICT)
class Request(TypedDict):
    """What someone asks of a running run."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    ranks: Annotated[list[Rank], Field(min_length=1, max_length=2**16)]
    memory: bool


class Inbox:
    """Where rank 0 of a run finds requests; looks into the folder once a second at most."""

    def __init__(self, run: Path) -> None:
        self._path = run / PROFILES / REQUEST
        self._looked, self._told = 0.0, ""

    def holds_one(self) -> bool:
        """Whether there is a request."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return False
        self._looked = time.monotonic()
        return self._path.exists()

    def take(self, step: int) -> Request | None:
        """The request, which is now that of a profile from `step` on; None if there is none that can be taken.

        Says why, if there is one, and deletes it. What an earlier profile of the same first step has left is deleted.
        """
        try:
            request = read_object(self._path, Request)
            if request is not None:
                folder = folder_of(self._path.parents[1], step)
                folder.mkdir(exist_ok=True)
                for path in [path for form in PARTS for path in folder.glob(form)]:
                    path.unlink()
                os.replace(self._path, folder / REQUEST)
            return request
        except (ScaleprogError, OSError) as error:
            if (told := f"the request for a profile could not be taken: {error}") != self._told:
                self._told = told
                say(told)
            with suppress(OSError):
                self._path.unlink()
            return None


def folder_of(run: Path, step: int) -> Path:
    """Where the parts of a profile lie whose first step is `step`."""
    return run / PROFILES / f"step_{step}"


def ask(run: Path, steps: int, ranks: list[int], memory: bool) -> Request:
    """Asks a run for a profile. Raises ScaleprogError if it has been asked for one that has not begun."""
    request = Request(id=uuid.uuid4().hex[:16], steps=steps, ranks=ranks, memory=memory)
    path = run / PROFILES / REQUEST
    if path.exists():
        raise ScaleprogError(f"{path}: another profile has been asked for and has not begun; wait, or delete the file")
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(request))
    except OSError as error:
        raise Unavailable(f"{path}: cannot be written: {error}") from error
    return request


def waits(run: Path, request: Request) -> bool:
    """Whether a request is still there, so that no run has taken it; true also if that cannot be read now."""
    try:
        found = read_object(run / PROFILES / REQUEST, Request)
    except Unavailable:
        return True
    except CheckpointError:
        return False
    return found is not None and found["id"] == request["id"]


def withdraw(run: Path, request: Request) -> None:
    """Takes a request back that no run has taken."""
    path = run / PROFILES / REQUEST
    with suppress(ScaleprogError, OSError):
        if (found := read_object(path, Request)) is not None and found["id"] == request["id"]:
            path.unlink()


def answer(run: Path, request: Request) -> dict[int, Path] | None:
    """The file of each rank that has one so far; None until a run has agreed to profile.

    Raises ScaleprogError if a rank could not write one.
    """
    for folder in _profiles(run):
        with suppress(CheckpointError, Unavailable):
            found = read_object(folder / REQUEST, Request)
            if found is not None and found["id"] == request["id"]:
                return _parts(folder, request)
    return None


def _profiles(run: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in (run / PROFILES).iterdir() if re.fullmatch("step_[0-9]{1,15}", path.name))


def _parts(folder: Path, request: Request) -> dict[int, Path]:
    for rank in request["ranks"]:
        with suppress(OSError, UnicodeDecodeError):
            told = read_text(folder / error_name(rank))
            raise ScaleprogError(f"rank {rank} could not be profiled: {told}")
    paths = {rank: folder / trace_name(rank) for rank in request["ranks"]}
    return {rank: path for rank, path in paths.items() if path.exists()}


def trace_name(rank: int) -> str:
    return f"rank_{rank}.json.gz"


def memory_name(rank: int) -> str:
    return f"memory_rank_{rank}.pickle"


def error_name(rank: int) -> str:
    return f"rank_{rank}.error"
