"""Damaged samples: how their names reach the rank in a batch, and the error when there are too many."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from scaleprog.errors import DataError

NAME_BYTES = 256
"""The longest name of a sample in a batch, in bytes; longer ones are cut."""
_NAMED = 8  # samples in an error


def write_names(names: Mapping[int, str], out: Tensor) -> None:
    """Writes names into some rows of `out`, (rows, NAME_BYTES) uint8, and zeros into all others."""
    out.zero_()
    for row, name in names.items():
        encoded = bytearray(name.encode()[:NAME_BYTES])
        out[row, : len(encoded)] = torch.frombuffer(encoded, dtype=torch.uint8)


def read_names(rows: Tensor) -> list[str]:
    """The names that `write_names` wrote, in the order of their rows."""
    if not rows[:, 0].any():  # as a rule
        return []
    written = rows[rows[:, 0] != 0].tolist()
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in written]


def too_many(names: Collection[str], most: int) -> DataError:
    """The error of a run that has met more than `most` damaged samples."""
    first = sorted(names)[:_NAMED]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return DataError(
        f"{len(names)} samples are damaged, more than data.most_damaged={most}: {', '.join(first)}{more}. Find all of "
        "them with `scaleprog shards check`, and rebuild their shards or raise data.most_damaged"
    )
