"""How a test and the tasks of its job agree on moments: by files in a folder that both see.

A moment is ("step", N), after step N and all that is due then, or ("save", N), when the checkpoint of step N is written
but not yet visible; a held task waits there until the test releases it. So faults strike where a test says, and not
when a clock does.
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import scaleprog
from scaleprog.launchers.attempt import Attempt

POLL_SECONDS = 0.05


class Control:
    """The folder. Starts have the names of their `Attempt`s; a hold is for one start, or for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ---- what tests do

    def hold(self, kind: str, step: int | None = None, start: str | None = None) -> None:
        """Holds tasks at a moment from now on, at that of every step if `step` is None."""
        self._file("hold", kind, step).write_text(start or "")

    def release(self, kind: str, step: int | None = None) -> None:
        """Takes a hold back; whoever waits there goes on."""
        self._file("hold", kind, step).unlink(missing_ok=True)

    def slow_down(self, seconds: float) -> None:
        """Makes every step take so much longer."""
        (self.folder / "slow").write_text(str(seconds))

    def held(self, kind: str, step: int, start: str) -> dict[int, dict[str, Any]]:
        """Who has come to a moment and been held, by rank: `code`, where its scaleprog is from."""
        marks = self.folder.glob(f"held-{kind}-{step}-{start}-*.json")
        return {int(mark.stem.rpartition("-")[2]): json.loads(mark.read_text()) for mark in marks}

    # ---- what tasks do

    def reached(self, kind: str, step: int) -> None:
        """Says that this task has come to a moment if it is to be held there; returns when it may go on."""
        start = str(Attempt.current())
        told = False
        while any(self._holds(path, start) for path in (self._file("hold", kind, step), self._file("hold", kind))):
            if not told:
                told = True
                mark = self.folder / f"held-{kind}-{step}-{start}-{os.environ['SLURM_PROCID']}.json"
                temporary = mark.with_suffix(".writing")
                temporary.write_text(json.dumps({"code": scaleprog.__file__}))
                temporary.rename(mark)
            time.sleep(POLL_SECONDS)

    def wait_a_little(self) -> None:
        """What makes a step slow."""
        if (slow := _read(self.folder / "slow")) is not None:
            time.sleep(float(slow or 0))

    def _holds(self, path: Path, start: str) -> bool:
        return (content := _read(path)) is not None and content in ("", start)

    def _file(self, what: str, kind: str, step: int | None = None) -> Path:
        return self.folder / (f"{what}-{kind}" if step is None else f"{what}-{kind}-{step}")


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def install() -> None:
    """Lets the folder CONTROL hold this task; a hook, called before training starts."""
    import scaleprog.rundir.checkpoint
    import scaleprog.training.loop

    control = Control(Path(os.environ["CONTROL"]))
    after_step, write_tensors = scaleprog.training.loop.after_step, scaleprog.rundir.checkpoint.write_tensors

    def held_step(run: Any, *arguments: Any) -> None:
        after_step(run, *arguments)
        control.wait_a_little()
        control.reached("step", run.state.step)

    def held_write(folder: Path, *arguments: Any) -> Any:
        written = write_tensors(folder, *arguments)
        if (name := re.match(r"\.step-(\d+)", folder.name)) is not None:
            control.reached("save", int(name[1]))
        return written

    scaleprog.training.loop.after_step = held_step
    scaleprog.rundir.checkpoint.write_tensors = held_write
