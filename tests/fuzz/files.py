"""Damage to single files of any format: bytes, and what lies in a file's place."""

import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.values import ESCAPES

SPARSE_BYTES = 3 * 2**30


def replace(path: Path, content: bytes) -> None:
    """A new file in place of one that others may share."""
    clear(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- bytes


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content or b"x")
    for _ in range(rng.choice((1, 1, 8, 64))):
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((rng.randrange(len(content) + 1), max(0, len(content) - 1)))]


def insert(content: bytes, rng: random.Random) -> bytes:
    what = rng.choice(
        (
            b"\0",
            b"\xff",
            b"\xff\xfe",
            b"\xc3\x28",
            b"\xed\xa0\x80",
            ESCAPES.encode(),
            b"\n\n",
            b"\r",
            b"\xef\xbb\xbf",
            b"\0" * 5000,
            b"\xe2\x80\xa8",
            b'"',
            b"{",
            b"]",
        )
    )
    place = rng.choice((0, len(content), rng.randrange(len(content) + 1)))
    return content[:place] + what + content[place:]


def double(content: bytes, rng: random.Random) -> bytes:
    return content * rng.choice((2, 2, 50))


def swap_halves(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[place:] + content[:place]


def random_bytes(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 100, len(content))))


def utf_16(content: bytes, rng: random.Random) -> bytes:
    return content.decode(errors="replace").encode("utf-16")


def nothing(content: bytes, rng: random.Random) -> bytes:
    return b""


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, flip, truncate, insert, insert, double, swap_halves, random_bytes, utf_16, nothing,
)  # fmt: skip


def damage(path: Path, rng: random.Random) -> str:
    """Other bytes in a file, surely; says how."""
    content = path.read_bytes()
    how = rng.choice(BYTES)
    changed = how(content, rng)
    if changed == content:
        how, changed = double, (content or b"x") + b"x"
    replace(path, changed)
    return how.__name__


# ---- what lies in its place


def a_folder(path: Path) -> None:
    path.mkdir(parents=True)


def a_fifo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # such an address has at most 107 bytes
    try:
        listener.bind(path.name)
    finally:
        os.chdir(here)
        listener.close()


def _link(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(path.name if target == "itself" else target)

    link.__name__ = f"a link to {target}"
    return link


def a_huge_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(SPARSE_BYTES)


def gone(path: Path) -> None:
    pass


KINDS: tuple[Callable[[Path], None], ...] = (
    a_folder,
    a_fifo,
    a_fifo,
    a_socket,
    a_huge_file,
    gone,
    _link("/dev/zero"),
    _link("/dev/null"),
    _link("/etc/os-release"),
    _link("nowhere"),
    _link("itself"),
    _link("/dev/tty"),
    _link("/proc/self/mem"),
    _link(".."),
)


def displace(path: Path, rng: random.Random) -> str:
    """Something else in a file's or folder's place; says what."""
    kind = rng.choice(KINDS)
    clear(path)
    kind(path)
    return kind.__name__
