"""One rank's file of a checkpoint: a safetensors file of 1-D tensors, whose header the reader knows in advance.

The list of tensors determines every byte of the header. So a reader compares the header with the expected one and never
parses it: no file can dictate a size, a type or an offset. A reader reads only the elements that it needs. It does not
use a memory map, because a failing file system would then kill the process.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' name -> dtype."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 2**24  # bytes to write and hash at a time
MOST_UNSYNCED = 2**30  # bytes; a slow disk that takes them one after the other still makes progress that can be seen


@dataclass(frozen=True)
class Layout:
    """The header of a file and the offsets of its tensors."""

    header: bytes
    starts: Mapping[str, int]
    """Offset of each tensor's first byte in the file."""
    size: int
    """Size of the whole file in bytes."""

    @classmethod
    def of(cls, held: Mapping[str, tuple[str, int]]) -> "Layout":
        """The layout of a file that holds these tensors: name -> (dtype, elements)."""
        ordered = sorted(held.items(), key=lambda item: (-DTYPES[item[1][0]].itemsize, item[0]))  # aligns all of them
        entries, offsets, offset = {}, {}, 0
        for name, (dtype, count) in ordered:
            end = offset + count * DTYPES[dtype].itemsize
            entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": [offset, end]}
            offsets[name], offset = offset, end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, {name: len(header) + at for name, at in offsets.items()}, len(header) + offset)


def write(path: Path, tensors: Mapping[str, Tensor], wrote: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Writes 1-D tensors in host memory and syncs them to disk; calls `wrote` after each block and each sync.

    Returns bytes and SHA-256. Raises OSError.
    """
    layout = Layout.of({name: (NAMES[tensor.dtype], tensor.numel()) for name, tensor in tensors.items()})
    digest, unsynced = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for content in (memoryview(layout.header), *(_bytes(tensors[name]) for name in layout.starts)):
            for start in range(0, len(content), BLOCK):
                block = content[start : start + BLOCK]
                digest.update(block)  # of the data in memory, so that a reader notices a disk that corrupted it
                file.write(block)
                wrote()
                unsynced += len(block)
                if unsynced >= MOST_UNSYNCED:
                    _sync(file)
                    wrote()
                    unsynced = 0
        _sync(file)
    return layout.size, digest.hexdigest()


def check(file: BufferedReader, layout: Layout, sha256: str | None = None) -> None:
    """Raises ValueError unless a file has the expected size, checksum (None: any) and header."""
    size = os.fstat(file.fileno()).st_size
    if size != layout.size:
        raise ValueError(f"{size} bytes, {layout.size} expected")
    if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
        raise ValueError("the checksum differs")
    file.seek(0)
    if file.read(len(layout.header)) != layout.header:
        raise ValueError("its header does not match the manifest's tensors")


def read(file: BufferedReader, start: int, target: Tensor) -> None:
    """Fills a contiguous 1-D tensor on any device with a file's bytes, beginning at byte `start`.

    Raises ValueError if the file is too short.
    """
    host = target if target.device.type == "cpu" else torch.empty(target.shape, dtype=target.dtype)
    content = _bytes(host)
    file.seek(start)
    done = 0
    while done < len(content):
        count = file.readinto(content[done:])
        if not count:
            raise ValueError(f"ends after {start + done} bytes")
        done += count
    if host is not target:
        target.copy_(host)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
