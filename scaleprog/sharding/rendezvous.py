"""Where the ranks of a run meet: a file without a name on one machine, a port of rank 0's address on several.

Only a launcher of ours names the place. What a shell happens to hold (MASTER_ADDR, RANK and the like, of somebody
else's job) joins nothing: without our launcher, a process is alone.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from scaleprog.errors import Unavailable

STORE = "SCALEPROG_STORE"
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
JOIN_LIMIT = timedelta(minutes=30)
BACKLOG = 4096  # ranks that may come at once
LOOPBACK = "lo"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where gloo and NCCL read on which interface they are to listen."""


@dataclass(frozen=True)
class Place:
    """One rank's place among all.

    `store` is `file:PATH`, of a file that only this machine's ranks can open, or `tcp:ADDRESS:PORT`, where rank 0
    listens; empty where a process is alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: str = ""

    @classmethod
    def current(cls, variables: Mapping[str, str] = os.environ) -> "Place":
        """What the launcher of this process has put into its environment."""
        if not variables.get(STORE):
            return cls()
        rank, world, local_rank, local_world = (int(variables[name]) for name in NUMBERS)
        return cls(rank, world, local_rank, local_world, variables[STORE])

    def variables(self) -> dict[str, str]:
        """The same for an environment; torch.distributed's names, which DeepSpeed reads, too."""
        numbers = (self.rank, self.world, self.local_rank, self.local_world)
        return {**{name: str(number) for name, number in zip(NUMBERS, numbers, strict=True)}, STORE: self.store}

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks are here, so that nothing need be reachable from elsewhere."""
        kind, _, where = self.store.partition(":")
        return kind != "tcp" or where.startswith("127.")

    @contextmanager
    def joined(self, backend: str) -> Iterator[None]:
        """Inside, torch's default process group is that of all ranks, once they have come. Raises Unavailable.

        The environment says so, too, and is as it was afterwards: what this process starts then is not of the group.
        """
        changed = self.variables() | (dict.fromkeys(INTERFACES, LOOPBACK) if self.on_one_machine else {})
        before = {name: os.environ.get(name) for name in changed}
        os.environ |= changed
        try:
            dist.init_process_group(
                backend, store=self._open(), rank=self.rank, world_size=self.world, timeout=JOIN_LIMIT
            )
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
            address, int(port), self.world, listener is not None, JOIN_LIMIT, master_listen_fd=listener
        )


def _listen(address: str, port: int) -> int:
    """The descriptor of a socket that listens at this address and no other."""
    try:
        return socket.create_server((address, port), backlog=BACKLOG).detach()
    except OSError as error:
        raise Unavailable(
            f"rank 0 on {socket.gethostname()} cannot listen at {address}:{port}, where the others look for it: "
            f"{error.strerror}; the address is what its node's name stands for on the others"
        ) from error
