"""Builds shards from a CSV file of image paths and labels. Images keep their bytes, unless they are to be reduced.

path,label,split             a header, and a row for each image; paths are relative to the CSV file's folder
photos/1.jpg,cat,train       labels are names of classes, which are numbered in sorted order; numbers by their value
photos/2.jpg,dog,val         without the column `split`, a part drawn by seed becomes the validation split
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from scaleprog.data.manifest import Manifest
from scaleprog.errors import DataError
from scaleprog.files.atomic import read_text
from scaleprog.shards.build import SPLITS
from scaleprog.shards.image_files import (
    Image,
    build_shards,
    check_apart,
    digest_of_labels,
    fingerprint,
    labeled,
    once,
    shuffled,
    split_off,
)
from scaleprog.shards.pool import listed, some
from scaleprog.shards.reduction import Reduction

MOST_BYTES = 2**30
"""The largest CSV file that is read, in bytes."""


def build(
    src: Path,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    val_fraction: float = 0.1,
    reduction: Reduction | None = None,
    workers: int | None = None,
) -> Manifest:
    """Builds the shards in `out` from the images named in the rows of `src`. Shuffles each split once.

    Args:
        src: the CSV file.
        out: the folder of the shards.
        samples_per_shard: the most samples in one shard.
        seed: seed of the order of the samples.
        val_fraction: fraction of the images to split off for validation (at least one) if there is no column `split`.
        reduction: how to reduce large images; None: all images keep their bytes.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: `src` is not such a file, or names a file that is not an image; `out` holds something else or cannot
            be written.
        Unavailable: an image cannot be read now. The same call resumes.
    """
    classes, images = _images_by_split(src, seed, val_fraction)
    source = {
        "builder": "csv",
        "files": fingerprint(src.parent, images),
        "labels": digest_of_labels(classes, images),
        "seed": seed,
        "val_fraction": val_fraction,
    }
    return build_shards(
        out,
        images,
        classes=classes,
        source=source,
        samples_per_shard=samples_per_shard,
        reduction=reduction,
        workers=workers,
    )


def _images_by_split(src: Path, seed: int, val_fraction: float) -> tuple[list[str], dict[str, list[Image]]]:
    """The class names, and the images of each split in the order of the shards."""
    rows = _rows(src)
    names = {row["label"] for row in rows}
    numbers = all(re.fullmatch("[0-9]{1,18}", name) for name in names)
    classes = sorted(names, key=lambda name: (int(name) if numbers else 0, name))
    labels = {name: label for label, name in enumerate(classes)}
    files = [(row["label"], src.parent / row["path"]) for row in rows]
    apart = once(files)
    if "split" not in rows[0]:
        if len(apart) < len(files):
            print(
                f"note: {src} names {len(files) - len(apart)} images again; without a column `split`, each counts once"
            )
        return classes, split_off(shuffled(labeled(apart, labels), [seed, 0]), val_fraction, src)
    found = {split: [file for file, row in zip(files, rows) if row["split"] == split] for split in SPLITS}
    if empty := [split for split in SPLITS if not found[split]]:
        raise DataError(f"{src}: no rows of the split {empty[0]}; add some, or remove the column `split`")
    trained = {name for name, _ in found["train"]}
    if unknown := sorted({name for name, _ in found["val"]} - trained):
        raise DataError(
            f"{src}: labels of the split val that no row of the split train has: {some(unknown)}. Add training images "
            "of them, or correct the labels."
        )
    check_apart(*found.values())
    return classes, {split: shuffled(labeled(found[split], labels), [seed, i]) for i, split in enumerate(SPLITS)}


def _rows(src: Path) -> Sequence[dict[str, str]]:
    """The rows of the file, at least one. Raises DataError with a list of the first invalid rows."""
    try:
        text = read_text(src, MOST_BYTES).removeprefix("\ufeff")  # with which Excel begins a file
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{src}: cannot be read: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        raise DataError(f"{src}: line {reader.line_num}: {error}") from error
    if set(header) not in ({"path", "label"}, {"path", "label", "split"}) or len(header) != len(set(header)):
        raise DataError(
            f"{src}: the first line must be path,label or path,label,split; here it is {','.join(header)[:100]!r}"
        )
    problems = []
    for line, row in enumerate(rows, start=2):
        if None in row or not all(row.values()):
            problems.append(f"{src}: row {line} must have {len(header)} nonempty values")
        elif wrong := [value for value in row.values() if re.search(r"[\0\r\n]", value)]:
            problems.append(f"{src}: row {line}: {wrong[0][:40]!r} has a line break or a NUL")
        elif row["label"] != row["label"].strip():
            problems.append(f"{src}: row {line}: the label {row['label'][:40]!r} begins or ends with a blank")
        elif row.get("split", "train") not in SPLITS:
            problems.append(f"{src}: row {line}: split is {row['split'][:20]!r}, not {' or '.join(SPLITS)}")
    if problems or not rows:
        raise DataError(listed(problems) if problems else f"{src}: no rows after the header; add some")
    return rows
