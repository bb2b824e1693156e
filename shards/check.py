"""Checks a folder of shards against its manifest, and writes a manifest for WebDataset shards made elsewhere."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from scaleprog.data import packed
from scaleprog.data.decode import problem_of
from scaleprog.data.manifest import NAME, SHARD_NAME, Manifest, Shard
from scaleprog.data.shard import IMAGE_EXTENSIONS
from scaleprog.errors import DataError
from scaleprog.files.display import as_text
from scaleprog.recipe.numbers import MOST_CLASSES
from scaleprog.shards.build import SPLITS, shard_files
from scaleprog.shards.pool import listed, run_all, some
from scaleprog.shards.samples import image_extension, read_label, read_members, why_incomplete


@dataclass(frozen=True)
class Report:
    """The contents of a folder of undamaged shards."""

    classes: int
    shards: int
    samples: dict[str, int]
    """Samples by split."""
    bytes: int

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {split}" for split, count in self.samples.items())
        return f"{self.shards} shards, {self.bytes / 1e6:.1f} MB, {counts} samples, {self.classes} classes: all intact"


@dataclass
class Contents:
    """The result of reading one shard from beginning to end."""

    samples: int = 0
    labels: set[int] = field(default_factory=set)
    packed: bool = False
    """Whether the first image is packed."""
    problems: list[str] = field(default_factory=list)
    """One line per problem, with the shard and, if the problem is in one sample, its key."""
    damaged: list[str] = field(default_factory=list)
    """One line per image that cannot be decoded, with the shard and the key."""


def check(out: Path, *, workers: int | None = None) -> Report:
    """Reads every shard of `out`, and checks its size, checksum, and number of samples.

    Also checks that every sample has one image and one label in range.

    Args:
        out: the folder of the shards.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: there is no manifest, or a shard has problems; lists the first twenty, each with its shard and key.
    """
    manifest = Manifest.load(out)
    shards = list(chain(*manifest.splits.values()))
    jobs = [(Path(manifest.path(shard)), shard, len(manifest.classes)) for shard in shards]
    problems = list(chain(*run_all(_compare, jobs, label=f"{out}: shards checked", workers=workers)))
    known = {shard.name for shard in shards}
    problems += [
        f"{path}: not in {NAME}; remove it, or index it with --write-manifest"
        for path in shard_files(out)
        if path.name not in known
    ]
    if problems:
        raise DataError(f"{out}: {len(problems)} problems\n{listed(problems)}")
    return _report(manifest)


def write_manifest(
    out: Path, classes: Sequence[str] | None = None, *, keep_damaged: bool = False, workers: int | None = None
) -> Report:
    """Indexes the train-*.tar and val-*.tar in `out`, and writes `out/manifest.json`.

    The tars may come from elsewhere, for example from `webdataset.ShardWriter`.

    Args:
        out: the folder of the shards.
        classes: names of the classes; default: those of a manifest already in `out`, otherwise "0", "1", ... up to
            the largest label.
        keep_damaged: whether training images that cannot be decoded are no problem, because `data.damaged` is replace.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: there are no shards, or a shard has problems; lists them, each with its shard and key.
    """
    paths = shard_files(out)
    if not paths:
        packed = [path.name for split in SPLITS for path in sorted(out.glob(f"{split}-*.tar.*"))] + [
            path.name for split in SPLITS for path in sorted(out.glob(f"{split}-*.tgz"))
        ]
        hint = f"; {packed[0]} is compressed: unpack it to a plain tar" if packed else ""
        raise DataError(
            f"{out}: no shards named train-*.tar or val-*.tar; give the folder that holds them, or rename them{hint}"
        )
    if classes is None and Path(out, NAME).exists():
        classes = Manifest.load(out).classes
    known = None if classes is None else len(classes)
    jobs = [(path, known, keep_damaged and path.name.startswith("train-")) for path in paths]
    found = run_all(_index, jobs, label=f"{out}: shards indexed", workers=workers)
    if problems := list(chain(*(contents.problems for _, contents in found))):
        raise DataError(f"{out}: {len(problems)} problems, no {NAME} written\n{listed(problems)}")
    largest = max(max(contents.labels) for _, contents in found)
    names = tuple(classes) if classes is not None else tuple(str(label) for label in range(largest + 1))
    indexed = [shard for shard, _ in found if shard is not None]
    by_split = {split: tuple(shard for shard in indexed if shard.name.startswith(f"{split}-")) for split in SPLITS}
    manifest = Manifest(str(out), names, {split: shards for split, shards in by_split.items() if shards})
    manifest.save()
    trained = set().union(*(contents.labels for shard, contents in found if shard and shard.name.startswith("train-")))
    if absent := [label for label in range(len(names)) if trained and label not in trained]:
        hint = "; if the labels count from 1, subtract 1 from each and build the shards again" if absent[0] == 0 else ""
        named = some([f"{label} ({names[label]})" if names[label] != str(label) else str(label) for label in absent])
        print(as_text(f"note: no training image has label {named}{hint}"))
    if kept := [line for _, contents in found for line in contents.damaged]:
        print(as_text(f"note: train with data.damaged=replace: {len(kept)} damaged images\n{listed(kept)}", lines=True))
    return _report(manifest)


def read_contents(path: Path, classes: int | None) -> Contents:
    """Reads one shard from beginning to end. Labels must be less than `classes`; if that is None, less than 10^6."""
    known = MOST_CLASSES if classes is None else classes
    contents = Contents()
    keys: set[str] = set()
    try:
        for key, members in read_members(path):
            contents.samples += 1
            try:
                if wrong := _image_problem(members, contents):
                    contents.damaged.append(f"{path}: key {key!r}: {wrong}; remove or replace it, or see data.damaged")
                label = read_label(members)
                if label >= known:
                    raise ValueError(
                        f"label {label} is out of range; with {known} classes, labels are 0 to {known - 1}"
                    )
                if key in keys:
                    raise ValueError("the key occurs twice")
                keys.add(key)
                contents.labels.add(label)
            except ValueError as error:
                complete = "cls" in members and any(extension in members for extension in IMAGE_EXTENSIONS)
                if not complete and (why := why_incomplete(path, key, members)):
                    contents.problems.append(f"{path}: key {key!r}: {error}: {why}")
                    return contents  # the other samples have the same problem
                contents.problems.append(f"{path}: key {key!r}: {error}")
    except DataError as error:
        contents.problems.append(str(error))
    return contents


def _image_problem(members: Mapping[str, bytes], contents: Contents) -> str:
    """What is wrong with the image of the latest sample of `contents`; empty if nothing is. Raises ValueError."""
    extension = image_extension(members)
    packed_image = extension == packed.EXTENSION
    if contents.samples == 1:
        contents.packed = packed_image
    if packed_image != contents.packed:
        raise ValueError("the shard holds both packed and encoded images")
    return packed.problem_of(members) if packed_image else problem_of(members[extension])


def _compare(job: tuple[Path, Shard, int]) -> list[str]:
    """The problems of one shard in the manifest."""
    path, indexed, classes = job
    if not path.is_file():
        return [f"{path}: {NAME} lists this shard, but it is missing; copy or build it again"]
    problems = []
    contents = read_contents(path, classes)
    try:
        actual = Shard.measure(path, contents.samples)
    except OSError as error:
        return [f"{path}: cannot be read: {error}", *contents.problems]
    if actual.bytes != indexed.bytes:
        problems.append(f"{path}: has {actual.bytes} bytes, but {NAME} says {indexed.bytes}; copy or build it again")
    elif actual.sha256 != indexed.sha256:
        problems.append(f"{path}: damaged: its checksum differs from {NAME}; copy or build it again")
    elif actual.samples != indexed.samples:
        problems.append(
            f"{path}: has {actual.samples} samples, but {NAME} says {indexed.samples}; use --write-manifest"
        )
    return problems + contents.problems + contents.damaged


def _index(job: tuple[Path, int | None, bool]) -> tuple[Shard | None, Contents]:
    """The manifest entry of a shard (None if the shard has problems), and its contents.

    `job`: the shard, the number of classes, and whether it may have damaged images.
    """
    path, classes, keep_damaged = job
    contents = read_contents(path, classes)
    if not keep_damaged:
        contents.problems += contents.damaged
    if not contents.samples and not contents.problems:
        contents.problems.append(f"{path}: holds no samples; remove it")
    if not re.search(SHARD_NAME, path.name) or not path.name.isprintable():
        contents.problems.append(f"{str(path)!r}: a shard cannot have this name; rename it")
    try:
        return None if contents.problems else Shard.measure(path, contents.samples), contents
    except OSError as error:
        contents.problems.append(f"{path}: cannot be read: {error}")
        return None, contents


def _report(manifest: Manifest) -> Report:
    shards = list(chain(*manifest.splits.values()))
    samples = {split: manifest.samples(split) for split in manifest.splits}
    return Report(len(manifest.classes), len(shards), samples, sum(shard.bytes for shard in shards))
