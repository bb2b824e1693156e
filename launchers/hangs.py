"""Ends ranks that hang, and says which ones did not come and where they stand.

A rank shows its launcher where it stands, in memory that both share, and ends itself when it hangs
(`ranks/patience.py`). The launcher of its node reads that memory. If a rank no longer changes it, because the rank is
stopped or waits in the kernel, the launcher writes down what the kernel knows, and kills the rank.
"""

import os
import time
from collections.abc import Collection, Sequence
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
    ask_stacks,
    read_all,
    within,
    write_stacks,
)
from scaleprog.ranks.pulse import Pulse, Stand
from scaleprog.rundir.appending import Lines
from scaleprog.rundir.records import EVENTS

SETTLE_SECONDS = WRITE_SECONDS + LINGER_SECONDS
"""How long after the first hung rank the launcher waits for the other ranks to say where they stand."""
MOST_NAMED = 8
SILENT_LOOKS = 3
"""After so many looks without a word, a rank counts as unable to answer once another rank hangs."""
ALONE = ("waiting for data", "writing a checkpoint")
"""What a rank does without the others."""
IN_STEP = ("training", "after the step")
"""What a rank may do while its device waits for the others."""


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
                stand = self._ask_kernel(stand, silent)
            if stand.hung:
                self._noticed = self._noticed if self._hung else now
                self._hung[pulse.rank] = stand
        complete = len(self._hung) == len(self._pulses) and all(s.where or s.state for s in self._hung.values())
        awaited = not last and not complete and now - self._noticed < SETTLE_SECONDS
        if not self._hung or awaited:
            return None
        for rank, (stand, silent) in self._heard.items():
            if rank not in self._hung and silent > SILENT_LOOKS * LOOK_SECONDS and processes.lives(stand.pid):
                self._hung[rank] = self._ask_kernel(stand, silent)
        return [self._hung[rank] for rank in sorted(self._hung)]

    def conclude(self, stands: Sequence[Stand]) -> "Hang":
        """What to conclude from where the ranks stand; writes the event."""
        hang = Hang.of(stands, self._folder, self._heard)
        hang.record(self._folder)
        return hang

    def _ask_kernel(self, stand: Stand, silent: float) -> Stand:
        """Writes down what the kernel knows about a rank that has not said for `silent` seconds where it stands."""
        state = processes.state_of(stand.pid)
        stand = replace(stand, hung=True, seconds=round(stand.seconds + silent, 1), state=state)
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
    def of(cls, stands: Sequence[Stand], folder: Path, heard: Collection[int] = ()) -> "Hang":
        """What to conclude from where the hung ranks of a run stand; at least one.

        `heard`: ranks that are known to have been able to answer.
        """
        absent = _absent(stands, heard)
        culprits = [] if absent else _culprits(stands)
        waiting = [stand for stand in stands if stand not in culprits]
        first, step = (culprits or waiting)[0], max(stand.step for stand in stands)
        told = [f"{_ranks(absent)} said nothing"] if absent else []
        told += [said(stand) for stand in culprits[:MOST_NAMED]]
        told += [f"{len(culprits) - MOST_NAMED} more ranks did not come"] if len(culprits) > MOST_NAMED else []
        alike = not (absent or culprits)
        if waiting and (not alike or waiting[0].together):
            where = f" in {waiting[0].where}" if waiting[0].where else ""
            ranks = _ranks([stand.rank for stand in waiting])
            told.append(f"{ranks} waited for the others in step {waiting[0].step} ({waiting[0].doing}){where}")
        told += _alike(stands) if alike else []
        message = (
            f"hung for {first.seconds:.0f} s in step {step}: {'; '.join(told)}. Stacks: {folder / FOLDER}. If "
            f"that may take so long, raise train.patience (now {first.patience / 60:g} min)"
        )
        named = (*absent, *(stand.rank for stand in culprits))
        return cls(named, first.generation, step, first.doing, message)

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


def _absent(stands: Sequence[Stand], heard: Collection[int]) -> list[int]:
    """The ranks that should stand somewhere, and do not. Empty if a rank could not answer or stands alone, because
    the others may only have had more patience, and have ended with it."""
    if any(stand.state or _alone(stand) for stand in stands):
        return []
    return sorted(set(range(max(stand.world for stand in stands))) - {stand.rank for stand in stands} - set(heard))


def _culprits(stands: Sequence[Stand]) -> list[Stand]:
    """The ranks that the others waited for: those that could not answer or stand alone, or else did something by
    themselves, or else did it outside a step, or else are steps behind. Empty if no rank stands apart."""
    for apart in (
        [stand for stand in stands if stand.state or _alone(stand)],
        [stand for stand in stands if not stand.together],
        [stand for stand in stands if not stand.together and stand.doing not in IN_STEP],
        [stand for stand in stands if stand.step < max(other.step for other in stands)],
    ):
        if apart and (len(apart) < len(stands) or len(stands) == 1 or any(stand.state for stand in apart)):
            return apart
    return []


def _alone(stand: Stand) -> bool:
    """Whether a rank hangs in what it does without the others."""
    return stand.doing in ALONE and not stand.together


def said(stand: Stand) -> str:
    """What a rank that did not come does."""
    if stand.state:
        return f"{stand} did not come: state {stand.state}, last seen in step {stand.step} ({stand.doing})"
    return f"{stand} did not come: {stand.doing}, at {stand.where or 'an unknown line'}"


def _alike(stands: Sequence[Stand]) -> list[str]:
    """What to look at if no rank stands apart: the network if all waited for each other, or else what all use."""
    told, hosts = ["no rank stands apart"], sorted({stand.host for stand in stands})
    if not any(stand.together for stand in stands):
        places = list(dict.fromkeys(f"{stand.doing} at {stand.where or 'an unknown line'}" for stand in stands))
        maybe = ", or on CUDA a collective" if all(stand.doing in IN_STEP for stand in stands) else ""
        told.append(
            f"all ranks hang by themselves: {'; '.join(places[:MOST_NAMED])}; a file system or device that all "
            f"share{maybe}?"
        )
    elif len(hosts) > 1:
        told.append(f"is the network between {', '.join(hosts[:MOST_NAMED])} whole?")
    return told


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {counted(len(ranks) - MOST_NAMED, 'more rank')}" if len(ranks) > MOST_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {names}{more}"
