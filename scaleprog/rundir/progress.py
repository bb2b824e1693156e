"""Progress of a run on rank 0's terminal or in its log."""

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scaleprog.files.display import as_text

PLAIN_EVERY = 15.0  # seconds between two progress lines if the output is not a terminal


class ProgressLine:
    """Progress on rank 0: a live line if the output is a terminal, else a plain line every few seconds."""

    def __init__(self, total: int, step: int, enabled: bool, text: str = "starting") -> None:
        console = Console(file=sys.stderr)
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._enabled, self._terminal = enabled, console.is_terminal
        self._task = self._live.add_task(text, total=total, completed=step)
        self._total, self._told = total, 0.0
        if enabled and self._terminal:
            self._live.start()

    def update(self, row: Mapping[str, Any], total: int) -> None:
        """Shows one resolved step. `total`, the steps of the run, may change from call to call."""
        text = (
            f"stage {row['stage']} {row['phase']} {row['resolution']} px x {row['depth']} "
            f"loss {row['loss']:.3f} {row['images_per_second']:.0f} img/s"
        )
        if self._enabled and self._terminal:
            self._live.update(self._task, completed=row["step"], total=total, description=text)
        elif self._enabled and time.monotonic() - self._told > PLAIN_EVERY:
            self._told = time.monotonic()
            self.say(f"step {row['step']}/{total} {text}")

    def advance(self) -> None:
        """Shows one more part as done, where the parts are all alike; for a terminal only."""
        self._live.advance(self._task)

    def say(self, text: str) -> None:
        """Prints a separate line on rank 0; does nothing if the disk of the log is full."""
        if self._enabled:
            with suppress(OSError):
                told = as_text(text, lines=True)
                self._live.console.print(told, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the live line."""
        if self._enabled and self._terminal:
            self._live.stop()
