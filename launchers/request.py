"""What a job asks Slurm for, and what it may not ask."""

import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scaleprog.errors import ScaleprogError
from scaleprog.launchers.world import Count

CHECKPOINT_SECONDS = 60  # least time between the end of a job's startup and the signal that stops the job
OWN_OPTIONS = {
    "nodes": "--nodes",
    "ntasks-per-node": "--tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "time": "--time",
    "cpus-per-task": "--cpus-per-task",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "signal": "--signal-before",
    "job-name": "--run-dir",
    "no-kill": "--spare-nodes",
}
ONE = Count(1, 1)
PRINTING = ("clusters", "parsable", "quiet", "test-only", "wait", "wrap")  # they change what sbatch prints, and when
RESERVED = dict.fromkeys(
    ("ntasks", "array", "requeue", "no-requeue", "open-mode", "output", "error", "chdir", *PRINTING)
)
SRUN_RESERVED = {
    "cpus-per-task": "--cpus-per-task",
    "nodes": "--nodes",
    "ntasks-per-node": "--tasks-per-node",
    **dict.fromkeys(("ntasks", "kill-on-bad-exit", "wait", "output", "error", "input", "unbuffered", "chdir")),
}


@dataclass(frozen=True)
class JobRequest:
    """What a job asks Slurm for.

    Attributes:
        nodes: number of nodes, or a range of it.
        gpus_per_node: GPUs on each node, one task per GPU; None on nodes without GPUs.
        tasks_per_node: tasks on each node without GPUs.
        cpus_per_task: CPU cores for each task; None until `with_cores` has chosen it.
        time: time limit of one start, in sbatch's format (see `seconds`).
        partition: as in sbatch.
        account: as in sbatch.
        qos: as in sbatch.
        signal_before: seconds before the time limit at which Slurm asks the job to stop.
        max_restarts: the most restarts after crashes; requested stops do not count.
        options: other options of sbatch, each KEY=VALUE or KEY.
        srun: other options of the srun that starts the ranks, each KEY=VALUE or KEY.
        python: the program that runs a rank in place of this Python: a container's, or a script that starts one.
        spare_nodes: further nodes, which the job holds to replace lost ones.
        in_job: whether crashed tasks start again inside the job, where that is possible.
    """

    nodes: Count = ONE
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    signal_before: int = 120
    max_restarts: int = 20
    options: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    python: str | None = None
    spare_nodes: int = 0
    in_job: bool = True

    @property
    def tasks(self) -> int:
        """Tasks on each node; one per GPU if the nodes have GPUs."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world(self) -> int:
        """The largest number of ranks."""
        return self.nodes.most * self.tasks

    @property
    def total(self) -> Count:
        """How many nodes the job holds: those that train, and the spare ones."""
        return Count(self.nodes.least + self.spare_nodes, self.nodes.most + self.spare_nodes)

    def further(self) -> dict[str, Any]:
        """`options` in the form that submitit takes.

        Raises:
            ScaleprogError: an option is malformed, or scaleprog sets it itself.
        """
        return dict(_options("sbatch", self.options, OWN_OPTIONS | RESERVED))

    def step(self) -> list[str]:
        """`srun` as srun takes it. Raises ScaleprogError as `further` does."""
        given = _options("srun", self.srun, SRUN_RESERVED)
        return [f"--{key}" if value is True else f"--{key}={value}" for key, value in given]

    def check(self) -> None:
        """Raises ScaleprogError for a request that cannot work, as far as this can be seen without Slurm."""
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ScaleprogError(
                f"--tasks-per-node {self.tasks_per_node}: each GPU gets one task, and --gpus-per-node is "
                f"{self.gpus_per_node}; leave --tasks-per-node out"
            )
        for name in ("partition", "account", "qos"):
            value = getattr(self, name) or ""
            if "\n" in value:
                raise ScaleprogError(f"--{name}: must be one line")
            if not value.isprintable() or "\\" in value:
                raise ScaleprogError(f"--{name} {value!r}: not a name that Slurm can read")
        if self.spare_nodes and not self.in_job:
            raise ScaleprogError(
                f"--spare-nodes {self.spare_nodes}: only a job that starts its ranks again itself can use them; leave "
                "out --restart requeue, or the spare nodes"
            )
        if self.spare_nodes < 0:
            raise ScaleprogError(f"--spare-nodes {self.spare_nodes}: must be 0 or more")
        if self.spare_nodes and self.nodes.most < 2:
            raise ScaleprogError(
                f"--spare-nodes {self.spare_nodes}: with --nodes 1, all ranks are on the node of the batch script, and "
                "no job outlives that one: Slurm requeues it; train on more nodes, or leave out the spare ones"
            )
        self.further()
        self.step()
        if self.python is not None and not self.srun and shutil.which(self.python) is None:
            raise ScaleprogError(
                f"--python {self.python}: no such program here; the Python of a container needs srun's options for it, "
                "such as --srun container-image=IMAGE"
            )
        if self.time is None:
            return
        least = self.signal_before + CHECKPOINT_SECONDS
        if seconds(self.time) <= least:
            raise ScaleprogError(
                f"--time {self.time} leaves no time for training: Slurm asks the job to stop {self.signal_before} s "
                "before its end (--signal-before), and a checkpoint takes time; request "
                f"{math.ceil(least / 60) + 1} min or more, or lower --signal-before"
            )


def seconds(limit: str) -> int:
    """Converts a time limit of sbatch to seconds.

    Args:
        limit: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, or D-HH:MM:SS.

    Raises:
        ScaleprogError: `limit` has another form.
    """
    number = "([0-9]{1,9})"
    found = re.fullmatch(f"(?:{number}-)?{number}(?::{number})?(?::{number})?", limit)
    if found is None:
        raise ScaleprogError(f"--time {limit}: not a time; write minutes, HH:MM:SS, or D-HH:MM:SS")
    days, *parts = (None if part is None else int(part) for part in found.groups())
    if days is None and parts[2] is None:  # the first number is minutes
        parts = [0, *parts[:2]]
    hours, minutes, rest = (part or 0 for part in parts)
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + rest


def _options(command: str, options: tuple[str, ...], reserved: Mapping[str, str | None]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a command's further options; the value is True where there is only a key.

    Args:
        command: the command, which is also the name of scaleprog's option.
        options: each KEY=VALUE or KEY.
        reserved: the keys that scaleprog sets, with its own option for each; None if it has none.

    Raises:
        ScaleprogError: an option is malformed or reserved.
    """
    for option in options:
        key, equals, value = option.removeprefix("--").partition("=")
        key = key.replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key) or not value.isprintable() or "\\" in value:
            raise ScaleprogError(
                f"--{command} {option}: write KEY or KEY=VALUE, where KEY is a long option of {command}"
            )
        if key in reserved:
            own = f"scaleprog sets {key} itself, to what the job needs; leave it out"
            instead = own if reserved[key] is None else f"use {reserved[key]} instead"
            raise ScaleprogError(f"--{command} {option}: {instead}")
        yield key, value if equals else True
