"""Checks a folder of shards against its manifest, and writes a manifest for WebDataset shards made elsewhere.

The folder may lie behind a URL; its shards are read there, and not copied.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from scaleprog.data import labels, packed, tar
from scaleprog.data.decode import problem_of
from scaleprog.data.labels import Numbering
from scaleprog.data.manifest import NAME, Manifest, split_of
from scaleprog.data.shard import EXTENSIONS, IMAGE_EXTENSIONS
from scaleprog.data.source import GZIPPED, SHARD_NAME, Folder, Shard, Source, inflated, source_of
from scaleprog.errors import DataError
from scaleprog.files.display import as_text
from scaleprog.recipe.numbers import MOST_CLASSES
from scaleprog.shards.build import SPLITS, STAGING
from scaleprog.shards.pool import listed, run_all, some
from scaleprog.shards.samples import image_extension, members_of

TRAIN = "train"


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

    bytes: int = 0
    sha256: str = ""
    samples: int = 0
    labels: set[int | str] = field(default_factory=set)
    packed: bool = False
    """Whether the first image is packed."""
    problems: list[str] = field(default_factory=list)
    """One line per problem, with the shard and, if the problem is in one sample, its key."""
    damaged: list[str] = field(default_factory=list)
    """One line per image that cannot be decoded, with the shard and the key."""


def check(out: Path | str, *, manifest: str | None = None, workers: int | None = None) -> Report:
    """Reads every shard of `out`, and checks its size, checksum, and number of samples.

    Also checks that every sample has one image and one label in range.

    Args:
        out: the folder of the shards, a path or URL.
        manifest: file of the manifest; default: the one in `out`.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: there is no manifest, or a shard has problems; lists the first twenty, each with its shard and key.
        Unavailable: a server does not answer.
    """
    indexed, source = Manifest.load(out, manifest), source_of(out)
    shards = list(chain(*indexed.splits.values()))
    jobs = [(source, shard, indexed.classes) for shard in shards]
    problems = list(chain(*run_all(_compare, jobs, label=f"{out}: shards checked", workers=workers)))
    if isinstance(source, Folder):
        known = {shard.name for shard in shards}
        problems += [
            f"{source.path(name)}: not in {NAME}; remove it, or index it with --write-manifest"
            for name in chain(*_by_split(source.files()).values())
            if name not in known
        ]
    if problems:
        raise DataError(f"{out}: {len(problems)} problems\n{listed(problems)}")
    return _report(indexed)


def write_manifest(
    out: Path | str,
    classes: Sequence[str] | None = None,
    *,
    manifest: str | None = None,
    keep_damaged: bool = False,
    workers: int | None = None,
) -> Report:
    """Indexes the shards in `out`, and writes `out/manifest.json`, or `manifest` in its place.

    The tars may come from elsewhere: from `webdataset.ShardWriter`, from img2dataset, or from timm. A word in a name
    says the split of a shard (train, val, validation); where no name says train, those without such a word are for
    training.

    Args:
        out: the folder of the shards, a path or URL.
        classes: names of the classes; default: those of a manifest that is already there; otherwise the names that the
            labels are, or "0", "1", ... up to the largest label.
        manifest: file of the manifest; a URL needs one.
        keep_damaged: whether training images that cannot be decoded are no problem, because `data.damaged` is replace.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: there are no shards, or a shard has problems; lists them, each with its shard and key.
        Unavailable: a server does not answer.
    """
    source = source_of(out)
    if manifest is None and not isinstance(source, Folder):
        raise DataError(
            f"{out}: no {NAME} can be written behind a URL; add --manifest FILE, and data.manifest: FILE later"
        )
    if isinstance(source, Folder) and Path(source.path(STAGING)).exists():
        raise DataError(
            f"{out}: an interrupted build has left a part of its shards in {STAGING}; run its command again, or remove "
            f"{source.path(STAGING)} to index the other shards alone"
        )
    splits = _shards_in(source)
    if classes is None and Path(manifest or source.path(NAME)).exists():
        classes = Manifest.load(out, manifest).classes
    known = None if classes is None else tuple(classes)
    jobs = [(source, name, known, keep_damaged and split == TRAIN) for split, found in splits.items() for name in found]
    contents = dict(
        zip(chain(*splits.values()), run_all(_index, jobs, label=f"{out}: shards indexed", workers=workers))
    )
    if problems := list(chain(*(each.problems for each in contents.values()))):
        raise DataError(f"{out}: {len(problems)} problems, no {NAME} written\n{listed(problems)}")
    names = tuple(classes) if classes is not None else _names(out, chain(*(each.labels for each in contents.values())))
    indexed = {
        split: tuple(Shard(name, contents[name].samples, contents[name].bytes, contents[name].sha256) for name in found)
        for split, found in splits.items()
    }
    kept = [line for each in contents.values() for line in each.damaged]
    found = {split: shards for split, shards in indexed.items() if shards}
    written = Manifest(source.root, names, found, sound=not kept)
    written.save(manifest)
    numbering = Numbering(names)
    trained = {numbering.number(label) for name in splits[TRAIN] for label in contents[name].labels}
    if absent := [label for label in range(len(names)) if trained and label not in trained]:
        hint = "; if the labels count from 1, subtract 1 from each and build the shards again" if absent[0] == 0 else ""
        named = some([f"{label} ({names[label]})" if names[label] != str(label) else str(label) for label in absent])
        print(as_text(f"note: no training image has label {named}{hint}"))
    if kept:
        print(as_text(f"note: train with data.damaged=replace: {len(kept)} damaged images\n{listed(kept)}", lines=True))
    return _report(written)


def read_contents(source: Source, name: str, classes: Sequence[str] | None) -> Contents:
    """Reads one shard from beginning to end. If `classes` is None, labels may be any names, or less than 10^6."""
    numbering = None if classes is None else Numbering(classes)
    contents = Contents()
    keys: set[str] = set()
    try:
        path, shard = source.path(name), source.fetch(name)
        contents.bytes, contents.sha256 = len(shard), hashlib.sha256(shard).hexdigest()
        shard = inflated(name, shard, path)
        for key, members in members_of(shard, len(shard), path):
            contents.samples += 1
            try:
                if wrong := _image_problem(members, contents):
                    contents.damaged.append(f"{path}: key {key!r}: {wrong}; remove or replace it, or see data.damaged")
                label = _label(members, numbering)
                if key in keys:
                    raise ValueError("the key occurs twice")
                keys.add(key)
                contents.labels.add(label)
            except ValueError as error:
                complete = labels.kind_of(members) and any(extension in members for extension in IMAGE_EXTENSIONS)
                why = "" if complete else tar.why_incomplete(shard, len(shard), key, members, EXTENSIONS)
                contents.problems.append(f"{path}: key {key!r}: {error}{': ' if why else ''}{why}")
                if why:
                    return contents  # the other samples have the same problem
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


def _label(members: Mapping[str, bytes], numbering: Numbering | None) -> int | str:
    """The label of a sample: a number, or a name if the classes are not known yet. Raises ValueError."""
    kind = labels.kind_of(members)
    if kind is None:
        raise ValueError(f"no .cls member, and no .json ({', '.join(members)})")
    label = labels.parse(kind, members[kind])
    if isinstance(label, str):
        return label if numbering is None else numbering.number(label)
    if label < 0:
        raise ValueError(f".{kind} is {members[kind].strip()[:20]!r}, expected a class index such as b'7'")
    known = MOST_CLASSES if numbering is None else numbering.count
    if label >= known:
        raise ValueError(f"label {label} is out of range; with {known} classes, labels are 0 to {known - 1}")
    return label


def _shards_in(source: Source) -> dict[str, list[str]]:
    """The names of the shards of each split, sorted. Raises DataError if there are none."""
    files = source.files()
    splits = _by_split(files)
    if not any(splits.values()):
        compressed = [name for name in files if re.search(r"\.tar\.[a-z0-9]+$", name)]
        hint = f"; {compressed[0]} is compressed: unpack it to a plain tar" if compressed else ""
        raise DataError(
            f"{source.root}: no shards named *.tar; give the folder that holds them, or rename them so that a word of "
            f"each name says train or val{hint}"
        )
    taken = set(chain(*splits.values()))
    bare: dict[str, str] = {}
    for name in sorted(taken):
        other = bare.setdefault(re.sub(r"\.(tar|tar\.gz|tgz)$", "", name), name)
        if other != name:
            raise DataError(f"{source.root}: {other} and {name} look like one shard, once compressed; remove one")
    if left := [
        name for name in files if name.endswith((".tar", *GZIPPED)) and not name.startswith(".") and name not in taken
    ]:
        print(as_text(f"note: left out, because their names say neither train nor val: {some(left)}"))
    return splits


def _by_split(files: Iterable[str]) -> dict[str, list[str]]:
    """The names of shards among those of files, by split; those without a split are for training if no others are."""
    found: dict[str | None, list[str]] = {}
    for name in files:
        if re.search(SHARD_NAME, name):
            found.setdefault(split_of(name), []).append(name)
    return {split: found.get(split) or (found.get(None, []) if split == TRAIN else []) for split in SPLITS}


def _names(out: Path | str, found: Iterable[int | str]) -> tuple[str, ...]:
    """The names of the classes that have these labels. Raises DataError."""
    distinct = set(found)
    texts = sorted(label for label in distinct if isinstance(label, str))
    if not texts:
        return tuple(map(str, range(max(label for label in distinct if isinstance(label, int)) + 1)))
    if len(texts) < len(distinct):
        raise DataError(
            f"{out}: some labels are names ({texts[0]!r}, ...) and others numbers; give the names of the classes, in "
            "the order of their numbers, with --classes FILE"
        )
    return tuple(texts)


def _compare(job: tuple[Source, Shard, Sequence[str]]) -> list[str]:
    """The problems of one shard in the manifest."""
    source, indexed, classes = job
    path = source.path(indexed.name)
    if isinstance(source, Folder) and not Path(path).is_file():
        return [f"{path}: {NAME} lists this shard, but it is missing; copy or build it again"]
    problems = []
    contents = read_contents(source, indexed.name, classes)
    if not contents.sha256:
        return contents.problems
    if contents.bytes != indexed.bytes:
        problems.append(f"{path}: has {contents.bytes} bytes, but {NAME} says {indexed.bytes}; copy or build it again")
    elif contents.sha256 != indexed.sha256:
        problems.append(f"{path}: damaged: its checksum differs from {NAME}; copy or build it again")
    elif contents.samples != indexed.samples:
        problems.append(
            f"{path}: has {contents.samples} samples, but {NAME} says {indexed.samples}; use --write-manifest"
        )
    return problems + contents.problems + contents.damaged


def _index(job: tuple[Source, str, Sequence[str] | None, bool]) -> Contents:
    """The contents of a shard that is in no manifest yet.

    `job`: the shard's source and name, the names of the classes, and whether it may have damaged images.
    """
    source, name, classes, keep_damaged = job
    contents = read_contents(source, name, classes)
    if not keep_damaged:
        contents.problems += contents.damaged
    if not contents.samples and not contents.problems:
        contents.problems.append(f"{source.path(name)}: holds no samples; remove it")
    if not name.isprintable():
        contents.problems.append(f"{name!r}: a shard cannot have this name; rename it")
    return contents


def _report(manifest: Manifest) -> Report:
    shards = list(chain(*manifest.splits.values()))
    samples = {split: manifest.samples(split) for split in manifest.splits}
    return Report(len(manifest.classes), len(shards), samples, sum(shard.bytes for shard in shards))
