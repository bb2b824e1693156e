"""Finds the samples in an untrusted tar.

Python's tarfile decompresses, follows links, builds sparse files and reads headers of any size. Each of these lets a
small file exhaust memory, and a shard needs none of them: it is a plain tar (ustar, GNU or pax) of plain files.
"""

import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from scaleprog.recipe.numbers import MOST_CLASSES, ceil_div

BLOCK = 512
LONGEST_HEADER, LONGEST_NAME = 64 * 2**10, 4096
SMALLEST_SAMPLE = 2 * BLOCK
"""Bytes in the headers of an image and a label."""
_LEFT_OUT = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
}
_PLAIN = (b"0", b"\0", b"7")


class Seekable(Protocol):
    """A file in memory or on disk that can be read from any place."""

    def seek(self, offset: int, /) -> object: ...
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file in a tar: its name, and the position of its bytes."""

    name: str
    start: int
    size: int


def samples(file: Seekable, size: int) -> Iterator[tuple[str, dict[str, Member]]]:
    """The consecutive files of each key, as (key, {lowercase extension: file}); names are KEY.EXTENSION, as in
    WebDataset.

    Files without an extension, and WebDataset's own (`__NAME...`), are left out.

    Raises:
        ValueError: `file`, of `size` bytes, is not a whole plain tar, or two files of a sample share an extension.
        OSError: it cannot be read.
    """
    current: str | None = None
    files: dict[str, Member] = {}
    for member in members(file, size):
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not stem or not dot or member.name.startswith("__"):
            continue
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        if key != current:
            if current is not None:
                yield current, files
            current, files = key, {}
        if extension in files:
            raise ValueError(f"{member.name!r} occurs twice")
        files[extension] = member
    if current is not None:
        yield current, files


def why_incomplete(file: Seekable, size: int, key: str, extensions: Collection[str], known: Collection[str]) -> str:
    """What explains that a sample lacks its image or its label, and what to do; empty if nothing does.

    Args:
        file: the tar, of `size` bytes.
        size: its bytes.
        key: the key of the sample.
        extensions: the extensions of the files that belong to it.
        known: the extensions of images and labels.
    """
    dotted = [extension for extension in extensions if extension.rpartition(".")[2] in known and "." in extension]
    if dotted:
        return (
            f"a key ends at the first dot of a file's name, so {key}.{dotted[0]} has the key {key!r} and the extension "
            f"{dotted[0]!r}; rename the files so that only their extensions follow a dot"
        )
    try:
        apart = sum(found == key for found, _ in samples(file, size)) > 1
    except (ValueError, OSError):
        return ""
    if apart:
        return (
            "its files are in the tar, but not one after the other; pack them in the order of their names, for example "
            "with `tar --sort=name`"
        )
    return ""


def read(file: Seekable, member: Member) -> bytes:
    """The bytes of a member. Raises OSError, or ValueError if the file has been truncated in the meantime."""
    file.seek(member.start)
    content = file.read(member.size)
    if len(content) != member.size:
        raise ValueError(f"{member.name!r} is truncated")
    return content


def label(text: bytes) -> int | None:
    """The class index in a `.cls` file, which may be negative; None if it is not a number or too long to be one."""
    text = text.strip()
    digits = text.removeprefix(b"-")
    return int(text) if digits.isdigit() and len(digits) <= len(str(MOST_CLASSES)) else None


def members(file: Seekable, end: int, begin: int = 0) -> Iterator[Member]:
    """The plain files of the tar in bytes `begin` to `end` of a file, in order; positions count from the file's start.

    Skips folders.

    Raises:
        ValueError: the bytes are not a whole plain tar of plain files.
        OSError: they cannot be read.
    """
    at, name, pax = begin, "", dict[bytes, bytes]()
    while True:
        file.seek(at)
        header = file.read(min(BLOCK, end - at))
        if len(header) < BLOCK or (any(header) and not _sound(header)):
            instead = _other_kind(header, end - begin) if at == begin else ""
            raise ValueError(f"no end marker at byte {at}; {instead or 'truncated or damaged'}")
        if not any(header):
            break
        kind = header[156:157]
        length = _number(pax[b"size"] if b"size" in pax else header[124:136], 10 if b"size" in pax else 8)
        start, at = at + BLOCK, at + BLOCK + ceil_div(length, BLOCK) * BLOCK
        if at > end:
            raise ValueError(f"a file of {length} bytes at byte {start} of {end}; truncated or damaged")
        if kind in (b"x", b"g", b"L"):
            if length > (LONGEST_NAME if kind == b"L" else LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes at byte {start}, which is too long")
            extra = file.read(length)
            if kind == b"L":
                name = _text(extra.partition(b"\0")[0])
            elif kind == b"x":
                pax = _records(extra)
            elif _records(extra).keys() & {b"path", b"size"}:
                raise ValueError(f"a header at byte {start} gives all files one name or size")
            continue
        if kind == b"K":  # the long name of a link; the link itself is refused
            continue
        name = _text(pax[b"path"]) if b"path" in pax else name or _own_name(header)
        if kind in _LEFT_OUT or (kind not in (*_PLAIN, b"5")) or any(key.startswith(b"GNU.sparse") for key in pax):
            what = _LEFT_OUT.get(kind, "a sparse or special file")
            raise ValueError(f"{name!r} is {what}; a tar may hold only plain files")
        if kind != b"5" and not name.endswith("/"):
            yield Member(name, start, length)
        name, pax = "", {}
    while at < end:
        file.seek(at)
        if not (rest := file.read(min(2**20, end - at))) or rest.strip(b"\0"):
            raise ValueError(f"no end marker at byte {at}; truncated or damaged")
        at += len(rest)


def _other_kind(start: bytes, size: int) -> str:
    """What a file that begins with `start` is instead of a tar, and what to do; empty if unknown."""
    if not size:
        return "the file is empty"
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            return f"it is compressed with {name}, whatever its name says; unpack it with `{command}` to a plain tar"
    if start.startswith(b"PK\x03\x04"):
        return "it is a ZIP archive, whatever its name says; pack its files as a plain tar"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not the file itself; download the file again"
    return ""


def _sound(header: bytes) -> bool:
    """Whether the header's checksum is right."""
    try:
        told = _number(header[148:156], 8)
    except ValueError:
        return False
    return told == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])


def _number(field: bytes, base: int) -> int:
    """The size in a header field: digits in `base`, or bytes of the number after 0x80. Raises ValueError."""
    if field[0:1] == b"\x80":
        return int.from_bytes(field[1:])
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or len(digits) > 20:
        raise ValueError(f"{field[:20]!r} instead of a number of bytes")
    return int(digits, base)


def _own_name(header: bytes) -> str:
    """The name in the header itself; ustar stores its folder in another field."""
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    return _text(b"/".join((prefix, name)) if prefix and header[257:263] == b"ustar\0" else name)


def _text(raw: bytes) -> str:
    """A file's name as printable text. Raises ValueError if it is not one for a file in a folder."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the name {raw[:100]!r} is not UTF-8") from None
    shown = f"the name {name[:100]!r}"
    if not all(char.isprintable() or unicodedata.category(char) == "Zs" for char in name):
        raise ValueError(f"{shown} has control characters")
    if not name or len(name) > LONGEST_NAME or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{shown} is not allowed for a file in a folder")
    return name


def _records(content: bytes) -> dict[bytes, bytes]:
    """The "LENGTH KEY=VALUE" lines of a pax header. Raises ValueError."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        length = content[at : at + 8].partition(b" ")[0]
        end = at + int(length) if length.isdigit() else at
        key, equals, value = content[at + len(length) + 1 : end - 1].partition(b"=")
        if end > len(content) or end - at <= len(length) + 1 or content[end - 1 : end] != b"\n" or not equals:
            raise ValueError("a damaged pax header")
        found[key] = value
        at = end
    return found
