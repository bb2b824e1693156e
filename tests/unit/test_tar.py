"""Tars of samples: what honest programs write is read as tarfile reads it, and of anything else no byte is trusted."""

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprog.data import tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "GNU": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size, found.type = size, kind
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def packed(*members: tuple[tarfile.TarInfo, bytes], layout: str = "pax") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[layout]) as archive:
        for member, content in members:
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read(content: bytes) -> list[tuple[str, dict[str, bytes]]]:
    file = io.BytesIO(content)
    found = tar.samples(file, len(content))
    return [(key, {extension: tar.read(file, member) for extension, member in files.items()}) for key, files in found]


def sample(key: str, image: bytes = b"image", label: bytes = b"3") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [(info(f"{key}.jpg", len(image), mtime=1.5), image), (info(f"{key}.cls", len(label)), label)]


@pytest.mark.parametrize("layout", FORMATS)
def test_what_tarfile_writes_in_any_format(layout: str) -> None:
    long = "folder/" * 12 + "x" * 80
    keys = ["a", "folder/b", "./c", long] + ([] if layout == "ustar" else ["x" * 200, "Käse", "d\u00a0e"])
    others = [(info("folder", kind=tarfile.DIRTYPE), b""), (info("no-extension", 1), b"x"), (info("__own__.json"), b"")]
    content = packed(*others, *(member for key in keys for member in sample(key)), layout=layout)
    assert read(content) == [(key, {"jpg": b"image", "cls": b"3"}) for key in keys]


@given(
    st.lists(
        st.tuples(st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?", fullmatch=True), st.binary(max_size=1500)), max_size=6
    ),
    st.sampled_from(sorted(FORMATS)),
)
def test_every_byte_is_where_tarfile_finds_it(files: list[tuple[str, bytes]], layout: str) -> None:
    content = packed(
        *((info(f"{i}{name}.png", len(data)), data) for i, (name, data) in enumerate(files)), layout=layout
    )
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [(m.name[:-4], {"png": archive.extractfile(m).read()}) for m in archive]  # type: ignore[union-attr]
    assert read(content) == expected


def patched(at: int, field: bytes) -> bytes:
    """A tar whose first header holds `field` at this offset, with a checksum that fits."""
    content = bytearray(packed(*sample("a"), layout="ustar"))
    content[at : at + len(field)] = field
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


def pax(records: bytes) -> bytes:
    return packed((info("header", len(records), tarfile.XHDTYPE), records), *sample("a"), layout="ustar")


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "no end marker"),
    "text": (lambda: b"text " * 1000, "no end marker"),
    "compressed": (lambda: gzip.compress(packed(*sample("a"))), "it is compressed with gzip.*`gzip -dc`"),
    "bzip2": (lambda: bz2.compress(packed(*sample("a"))), "it is compressed with bzip2"),
    "xz": (lambda: lzma.compress(packed(*sample("a"))), "it is compressed with xz"),
    "ZIP": (lambda: b"PK\x03\x04" + bytes(600), "a ZIP archive"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "a page": (lambda: b"<!DOCTYPE html><html>" + b" " * 600, "a web page"),
    "an empty file": (lambda: b"", "the file is empty"),
    "cut": (lambda: packed(*sample("a"))[:2000], "truncated"),
    "no end marker": (lambda: packed(*sample("a"), layout="ustar")[: 4 * 512], "no end marker"),
    "something behind the end": (lambda: packed(*sample("a")) + b"x" * 512, "no end marker"),
    "symbolic link": (lambda: packed((info("a.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")), "symbolic"),
    "hard link": (lambda: packed((info("a.jpg", kind=tarfile.LNKTYPE, linkname="b.jpg"), b"")), "hard link"),
    "character device": (lambda: packed((info("a.jpg", kind=tarfile.CHRTYPE), b"")), "device"),
    "block device": (lambda: packed((info("a.jpg", kind=tarfile.BLKTYPE), b"")), "device"),
    "FIFO": (lambda: packed((info("a.jpg", kind=tarfile.FIFOTYPE), b"")), "FIFO"),
    "sparse": (lambda: patched(156, b"S"), "sparse"),
    "sparse by pax": (lambda: pax(b"28 GNU.sparse.realsize=99999\n"[:28]), "damaged pax|sparse"),
    "another type": (lambda: patched(156, b"Z"), "special"),
    "huge size": (lambda: patched(124, b"77777777777\0"), "truncated"),
    "huge binary size": (lambda: patched(124, b"\x80" + b"\xff" * 11), "truncated"),
    "negative size": (lambda: patched(124, b"\xff" * 12), "instead of a number"),
    "negative digits": (lambda: patched(124, b"-0000000001\0"), "instead of a number"),
    "size of letters": (lambda: patched(124, b"0x10\0"), "instead of a number"),
    "size by pax": (lambda: pax(b"19 size=9999999999\n"), "truncated"),
    "negative size by pax": (lambda: pax(b"11 size=-1\n"), "instead of a number"),
    "size of many digits by pax": (lambda: pax(b"5014 size=" + b"9" * 5003 + b"\n"), "instead of a number"),
    "pax header that is not": (lambda: pax(b"99 path=x\n"), "damaged pax"),
    "pax header without length": (lambda: pax(b"path=x\n"), "damaged pax"),
    "pax header of length 0": (lambda: pax(b"0 path=x\n"), "damaged pax"),
    "huge pax header": (lambda: pax(b"%d comment=" % 10**7 + b"x" * 10**7), "a header of"),
    "one name for all": (
        lambda: packed((info("g", 10, tarfile.XGLTYPE), b"10 path=x\n"), *sample("a"), layout="ustar"), "all files one"
    ),
    "huge long name": (
        lambda: packed((info("././@LongLink", 10**6, tarfile.GNUTYPE_LONGNAME), b"x" * 10**6), *sample("a")), "a header"
    ),
    "names up": (lambda: packed(*sample("../../a")), "not allowed for a file in a folder"),
    "names from the root": (lambda: patched(0, b"/a.jpg"), "not allowed for a file in a folder"),
    "terminal escapes": (lambda: packed(*sample("\x1b[31m")), "control characters"),
    "a second line": (lambda: packed(*sample("a\nb")), "control characters"),
    "right to left": (lambda: packed(*sample("a\u202eb")), "control characters"),
    "not UTF-8": (lambda: patched(0, b"\xff\xfe.jpg"), "not UTF-8"),
    "one file twice": (lambda: packed(*sample("a")[:1], *sample("a")[:1]), "occurs twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_tar_is_refused_with_little_memory(kind: str) -> None:
    content, message = HOSTILE[kind][0](), HOSTILE[kind][1]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_thousands_of_headers_without_a_file_are_no_recursion() -> None:
    header = packed((info("header", 10, tarfile.XHDTYPE), b"10 path=x\n"), layout="ustar")[:1024]
    assert read(header * 5000 + packed(*sample("a"), layout="ustar")) == [("a", {"cls": b"3"})]  # the image is now x


@given(st.data())
@settings(max_examples=300)
def test_any_damage_is_an_error_or_another_tar(data: st.DataObject) -> None:
    content = bytearray(packed(*sample("a"), *sample("Käse" * 18), layout=data.draw(st.sampled_from(sorted(FORMATS)))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, 2 * len(content))) :]
    with suppress(ValueError):
        assert all(key.isprintable() for key, _ in read(bytes(content)))


@pytest.mark.parametrize(
    ("text", "label"),
    [(b"7", 7), (b" 12\n", 12), (b"-1", -1), (b"", None), (b"1.0", None), (b"1e3", None), (b"9" * 5000, None),
     ("²".encode(), None), ("٣".encode(), None), (b"0x1", None), (b"1_0", None), (b"--1", None), (b"+1", None)],
)  # fmt: skip
def test_labels(text: bytes, label: int | None) -> None:
    assert tar.label(text) == label


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed(*sample("a", b"x" * 3000)))
    with open(path, "rb") as file:
        ((_, files),) = tar.samples(file, path.stat().st_size)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="truncated"):
            tar.read(file, files["jpg"])
