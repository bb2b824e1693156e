"""A cache of shards on a local disk, which all processes of a node share, and run after run.

A file has the checksum of its content as its name. It is written under another name and renamed, so there is never half
a file under its own; a process that is killed leaves at most what the next one removes. Nothing is synced to disk, so
after a power failure a file may hold anything: whoever reads a file first in its process compares the checksum.
"""

import fcntl
import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from scaleprog.errors import Unavailable
from scaleprog.files.atomic import lock, open_regular, unlock
from scaleprog.files.display import say
from scaleprog.recipe.keys import DataSettings

LONGEST_DOWNLOAD_SECONDS = 1800.0
"""How long a process waits for another one on this node that downloads the same shard."""
_POLL_SECONDS = 0.05
_OWN = re.compile(r"([0-9a-f]{64})\.(tar|part)")
"""Names of files that a store may remove: the folder may hold others, such as shards."""


@dataclass(frozen=True)
class Store:
    """The files in `folder`, of `limit` bytes at most. Those unused for longest are removed for new ones."""

    folder: Path
    limit: int
    _warned: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 1), compare=False, repr=False)
    """Shared with forked workers, so that a rank warns once."""

    @classmethod
    def of(cls, settings: DataSettings) -> "Store | None":
        """The store of a recipe; None if it has none."""
        return cls(Path(settings.store), settings.store_gib * 2**30) if settings.store else None

    def held(self, sha256: str, size: int) -> BufferedReader | None:
        """Opens the file with this checksum, and marks it as used; None if the store does not have it."""
        path = self._path(sha256)
        try:
            file = open_regular(path)
        except OSError:
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            self.forget(sha256)
            return None
        with suppress(OSError):
            os.utime(path)
        return file

    def keep(self, sha256: str, content: mmap.mmap) -> None:
        """Stores `content` if there is room. Call it within `alone`."""
        size = len(content)
        part = self._path(sha256, "part")
        try:
            if size > self.limit:
                raise OSError(f"a shard of {size} bytes is larger than the store, {self.limit} bytes")
            with self._reserved(part, size) as descriptor:
                view = memoryview(content)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.replace(part, self._path(sha256))
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            self._warn(error)

    def forget(self, sha256: str) -> None:
        """Removes a damaged file."""
        with suppress(OSError):
            self._path(sha256).unlink()

    @contextmanager
    def alone(self, sha256: str) -> Iterator[None]:
        """Keeps others from downloading the same file. The lock of a process that dies ends with it.

        Raises:
            Unavailable: another process has had the lock for half an hour.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open_regular(self._path(sha256, "lock"), "ab")
        except OSError as error:
            self._warn(error)
            yield
            return
        with file, _locked(file):
            yield

    @contextmanager
    def _reserved(self, part: Path, size: int) -> Iterator[int]:
        """The descriptor of a new file with room for `size` bytes on disk and within the limit."""
        with open_regular(self.folder / "lock", "ab") as file, _locked(file):
            self._unlink(part)
            self._make_room(size)
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError:
                os.close(descriptor)
                raise
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _make_room(self, size: int) -> None:
        """Removes what killed processes left, and then the files unused for longest, until `size` bytes more fit."""
        total, finished = 0, []
        for entry in os.scandir(self.folder):
            own = _OWN.fullmatch(entry.name)
            if own and own[2] == "part" and not self._being_written(own[1]):
                self._unlink(entry.path)
            elif own:
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    total += found.st_size
                    if own[2] == "tar":
                        finished.append((found.st_mtime_ns, found.st_size, entry.path))
        for _, freed, path in sorted(finished):
            if total + size <= self.limit:
                return
            self._unlink(path)
            total -= freed
        if total + size > self.limit:
            raise OSError(f"no room within its {self.limit} bytes while other shards are being written")

    def _being_written(self, sha256: str) -> bool:
        """Whether a process holds the lock of an unfinished file."""
        try:
            with open_regular(self._path(sha256, "lock"), "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unlock(file)
                return False
        except OSError:
            return True

    def _path(self, sha256: str, kind: str = "tar") -> Path:
        return self.folder / f"{sha256}.{kind}"

    @staticmethod
    def _unlink(path: Path | str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(path)

    def _warn(self, error: OSError) -> None:
        if not self._warned[0]:
            self._warned[0] = 1
            told = error.strerror or str(error)
            say(f"data.store {self.folder}: {told}; shards are read without it")


@contextmanager
def _locked(file: IO[Any]) -> Iterator[None]:
    try:
        lock(file, LONGEST_DOWNLOAD_SECONDS, _POLL_SECONDS)
    except TimeoutError as error:
        raise Unavailable(f"{file.name}: another process has been downloading this shard for too long") from error
    try:
        yield
    finally:
        unlock(file)
