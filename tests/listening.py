"""Which sockets a process and all its descendants listen on, as the kernel tells, in whatever network namespace."""

import ipaddress
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LISTENS, UNCONNECTED = "0A", "07"
ACCEPTS = 1 << 16  # the flag of a Unix socket that listens


@dataclass(frozen=True)
class Listener:
    """A socket to which anybody who reaches its address can send; `address` is empty for an abstract Unix socket."""

    kind: str
    address: str
    port: int

    @property
    def local(self) -> bool:
        """Whether only processes of the same machine reach it."""
        if not self.address:
            return True
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def descendants(pid: int) -> list[int]:
    """A process and all processes below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def listeners(pids: Iterable[int]) -> set[Listener]:
    """What these processes listen on."""
    found = set()
    for pid in pids:
        with suppress(OSError):  # it has ended
            inodes = set(_sockets(pid))
            found |= {listener for inode, listener in _open(pid) if inode in inodes}
    return found


def listeners_until_end(process: subprocess.Popen[bytes]) -> set[Listener]:
    """What a process and its descendants listen on at any time until it ends."""
    found = set()
    while process.poll() is None:
        found |= listeners(descendants(process.pid))
        time.sleep(0.02)
    return found


def _sockets(pid: int) -> Iterator[str]:
    """The inodes of a process's sockets."""
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            link = str(path.readlink())
            if link.startswith("socket:["):
                yield link[8:-1]


def _open(pid: int) -> Iterator[tuple[str, Listener]]:
    """Every socket of the process's network namespace that takes what strangers send, with its inode."""
    for kind, state in (("tcp", LISTENS), ("tcp6", LISTENS), ("udp", UNCONNECTED), ("udp6", UNCONNECTED)):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state:
                address, port = fields[1].split(":")
                yield fields[9], Listener(kind, _address(address), int(port, 16))
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & ACCEPTS and fields[7:] and fields[7].startswith("@"):
            yield fields[6], Listener("abstract", "", 0)


def _address(text: str) -> str:
    """An address as /proc/net shows it: 32-bit words, each in the machine's byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words)))
