"""Where shards come from: a local folder, or a folder behind a URL, with or without a store.

A source reads by the names in a manifest, which may be a stranger's: a name is that of a tar in the folder itself or in
a folder of it, so it leads nowhere else.
"""

import errno
import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from io import BufferedReader
from mmap import mmap
from pathlib import Path
from typing import Annotated, Protocol, Self

from pydantic import AfterValidator, Field

from scaleprog.data import transfer
from scaleprog.data.packed import HINT
from scaleprog.data.store import Store
from scaleprog.errors import DataError, Unavailable
from scaleprog.files.atomic import open_regular, read_text
from scaleprog.files.location import check_location, local_path
from scaleprog.recipe.numbers import printable

MOST_BYTES = 2**30
"""The most bytes in a shard, because a shard is read whole."""
LONGEST_TEXT = 16 * 2**20
SHARD_NAME = r"^([^/\\:.-][^/\\:]*/)?[^/\\:.-][^/\\:]*\.(tar|tar\.gz|tgz)$"
NAME_IN_URL = r"^([A-Za-z0-9_][A-Za-z0-9_.,=+-]*/)?[A-Za-z0-9_][A-Za-z0-9_.,=+-]*\.(tar|tar\.gz|tgz)$"
"""What no server or library takes for anything but a name."""
GZIPPED = (".tar.gz", ".tgz")
"""Ends of the names of shards that are inflated in memory."""
MOST_INFLATED = 1032
"""The most bytes that a byte of gzip stands for."""
NO_FILE = (errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""Errors for a path that is not a regular file; another attempt would fail, too."""
_CHUNK = 2**16
"""Bytes of a gzipped shard that are inflated at a time: what follows a member in its chunk is copied."""
_TRIES = 3
"""Downloads of a shard whose checksum differs."""


@dataclass(frozen=True)
class Shard:
    """One tar of samples."""

    name: Annotated[str, Field(pattern=SHARD_NAME, max_length=255), AfterValidator(printable)]
    """Name of a file in the manifest's folder, or in a folder of it. The pattern excludes other paths, URLs and
    command-line options."""
    samples: Annotated[int, Field(strict=True, ge=0, le=2**40)]
    bytes: Annotated[int, Field(strict=True, ge=0, le=2**50)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Checksum of the whole file, hexadecimal."""

    @classmethod
    def measure(cls, path: str | os.PathLike[str], samples: int) -> Self:
        """The entry of the file at `path`, which holds `samples` samples. Reads the whole file; raises OSError."""
        with open_regular(os.fspath(path)) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(os.path.basename(path), samples, file.tell(), digest)


class Source(Protocol):
    """A folder of shards, wherever it lies."""

    @property
    def root(self) -> str:
        """The path or URL of the folder."""

    def path(self, name: str) -> str:
        """The path or URL of a file, for messages, too."""

    def text(self, name: str) -> str:
        """The text of a small file.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it cannot be read.
            Unavailable: it cannot be read now.
        """

    def files(self) -> list[str]:
        """The names of all files in the folder and in the folders in it, sorted. Raises DataError or Unavailable."""

    def fetch(self, name: str) -> mmap:
        """The bytes of a shard of which nothing is known. Raises DataError or Unavailable."""

    def read(self, shard: Shard, verify: bool) -> mmap:
        """The bytes of a shard. `verify`: whether to compare the checksum.

        Raises:
            DataError: the shard is not there, is too large, or is not the one that the manifest lists.
            Unavailable: it cannot be read now.
        """

    def open(self, shard: Shard, verify: bool) -> BufferedReader | mmap | None:
        """The shard as a file on a local disk; its bytes if a store has no room for it; None without a store. Raises
        like `read`."""


def source_of(location: str | os.PathLike[str], store: Store | None = None) -> Source:
    """The folder at a path or URL; `store`: keeps what comes from a URL. Raises DataError for other locations."""
    if not isinstance(location, str):
        return Folder(os.fspath(location))
    try:
        folder = local_path(check_location(location))
    except ValueError as error:
        raise DataError(f"the folder of shards: {error}") from None
    return Remote(location.rstrip("/"), store) if folder is None else Folder(folder)


@dataclass(frozen=True)
class Folder:
    """A local folder."""

    root: str

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def text(self, name: str) -> str:
        path = self.path(name)
        try:
            return read_text(Path(path), LONGEST_TEXT)
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error

    def files(self) -> list[str]:
        root = Path(self.root)
        return sorted(path.relative_to(root).as_posix() for glob in ("*", "*/*") for path in root.glob(glob))

    def fetch(self, name: str) -> mmap:
        try:
            size = os.stat(self.path(name)).st_size
        except OSError as error:
            raise DataError(f"{self.path(name)}: cannot be read: {error}") from error
        with self._opened(name, size) as file:
            return self._content(file, size)

    def read(self, shard: Shard, verify: bool) -> mmap:
        with self._opened(shard.name, shard.bytes) as file:
            check_size(file.name, os.fstat(file.fileno()).st_size, shard)
            content = self._content(file, shard.bytes)
        if verify and hashlib.sha256(content).hexdigest() != shard.sha256:
            raise _other_content(self.path(shard.name))
        return content

    def open(self, shard: Shard, verify: bool) -> BufferedReader:
        file = self._opened(shard.name, shard.bytes)
        check_size(file.name, os.fstat(file.fileno()).st_size, shard)
        if verify and hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise _other_content(self.path(shard.name))
        return file

    def _content(self, file: BufferedReader, size: int) -> mmap:
        try:
            return _read_whole(file, size)
        except OSError as error:
            raise Unavailable(f"{file.name}: cannot read the shard now: {error}") from error

    def _opened(self, name: str, size: int) -> BufferedReader:
        path = self.path(name)
        _check_limit(path, size)
        try:
            return open_regular(path)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{path}: cannot read the shard ({error}); is data.path right and reachable?") from error
        except OSError as error:
            if error.errno in NO_FILE:
                raise DataError(f"{path}: the shard is not a regular file; copy it again or rebuild it") from error
            if isinstance(error, PermissionError):
                raise DataError(f"{path}: you may not read this shard; make it readable") from error
            raise Unavailable(f"{path}: cannot read the shard now: {error}") from error


@dataclass(frozen=True)
class Remote:
    """A folder behind a URL. What comes from there is always compared with the checksum."""

    root: str
    store: Store | None = None

    def path(self, name: str) -> str:
        if name.endswith((".tar", *GZIPPED)) and not re.search(NAME_IN_URL, name):
            raise DataError(
                f"{self.root}: {name}: behind a URL, the name of a shard may have only letters, digits, and _.,=+-; "
                "rename it"
            )
        return f"{self.root}/{name}"

    def text(self, name: str) -> str:
        return transfer.fetch_text(self.path(name), LONGEST_TEXT)

    def files(self) -> list[str]:
        return sorted(transfer.listing(self.root))

    def fetch(self, name: str) -> mmap:
        url = self.path(name)
        size = transfer.size_of(url)
        _check_limit(url, size)
        return transfer.fetch(url, size)

    def read(self, shard: Shard, verify: bool) -> mmap:
        if self.store is None:
            return self._download(shard)
        if (content := self._stored(self.store, shard, verify)) is not None:
            return content
        with self.store.alone(shard.sha256):
            if (content := self._stored(self.store, shard, verify)) is not None:
                return content  # another process has downloaded it in the meantime
            downloaded = self._download(shard)
            self.store.keep(shard.sha256, downloaded)
            return downloaded

    def open(self, shard: Shard, verify: bool) -> BufferedReader | mmap | None:
        if self.store is None:
            return None
        file = None if verify else self.store.held(shard.sha256, shard.bytes)
        if file is None:
            content = self.read(shard, verify)
            return self.store.held(shard.sha256, shard.bytes) or content  # a store may have no room for it
        return file

    def _stored(self, store: Store, shard: Shard, verify: bool) -> mmap | None:
        file = store.held(shard.sha256, shard.bytes)
        if file is None:
            return None
        with file:
            try:
                content = _read_whole(file, shard.bytes)
            except OSError:
                return None
        if verify and hashlib.sha256(content).hexdigest() != shard.sha256:
            store.forget(shard.sha256)
            return None
        return content

    def _download(self, shard: Shard) -> mmap:
        url = self.path(shard.name)
        _check_limit(url, shard.bytes)
        for _ in range(_TRIES):
            content = transfer.fetch(url, shard.bytes)
            if hashlib.sha256(content).hexdigest() == shard.sha256:
                return content
        raise _other_content(url)


def inflated(name: str, content: mmap, path: str) -> mmap:
    """The bytes of the tar in a shard: `content` itself, unless its name says that it is gzipped.

    Raises DataError if it cannot be inflated, or not to at most `MOST_BYTES`.
    """
    if not name.endswith(GZIPPED):
        return content
    inflate, pieces, size, at = None, [], 0, 0
    try:
        while at < len(content):  # a gzip file may have several members, and zeros after them
            chunk = content[at : at + _CHUNK]
            if inflate is None:
                member = chunk.lstrip(b"\0")
                at, chunk = at + len(chunk) - len(member), member
                if not chunk:
                    continue
                inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
            pieces.append(inflate.decompress(chunk, MOST_BYTES + 1 - size))
            size += len(pieces[-1])
            if size > MOST_BYTES:
                raise DataError(f"{path}: inflates to more than {MOST_BYTES} bytes; build smaller shards")
            at += len(chunk) - len(inflate.unused_data)
            inflate = None if inflate.eof else inflate
    except zlib.error as error:
        raise DataError(f"{path}: not gzip, although its name says so ({error}); {HINT}") from error
    if inflate is not None:
        raise DataError(f"{path}: its gzip stream is cut off; {HINT}")
    whole = transfer.memory(max(size, 1))
    whole[:size] = b"".join(pieces)
    return whole


def _read_whole(file: BufferedReader, size: int) -> mmap:
    """The first `size` bytes of a file. Raises OSError, also if it is shorter."""
    content = transfer.memory(size)
    with memoryview(content) as view:
        if file.readinto(view) < size:
            raise OSError("it became shorter while it was read")
    return content


def check_size(path: str, size: int, shard: Shard) -> None:
    """Raises DataError if the file at `path` has another size than the manifest says."""
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "too long"
        raise DataError(f"{path}: {what}: {size} of {shard.bytes} bytes; {HINT}")


def _check_limit(path: str, size: int) -> None:
    if not size:
        raise DataError(f"{path}: the file is empty; {HINT}")
    if size > MOST_BYTES:
        raise DataError(f"{path}: {size} bytes, but a shard may have at most {MOST_BYTES}; build smaller shards")


def _other_content(path: str) -> DataError:
    return DataError(f"{path}: the checksum differs from the manifest's; {HINT}")
