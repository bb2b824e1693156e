"""Sends a run's curves to a tracker, from its records: each point once, and none that a restart may take back.

Rank 0 starts one process for each tracker (`Senders`), so that no tracker can stop, slow down, or end the training. The
process reads metrics.jsonl. A tracker cannot take a point back, so a step is sent once a later checkpoint is there, to
which the next start would return at most. What has been sent is kept in `tracking/NAME.json`.
"""

import hashlib
import json
import math
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from scaleprog.errors import CheckpointError, InUse, ScaleprogError, Unavailable
from scaleprog.files.atomic import lock, open_regular, unlock, write_whole
from scaleprog.files.display import first_line, say, without_password
from scaleprog.ranks.stop import ignore_stops
from scaleprog.recipe import Recipe
from scaleprog.rundir.drawn import is_drawn, points, story
from scaleprog.rundir.folders import committed_step
from scaleprog.rundir.lease import check_folders, read_owner
from scaleprog.rundir.reading import MOST_LINE, read, read_object, still_told
from scaleprog.rundir.records import EVENT, EVENTS, METRICS, RESULTS, STRICT, Name
from scaleprog.rundir.state import decision_from_json
from scaleprog.rundir.trackers import TRACKERS, Point, Shown, Tracker

FOLDER = "tracking"
LOOK_SECONDS = 2.0  # between two looks at the records
MOST_PAUSE = 60.0  # seconds until the next attempt if a tracker does not answer
LAST_SECONDS = 15.0  # for a last attempt when the training ends
MOST_STEPS = 50  # that are sent at a time


@with_config(STRICT)
class Sent(TypedDict):
    """What a tracker has of a run: all points up to `step`. The rest is for `Tracker.open`."""

    id: Name
    step: int
    known: NotRequired[Name | None]
    unclosed: NotRequired[Name | None]
    finished: NotRequired[bool]
    """Whether the tracker knows that the run is finished."""
    where: NotRequired[Name]
    """A digest of what `Tracker.place` said when the run was first sent: a URL may hold a password."""


class Sender:
    """Sends one run to one tracker. Only one process at a time may have one, see `alone`."""

    def __init__(self, run: Path, name: str, log_every: int) -> None:
        """Raises ScaleprogError: what is in the run directory cannot be read."""
        self._run, self._log_every = run, log_every
        recipe = Recipe.of_run(run)
        self._unit = "GMACs" if recipe.search.times == "modelled" else "step ms"
        self._path = run / FOLDER / f"{name}.json"
        place: tuple[str, ...] = getattr(TRACKERS[name], "place", ())
        self._where = hashlib.sha256("\n".join(os.environ.get(each, "") for each in place).encode()).hexdigest()[:16]
        self._sent = read_object(self._path, Sent) or Sent(id=uuid.uuid4().hex[:16], step=-1)
        if self._sent.get("where", self._where) != self._where:
            raise ScaleprogError(
                f"{name} has this run elsewhere: {', '.join(place)} said something else when it was first sent; set "
                f"the same again, or delete {self._path} to send all of it here"
            )
        self._shown = Shown(run, self._sent["id"], run.resolve().name, recipe.settings())
        self._name = name
        self._tracker: Tracker | None = None
        self._step = self._sent["step"]  # up to here, points have been handed over
        self._text = ""
        self._told_size = -1
        self._file, self._offset = (0, 0), 0

    def send(self) -> None:
        """Sends everything that no restart can take back. Raises whatever the tracker raises, and OSError."""
        last = self._last_sure()
        if self._tracker is None and not self._has_news(last):
            return
        tracker = self._opened()
        for rows, end in _parts(self._new_rows(last), MOST_STEPS):
            tracker.scalars([point for row, point in zip(rows, _points(rows)) if is_drawn(row, self._log_every)])
            self._step, self._offset = rows[-1]["step"], end
            if tracker.keeps:
                self._keep(step=self._step)
        text = self._searches()
        if text != self._text:
            tracker.describe(text)
            self._text = text

    def close(self) -> None:
        """Returns once everything that was sent is safe. Raises whatever the tracker raises."""
        if self._tracker is not None:
            finished = self._finished()
            self._tracker.close(finished)
            self._keep(step=self._step, unclosed=None, finished=finished)
            self._tracker = None

    def _opened(self) -> Tracker:
        if self._tracker is None:
            if "known" not in self._sent:
                self._keep(step=self._step)  # the id, before a tracker sees it
            tracker = TRACKERS[self._name]()
            known, has = tracker.open(self._shown, self._sent.get("known"), self._sent.get("unclosed"))
            self._step = max(self._sent["step"], has)
            self._keep(step=self._sent["step"], known=known, unclosed=tracker.session, where=self._where)
            self._tracker = tracker
        return self._tracker

    def _keep(self, **changes: Any) -> None:
        self._sent = Sent(**{**self._sent, **changes})  # type: ignore[typeddict-item]
        self._path.parent.mkdir(exist_ok=True)
        write_whole(self._path, json.dumps(self._sent))

    def _finished(self) -> bool:
        return (self._run / RESULTS).exists()

    def _last_sure(self) -> float:
        """The last step that no restart can take back: the newest checkpoint's may get its accuracies again."""
        return math.inf if self._finished() else committed_step(self._run) - 1

    def _has_news(self, last: float) -> bool:
        """Whether there is a reason to open the tracker."""
        at_end = self._finished() and not self._sent.get("finished", False)
        return at_end or next(self._new_rows(last), None) is not None

    def _new_rows(self, last: float) -> Iterator[tuple[dict[str, Any], int]]:
        """The rows of metrics.jsonl up to step `last` that have not been handed over, each with its end in bytes."""
        with suppress(FileNotFoundError), open_regular(self._run / METRICS, "rb") as file:
            found = os.fstat(file.fileno())
            if self._file != (found.st_dev, found.st_ino):  # a start has written it again
                self._file, self._offset = (found.st_dev, found.st_ino), 0
            end = file.seek(self._offset)
            while (line := file.readline(MOST_LINE)).endswith(b"\n"):
                row, end = _row(line), end + len(line)
                if row is not None and row["step"] > last:
                    return
                if row is not None and row["step"] > self._step:
                    yield row, end

    def _searches(self) -> str:
        """What the searches so far have found, in Markdown."""
        with suppress(OSError):
            size = os.stat(self._run / EVENTS).st_size
            if size == self._told_size:
                return self._text
            told = still_told(read(self._run / EVENTS, EVENT).rows)
            self._told_size = size
            decisions = [decision_from_json(event) for event in told if event["event"] == "choice"]
            return "\n\n".join(f"## Stage {d.stage}\n\n{story(d, self._unit)}" for d in decisions)
        return self._text


@contextmanager
def alone(run: Path, name: str, seconds: float) -> Iterator[None]:
    """Inside, no other process sends the run to this tracker; waits up to `seconds` for one that does. Raises InUse."""
    folder = run / FOLDER
    check_folders(run)
    try:
        folder.mkdir(exist_ok=True)
        file = open_regular(folder / f".{name}.lock", "r+b", os.O_CREAT | os.O_NOFOLLOW, buffering=0)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    with file:
        try:
            lock(file, seconds, pause=0.2)
        except TimeoutError as error:
            raise InUse(f"{run} is being sent to {name} by another process; it sends everything") from error
        try:
            yield
        finally:
            unlock(file)


def send_now(run: Path, name: str, log_every: int) -> int:
    """Sends what is there to one tracker, and returns the step up to which it has everything.

    Raises:
        ScaleprogError: there is no such run, or another process sends it.
        Unavailable: the tracker does not answer.
    """
    with alone(run, name, seconds=1.0):
        sender = Sender(run, name, log_every)
        try:
            sender.send()
            sender.close()
        except ScaleprogError:
            raise
        except Exception as error:
            raise Unavailable(f"{name}: {_reason(error)}; nothing is lost: send {run} again later") from error
        return sender._step


# ---- the process of a tracker, and what rank 0 has of it


class Senders:
    """The processes that send a run to its trackers, one for each; to be closed once the records are."""

    def __init__(self, run: Path, names: tuple[str, ...], log_every: int, generation: int) -> None:
        """Starts them. They outlive a killed rank 0 for as long as it takes to send the rest, at most some seconds."""
        self._run = run
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        words = [sys.executable, "-m", __name__, str(run), str(generation), str(os.getpid()), str(log_every)]
        variables = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in dict.fromkeys(names):
            try:
                self._processes[name] = subprocess.Popen(
                    [*words, name], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=variables
                )
            except OSError as error:
                say(f"nothing is sent to {name} now, because its process cannot be started: {error}")

    def close(self) -> None:
        """Gives each process some seconds to send the rest, and says what remains. Never raises."""
        for process in self._processes.values():
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.write(b"\n")
                process.stdin.close()
        give_up = time.monotonic() + LAST_SECONDS
        for name, process in self._processes.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, give_up - time.monotonic()))
            if process.returncode != 0:
                process.kill()  # loses nothing: the position file says what is sent
                process.wait()
                say(f"{name} does not have all points of {self._run}; they are sent at the next start, or by "
                     f"`scaleprog track {self._run} {name}`")  # fmt: skip


def keep_sending(run: Path, name: str, log_every: int, generation: int, last: Callable[[float], bool]) -> bool:
    """Sends a run until its training ends, and makes a last attempt then.

    Returns whether the tracker has everything that no restart can take back.

    Args:
        run: the run directory.
        name: the tracker.
        log_every: steps between two points.
        generation: the start that trains; a later one has a sender of its own.
        last: waits so many seconds, and returns whether the training has ended meanwhile.
    """
    pause, over, told = LOOK_SECONDS, False, False
    with alone(run, name, seconds=math.inf):
        sender = Sender(run, name, log_every)
        while True:
            try:
                sender.send()
                if over:
                    sender.close()
                    return True
                pause, told = LOOK_SECONDS, False
            except Exception as error:
                if not told:
                    say(f"{name}: {_reason(error)}; training continues, and what is missing is sent later")
                pause, told = min(MOST_PAUSE, 2 * pause), True
            if over:
                return False
            over = last(pause)
            with suppress(CheckpointError, Unavailable):  # who owns the run is asked again
                owner = read_owner(run)
                if owner is not None and owner.generation != generation:
                    return False


def _points(rows: list[dict[str, Any]]) -> Iterator[Point]:
    """The points of rows; an evaluation, which has no time of its own, has that of the row before it."""
    moment = next((row["time"] for row in rows if "time" in row), time.time())
    for row in rows:
        moment = row.get("time", moment)
        yield Point(row["step"], moment, points(row))


def _parts(rows: Iterator[tuple[dict[str, Any], int]], most: int) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The rows in parts of at most so many steps, each with its end in bytes; all rows of a step are in one part."""
    steps = (list(same) for _, same in groupby(rows, key=lambda found: found[0]["step"]))
    while part := [found for same in islice(steps, most) for found in same]:
        yield [row for row, _ in part], part[-1][1]


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None if the line is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(without_password(str(error)))}"


def main(words: list[str]) -> int:
    """What the process of a tracker does; `words` as in `Senders`."""
    ignore_stops()  # they are for rank 0, which then ends this process
    run, generation, parent, log_every, name = words

    def over(seconds: float) -> bool:
        give_up = time.monotonic() + seconds
        while (left := give_up - time.monotonic()) > 0:
            if select.select([sys.stdin], [], [], min(left, LOOK_SECONDS))[0] or os.getppid() != int(parent):
                return True
        return False

    try:
        return 0 if keep_sending(Path(run), name, int(log_every), int(generation), over) else 1
    except ScaleprogError as error:
        say(f"{name}: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
