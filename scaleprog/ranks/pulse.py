"""Where a rank stands, and the memory in which its launcher reads that, also of a rank that cannot run. No torch."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

PULSE = "SCALEPROG_PULSE"
"""The variable that names a rank's place in its launcher's memory: DESCRIPTOR:RANK."""
PULSE_BYTES = 4096


@dataclass(frozen=True)
class Stand:
    """Where a rank stands; what its thread tells the launcher."""

    rank: int
    host: str
    pid: int
    generation: int
    step: int
    doing: str
    """What it does, in words."""
    seconds: float
    """For how long it has not made progress."""
    patience: float
    """Seconds of patience."""
    beats: int = 0
    """How often the thread has looked; a launcher counts the time in which this does not change."""
    hung: bool = False
    together: bool = False
    """Whether it waits for other ranks."""
    where: str = ""
    """The line of scaleprog in which it is; empty until it is hung, and has collected its stacks."""
    state: str = ""
    """What the kernel says of a rank that could not tell by itself where it stands."""
    stacks: int = -1
    """The descriptor, in the rank, of the memory with its stacks."""
    world: int = 0
    """How many ranks train; 0: unknown."""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


class Pulse:
    """A rank's place in memory that it shares with its launcher."""

    def __init__(self, descriptor: int, rank: int) -> None:
        self.descriptor, self.rank = descriptor, rank

    @classmethod
    def current(cls, variables: Mapping[str, str] = os.environ) -> "Pulse | None":
        """The place that the launcher has given this process; None without one."""
        descriptor, _, rank = variables.get(PULSE, "").partition(":")
        return cls(int(descriptor), int(rank)) if rank else None

    def write(self, stand: Stand) -> None:
        """Shows the launcher where the rank stands."""
        text = json.dumps(asdict(stand)).encode()
        os.pwrite(self.descriptor, text[:PULSE_BYTES].ljust(PULSE_BYTES), self.rank * PULSE_BYTES)

    def clear(self) -> None:
        """Tells the launcher that nothing watches the rank any more."""
        os.pwrite(self.descriptor, bytes(PULSE_BYTES), self.rank * PULSE_BYTES)

    def read(self) -> Stand | None:
        """Where the rank stood last; None before its first word, or while it writes."""
        content = os.pread(self.descriptor, PULSE_BYTES, self.rank * PULSE_BYTES).strip(b"\0 ")
        with suppress(ValueError, TypeError):
            return Stand(**json.loads(content))
        return None


def stand_of(values: Mapping[str, Any]) -> Stand:
    """A Stand from its values as a mapping, of which a reader has checked the types."""
    return Stand(**{each.name: values[each.name] for each in fields(Stand) if each.name in values})
