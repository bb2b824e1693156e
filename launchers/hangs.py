"""Ends ranks that hang, and says which ones did not come and where they stand.

A rank shows its launcher where it stands, in memory that both share, and ends itself when it hangs
(`ranks/patience.py`). The launcher of its node reads that memory. If a rank no longer changes it, because the rank is
stopped or waits in the kernel, the launcher writes down what the kernel knows, and kills the rank.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from scaleprog.files.display import counted
from scaleprog.ranks import processes
from scaleprog.ranks.patience import (
    ASK_SECONDS,
    FOLDER,
    LINGER_SECONDS,
    LOOK_SECONDS,
    STACKS,
    WRITE_SECONDS,
    Pulse,
    Stand,
    ask_stacks,
    read_all,
    within,
    write_stacks,
)
from scaleprog.rundir.appending import Lines
from scaleprog.rundir.records import EVENTS

SETTLE_SECONDS = WRITE_SECONDS + LINGER_SECONDS
"""How long after the first hung rank the launcher waits for the other ranks to say where they stand."""
MOST_NAMED = 8


class Guard:
    """Watches the ranks of one node.

    Args:
        folder: the run directory.
        pulses: of the ranks.
    """

    def __init__(self, folder: Path, pulses: Sequence[Pulse]) -> None:
        self._folder, self._pulses = folder, pulses
        self._heard: dict[int, tuple[Stand, float]] = {}  # rank -> its last word, seconds since its beats changed
        self._hung: dict[int, Stand] = {}
        self._looked = self._noticed = time.monotonic()

    @property
    def has_noticed(self) -> bool:
        """Whether a rank hangs."""
        return bool(self._hung)

    def look(self, last: bool = False) -> list[Stand] | None:
        """Where the hung ranks stand; None while there are none, or while others may still say so.

        `last`: no other will.
        """
        now = time.monotonic()
        elapsed, self._looked = min(now - self._looked, 2 * LOOK_SECONDS), now
        for pulse in self._pulses:
            stand, known = pulse.read(), self._hung.get(pulse.rank)
            if stand is None or (known is not None and known.state):
                continue
            before, silent = self._heard.get(pulse.rank, (None, 0.0))
            silent = silent + elapsed if before is not None and stand.beats == before.beats else 0.0
            self._heard[pulse.rank] = stand, silent
            if not stand.hung and silent > stand.patience + 2 * LOOK_SECONDS and processes.lives(stand.pid):
                stand = self._ask_kernel(replace(stand, hung=True, seconds=round(stand.seconds + silent, 1)))
            if stand.hung:
                self._noticed = self._noticed if self._hung else now
                self._hung[pulse.rank] = stand
        complete = len(self._hung) == len(self._pulses) and all(s.where or s.state for s in self._hung.values())
        awaited = not last and not complete and now - self._noticed < SETTLE_SECONDS
        if not self._hung or awaited:
            return None
        return [self._hung[rank] for rank in sorted(self._hung)]

    def conclude(self, stands: Sequence[Stand]) -> "Hang":
        """What to conclude from where the ranks stand; writes the event."""
        hang = Hang.of(stands, self._folder)
        hang.record(self._folder)
        return hang

    def _ask_kernel(self, stand: Stand) -> Stand:
        """Writes down what the kernel knows about a rank that cannot say where it stands."""
        stand = replace(stand, state=processes.state_of(stand.pid))
        within(WRITE_SECONDS, lambda: self._write(stand))  # to ask may hang, too
        return stand

    def _write(self, stand: Stand) -> None:
        text = f"{stand} does not answer: state {stand.state}\n\n{processes.describe(stand.pid)}\n"
        if stand.state[0] not in "TtD" and processes.handles(stand.pid, STACKS):
            with suppress(OSError):
                memory = os.open(f"/proc/{stand.pid}/fd/{stand.stacks}", os.O_RDONLY)
                ask_stacks(stand.pid, memory, time.monotonic() + ASK_SECONDS)
                text += f"\n{read_all(memory)}"
                os.close(memory)
        text += "".join(f"\n{processes.describe(child)}\n" for child in processes.children_of(stand.pid))
        write_stacks(self._folder, stand.generation, stand.rank, text)


@dataclass(frozen=True)
class Hang:
    """A hang of a run.

    Args:
        culprits: the ranks that did not come, as far as known.
        generation: number of the start that hung.
        step: the training step in which it hung.
        doing: what the culprits did, or else everyone, in words.
        message: all that in a sentence, with where the others stand.
    """

    culprits: tuple[int, ...]
    generation: int
    step: int
    doing: str
    message: str

    @classmethod
    def of(cls, stands: Sequence[Stand], folder: Path) -> "Hang":
        """What to conclude from where the hung ranks of a run stand; at least one."""
        culprits = _culprits(stands)
        waiting = [stand for stand in stands if stand not in culprits]
        first, step = (culprits or waiting)[0], max(stand.step for stand in stands)
        told = [said(stand) for stand in culprits[:MOST_NAMED]]
        told += [f"{len(culprits) - MOST_NAMED} more ranks did not come"] if len(culprits) > MOST_NAMED else []
        if waiting:
            hosts = sorted({stand.host for stand in waiting})
            where = f" in {waiting[0].where}" if waiting[0].where else ""
            told.append(
                f"{_ranks(waiting)} waited for the others in step {waiting[0].step} ({waiting[0].doing}){where}"
            )
            if not culprits and len(hosts) > 1:
                told.append(f"no rank stands apart; is the network between {', '.join(hosts[:MOST_NAMED])} whole?")
            elif not culprits:
                told.append("no rank stands apart")
        message = (
            f"hung for {first.seconds:.0f} s in step {step}: {'; '.join(told)}. Stacks: {folder / FOLDER}. If "
            f"that may take so long, raise train.patience (now {first.patience / 60:g} min)"
        )
        return cls(tuple(stand.rank for stand in culprits), first.generation, step, first.doing, message)

    def record(self, folder: Path) -> None:
        """Writes the event `hang`, unless the file system does not answer."""
        row = {
            "time": time.time(), "event": "hang", "generation": self.generation, "step": self.step,
            "culprits": list(self.culprits), "doing": self.doing, "message": self.message,
        }  # fmt: skip

        def write() -> None:
            lines = Lines(folder / EVENTS)
            lines.write(row)
            lines.close()

        within(WRITE_SECONDS, write)


def _culprits(stands: Sequence[Stand]) -> list[Stand]:
    """The ranks that the others waited for: those that could not answer, or else did something by themselves, or else
    are steps behind. Empty if no rank stands apart."""
    for apart in (
        [stand for stand in stands if stand.state],
        [stand for stand in stands if not stand.together],
        [stand for stand in stands if stand.step < max(other.step for other in stands)],
    ):
        if apart and (len(apart) < len(stands) or len(stands) == 1 or any(stand.state for stand in apart)):
            return apart
    return []


def said(stand: Stand) -> str:
    """What a rank that did not come does."""
    if stand.state:
        return f"{stand} did not come: state {stand.state}, last seen in step {stand.step} ({stand.doing})"
    return f"{stand} did not come: {stand.doing}, at {stand.where or 'an unknown line'}"


def _ranks(stands: Sequence[Stand]) -> str:
    names = ", ".join(str(stand.rank) for stand in stands[:MOST_NAMED])
    more = f" and {counted(len(stands) - MOST_NAMED, 'more rank')}" if len(stands) > MOST_NAMED else ""
    return f"rank{'s' if len(stands) > 1 else ''} {names}{more}"
