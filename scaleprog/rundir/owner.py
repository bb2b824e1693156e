"""owner.json: the latest start in a run directory, and what its fields may hold."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from scaleprog.rundir.records import JOB_ID

OWNER = "owner.json"
BATCH = "batch"
LARGEST_PID = 2**22


@dataclass(frozen=True)
class Owner:
    """The latest start in a run directory, according to `owner.json`, which is untrusted."""

    generation: int
    nonce: str
    job: str | None
    restart: int
    host: str
    pid: int
    started: str | None
    """When the process started, in kernel clock ticks."""
    step: str | None = None
    """The Slurm step that the process belongs to: a number, or "batch"; None outside a job, even in a shell that
    `salloc` started, because such a process may outlive the allocation."""
    repeat: int = 0
    """How often the batch script had started the tasks again since Slurm's last restart."""
    launcher: int | None = None
    """The process on the same host that starts the ranks again after a crash; None without one."""
    launcher_started: str | None = None

    @property
    def attempt(self) -> tuple[int, int]:
        """Grows with each start of the same job."""
        return self.restart, self.repeat

    @classmethod
    def of(cls, values: Any) -> "Owner":
        """Builds an Owner from parsed JSON. Raises ValueError with the name of the bad field."""
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        # earlier versions wrote no step and no launcher
        values = {
            "nonce": "",
            "started": None,
            "repeat": 0,
            "launcher": None,
            "launcher_started": None,
            "step": None if values.get("job") is None else BATCH,
            **values,
        }
        for name, fits in FITS.items():
            if name not in values or not fits(values[name]):
                raise ValueError(f"{name} is {json.dumps(values.get(name))[:80]}")
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        job = "" if self.job is None else f"job {self.job} restart {self.restart}, "
        return f"{job}process {self.pid} on {self.host}"


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _text(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


FITS: dict[str, Callable[[Any], bool]] = {
    "generation": _whole(1, 2**53),
    "nonce": _text(r"[0-9A-Za-z]{0,64}"),
    "job": lambda value: value is None or _text(JOB_ID)(value),
    "restart": _whole(0, 2**31),
    "repeat": _whole(0, 2**31),
    "host": lambda value: isinstance(value, str) and value.isprintable() and 1 <= len(value) <= 255,
    "pid": _whole(1, LARGEST_PID),
    "started": lambda value: value is None or _text(r"[0-9]{1,20}")(value),
    "launcher": lambda value: value is None or _whole(1, LARGEST_PID)(value),
    "launcher_started": lambda value: value is None or _text(r"[0-9]{1,20}")(value),
    "step": lambda value: value is None or _text(rf"[0-9]{{1,10}}|{BATCH}")(value),
}
"""Checks for the value of each field of an Owner."""
