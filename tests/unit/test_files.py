"""Small files that anybody may have put there."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaleprog.files.atomic import read_text, write_parts


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("größer\r\n\0".encode())
    assert read_text(path) == "größer\r\n\0"
    (tmp_path / "link").symlink_to(path)
    assert read_text(tmp_path / "link") == "größer\r\n\0"
    path.write_bytes(b"")
    assert read_text(path) == ""


def test_what_is_missing_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_text(tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["FIFO", "folder", "socket", "device", "link to a FIFO"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to a FIFO":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "socket":
            listener.bind(str(path))
        with pytest.raises(OSError, match=r"not a regular file|No such device|Is a directory") as caught:
            read_text(path)
    assert not isinstance(caught.value, FileNotFoundError)
    assert str(path) in str(caught.value)


def test_no_more_than_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("12345678")
    assert read_text(path, limit=8) == "12345678"
    with pytest.raises(OSError, match="more than 7 bytes"):
        read_text(path, limit=7)
    with path.open("r+b") as file:
        file.truncate(2**40)  # holes only
    with pytest.raises(OSError, match="more than 16777216 bytes"):
        read_text(path)


def test_what_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    for content in (b"\xff", "größer".encode("latin-1"), b"\xed\xa0\x80", b"\xc3"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UnicodeDecodeError):
            read_text(tmp_path / "file")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), ValueError("bad"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(failure: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def parts() -> Iterator[bytes]:
        yield b"x" * 2**20
        raise failure

    with pytest.raises(type(failure)):
        write_parts(path, parts())
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"file": "old"}
