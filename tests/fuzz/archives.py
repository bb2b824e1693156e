"""Tars of samples that a careful reader refuses, and their entries in the manifest resealed."""

import gzip
import hashlib
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.files import replace
from tests.fuzz.values import ESCAPES

Member = tuple[tarfile.TarInfo, bytes]
LABELS = (
    b"-1",
    b"4",
    b"99",
    b"1.5",
    b"",
    b"1e9",
    b"9" * 5000,
    b"NaN",
    b"\xd9\xa1",
    b"\0",
    b"1\x001",
    b"0x1",
    b"1_0",
    b"+1",
    b"\xff",
    b"true",
    b"1 2",
    ESCAPES.encode(),
)
"""Texts that are no class index of four classes, whatever is stripped."""
NAMES = (
    "../escaped.png",
    "/tmp/absolute.png",
    "a/b/c.png",
    "",
    ".png",
    "noextension",
    "__hidden__",
    "two.png.cls",
    "x" * 3000 + ".png",
    f"{ESCAPES}.png",
    "\udcff.png",
    "s.tar.gz",
    "s.pyd",
    "s.pickle",
    "new\nline.cls",
    "CASE.PNG",
    "s.json",
)


@dataclass(frozen=True)
class Tampered:
    """A tar that was changed, how, and whether its samples are none that may be accepted: by who reads the tar, and by
    who decodes its images."""

    content: bytes
    how: str
    unfit: bool = False
    undecodable: bool = False


def members_of(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(info, tar.extractfile(info).read() if info.isfile() else b"") for info in tar]


def packed(members: list[Member], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for info, content in members:
            if info.isfile():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def named(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    return info, content


# ---- changes of members


def another_order(members: list[Member], rng: random.Random) -> Tampered:
    rng.shuffle(members)
    return Tampered(packed(members), "members in another order")


def a_member_missing(members: list[Member], rng: random.Random) -> Tampered:
    gone = members.pop(rng.randrange(len(members)))
    return Tampered(packed(members), f"{gone[0].name} is missing", unfit=True)


def a_sample_missing(members: list[Member], rng: random.Random) -> Tampered:
    first = 2 * rng.randrange(len(members) // 2)
    del members[first : first + 2]
    return Tampered(packed(members), "a sample is missing", unfit=True)


def a_member_twice(members: list[Member], rng: random.Random) -> Tampered:
    members.append(rng.choice(members))
    return Tampered(packed(members), f"{members[-1][0].name} occurs twice", unfit=True)


def another_kind(members: list[Member], rng: random.Random) -> Tampered:
    """A member that is no file: the sample lacks it."""
    place = rng.randrange(len(members))
    kind, link = rng.choice(
        (
            (tarfile.SYMTYPE, "/etc/os-release"),
            (tarfile.LNKTYPE, "/etc/os-release"),
            (tarfile.CHRTYPE, ""),
            (tarfile.FIFOTYPE, ""),
            (tarfile.DIRTYPE, ""),
            (tarfile.BLKTYPE, ""),
            (tarfile.SYMTYPE, "itself"),
            (tarfile.LNKTYPE, members[0][0].name),
            (b"Z", ""),
        )
    )
    name = members[place][0].name
    members[place] = named(name, b"", kind, name if link == "itself" else link)
    fit = link == members[0][0].name  # a hard link to another member may be followed
    return Tampered(packed(members), f"{name} has type {kind!r} to {link!r}", unfit=not fit)


def one_more(members: list[Member], rng: random.Random) -> Tampered:
    name = rng.choice(NAMES)
    content = rng.choice((b"", b"1", members[0][1]))
    members.insert(rng.choice((0, 1, len(members))), named(name, content))
    return Tampered(packed(members), f"one more member, {name[:40]!r}")


def another_label(members: list[Member], rng: random.Random) -> Tampered:
    places = [i for i, (info, _) in enumerate(members) if info.name.endswith(".cls")]
    place, label = rng.choice(places), rng.choice(LABELS)
    members[place] = named(members[place][0].name, label)
    return Tampered(packed(members), f"label {label[:20]!r}", unfit=True)


def another_image(members: list[Member], rng: random.Random) -> Tampered:
    places = [i for i, (info, _) in enumerate(members) if not info.name.endswith(".cls")]
    place = rng.choice(places)
    name, image = members[place][0].name, members[place][1]
    how, content = rng.choice(
        (
            ("empty", b""),
            ("cut", image[: len(image) // 2]),
            ("random", rng.randbytes(len(image))),
            ("zeros", bytes(1000)),
            ("bomb", png(60_000, 60_000)),
            ("bomb of 1 x 2^31", png(1, 2**31 - 1)),
            ("of no size", png(0, 0)),
            ("a bomb of text", png(8, 8, text=True)),
            ("a script", b"<svg onload=alert(1)>"),
            ("a GIF", b"GIF89a" + bytes(50)),
            ("JPEG's first bytes", b"\xff\xd8\xff" + image[3:]),
            ("PNG's first bytes", image[:8] + rng.randbytes(500)),
        )
    )
    members[place] = named(name, content)
    return Tampered(packed(members), f"image {how}", undecodable=how != "a bomb of text")


MEMBERS = (another_order, a_member_missing, a_sample_missing, a_member_twice, another_kind, another_kind, one_more,
           another_label, another_label, another_image, another_image)  # fmt: skip


# ---- changes of the archive


def another_header(content: bytes, rng: random.Random) -> Tampered:
    """A field of one header, its checksum resealed."""
    offsets = header_offsets(content)
    start = rng.choice(offsets)
    field, width, offset = rng.choice(
        (
            ("size", 12, 124),
            ("size", 12, 124),
            ("mode", 8, 100),
            ("uid", 8, 108),
            ("mtime", 12, 136),
            ("type", 1, 156),
            ("magic", 6, 257),
            ("name", 100, 0),
        )
    )
    value = rng.choice(
        (
            b"0",
            b"77777777777",
            b"-1",
            b"\x80" + b"\0" * 10 + b"\xff",
            b"\xff" * 12,
            b"9" * 12,
            b"",
            b"x",
            b"00000001750\0",
        )
    )
    header = bytearray(content[start : start + 512])
    header[offset : offset + width] = value[:width].ljust(width, b"\0")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return Tampered(content[:start] + bytes(header) + content[start + 512 :], f"header's {field} is {value!r}")


def cut(content: bytes, rng: random.Random) -> Tampered:
    """Surely within what holds samples."""
    offsets = header_offsets(content)
    at = rng.choice((rng.randrange(offsets[-1]), rng.choice(offsets[:-1]), 512 * rng.randrange(offsets[-1] // 512), 0))
    return Tampered(content[:at], f"cut at {at}", unfit=True)


def packed_away(content: bytes, rng: random.Random) -> Tampered:
    return Tampered(gzip.compress(content, mtime=0), "compressed")


def with_more_behind(content: bytes, rng: random.Random) -> Tampered:
    return Tampered(content + rng.choice((b"x" * 512, content, bytes(512 * 10_000))), "more behind its end")


def flipped(content: bytes, rng: random.Random) -> Tampered:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 20))):
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return Tampered(bytes(changed), "bytes flipped")


ARCHIVE: tuple[Callable[[bytes, random.Random], Tampered], ...] = (
    another_header, another_header, cut, packed_away, with_more_behind, flipped, flipped,
)  # fmt: skip


def tamper(content: bytes, rng: random.Random) -> Tampered:
    """A tar with one change."""
    if rng.random() < 0.6:
        return rng.choice(MEMBERS)(members_of(content), rng)
    return rng.choice(ARCHIVE)(content, rng)


def header_offsets(content: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [info.offset for info in tar]


def png(width: int, height: int, text: bool = False) -> bytes:
    """A picture that claims a size, and holds next to nothing of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(max(0, min((3 * width + 1) * height, 10**7))))
    comment = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))) if text else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + comment + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def reseal(manifest: Path, name: str, content: bytes) -> None:
    """Gives a tar's entry in a manifest the size and checksum of other content."""
    values = json.loads(manifest.read_text())
    for shard in (shard for shards in values["splits"].values() for shard in shards):
        if shard["name"] == name:
            shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    replace(manifest, json.dumps(values, indent=1).encode())
