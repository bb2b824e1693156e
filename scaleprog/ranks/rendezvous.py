"""Where the ranks of a run meet: an unnamed file on one machine, or a port at rank 0's address on several machines.

Only scaleprog's launchers name this place. A process that they did not start runs alone, even if another launcher has
set variables such as MASTER_ADDR and RANK (torchrun, Kubeflow), or its shell still holds those of another job.
"""

import fcntl
import multiprocessing
import os
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from scaleprog.errors import ScaleprogError, Unavailable

STORE = "SCALEPROG_STORE"
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEET_LIMIT = timedelta(minutes=10)  # how long a rank waits for the others at a start
JOIN_LIMIT = timedelta(minutes=30)  # how long a collective waits
BACKLOG = 4096  # ranks that may connect at the same time
LOOPBACK = "lo"
SIOCGIFFLAGS, SIOCGIFADDR, IFF_UP = 0x8913, 0x8915, 1
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The variables that tell gloo and NCCL which network interface to use."""


@dataclass(frozen=True)
class Place:
    """One rank's place among all ranks.

    `store` is `file:PATH` (only this machine's ranks can open that file), `tcp:ADDRESS:PORT` (rank 0 listens there),
    or empty for a process that runs alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: str = ""

    @classmethod
    def current(cls, variables: Mapping[str, str] = os.environ) -> "Place":
        """The place that the launcher has put into this process's environment; without a launcher, a place alone."""
        if not variables.get(STORE):
            return cls()
        rank, world, local_rank, local_world = (int(variables[name]) for name in NUMBERS)
        return cls(rank, world, local_rank, local_world, variables[STORE])

    def variables(self) -> dict[str, str]:
        """This place as environment variables, by the names that torch.distributed and DeepSpeed read."""
        numbers = (self.rank, self.world, self.local_rank, self.local_world)
        return {**{name: str(number) for name, number in zip(NUMBERS, numbers, strict=True)}, STORE: self.store}

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks run on this machine, so that no other machine needs to reach them."""
        kind, _, where = self.store.partition(":")
        return kind != "tcp" or where.startswith("127.")

    @contextmanager
    def joined(self, backend: str, limit: timedelta = JOIN_LIMIT) -> Iterator[None]:
        """Waits for all ranks; inside the block, they are torch's default process group. Raises Unavailable.

        `limit`: how long a collective waits.

        Inside the block, the environment holds this place. Afterwards it is restored, so that later child processes
        do not join the group.
        """
        changed = self.variables() | (dict.fromkeys(INTERFACES, LOOPBACK) if self.on_one_machine else {})
        before = {name: os.environ.get(name) for name in changed}
        if self.on_one_machine:
            check_loopback()
        os.environ |= changed
        try:
            try:
                store = self._open()
                dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=limit)
                store.set_timeout(limit)  # NCCL's first collective waits there for rank 0
            except dist.DistError as error:
                raise Unavailable(
                    f"rank {self.rank} on {socket.gethostname()}: the {self.world} ranks have not met at "
                    f"{self.store.partition(':')[2]} within {MEET_LIMIT.seconds // 60} min ({_first_line(error)}); do "
                    "all of them run, and can they reach this address?"
                ) from error
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def _open(self) -> dist.Store:
        kind, _, where = self.store.partition(":")
        if not kind:
            return dist.HashStore()
        if kind == "file":
            return dist.FileStore(where, self.world)
        address, _, port = where.rpartition(":")
        # torch's own socket would listen on every interface
        listener = _listen(address, int(port)) if self.rank == 0 else None
        return dist.TCPStore(
            address, int(port), self.world, listener is not None, MEET_LIMIT, master_listen_fd=listener
        )


def launcher() -> int | None:
    """The process of scaleprog that started this one as a rank on one machine, and may start it again; None without."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not Place.current().store.startswith("file:"):
        return None
    try:
        words = Path(f"/proc/{parent.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    ours = b"--multiprocessing-fork" in words or b"scaleprog" in [os.path.basename(word) for word in words]
    return parent.pid if ours else None  # another program may live on when the run has ended


def limit_as_world(group: dist.ProcessGroup) -> None:
    """Gives a group the limit of a collective of all ranks, which torch gives to the group of all ranks alone."""
    everyone = dist.group.WORLD
    assert everyone is not None
    options = everyone._get_backend(torch.device("cpu")).options
    if options is not None:  # a group whose ranks are made up has no limit
        dist.set_timeout(options._timeout, group)


def of_another_launcher(variables: Mapping[str, str] = os.environ) -> str:
    """What another launcher has set for a process of several, for a message; empty if nothing."""
    world = variables.get("WORLD_SIZE", "")
    if variables.get(STORE) or not re.fullmatch("[0-9]{1,9}", world) or int(world) < 2:
        return ""
    return ", ".join(
        f"{name}={variables[name]!r}" for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in variables
    )


def check_loopback() -> None:
    """Raises ScaleprogError unless the loopback interface is up and has an address, as gloo needs even for one rank."""
    name = struct.pack("256s", LOOPBACK.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            (flags,) = struct.unpack_from("H", fcntl.ioctl(probe, SIOCGIFFLAGS, name), 16)
            fcntl.ioctl(probe, SIOCGIFADDR, name)
            problem = "" if flags & IFF_UP else "is down"
        except OSError as error:
            problem = f"has no IPv4 address ({error.strerror})"
    if problem:
        raise ScaleprogError(
            f"{socket.gethostname()}: the loopback interface {LOOPBACK!r} {problem}, and the ranks of one machine meet "
            f"there; run `ip link set {LOOPBACK} up` (and `ip address add 127.0.0.1/8 dev {LOOPBACK}` if it has no "
            "address), or start the container with a network"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _listen(address: str, port: int) -> int:
    """The file descriptor of a socket that listens at this address only. Raises Unavailable."""
    try:
        return socket.create_server((address, port), backlog=BACKLOG).detach()
    except OSError as error:
        raise Unavailable(
            f"rank 0 on {socket.gethostname()} cannot listen at {address}:{port}: {error.strerror}; "
            "the other ranks resolve its node's name to this address"
        ) from error
