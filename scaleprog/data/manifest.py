"""The index beside the shards: how many samples each holds, its size and checksum, and what the labels mean."""

import hashlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import FailFast, Field, ValidationError, field_validator, model_validator

from scaleprog.data.source import GZIPPED, MOST_BYTES, MOST_INFLATED, Folder, Shard, Source, source_of
from scaleprog.data.store import Store
from scaleprog.data.tar import SMALLEST_SAMPLE
from scaleprog.errors import AbsentData, DataError
from scaleprog.files.atomic import sync_folder, write_whole
from scaleprog.recipe.numbers import MOST_CLASSES, Settings

NAME = "manifest.json"
VERSION = 1
SOUND = "sound"
"""The key of `source` by which the file says that the images are sound, so that older versions read it, too."""
MOST_KEYS = 100
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Words in names of shards, and the splits that they mean."""


def split_of(name: str) -> str | None:
    """The split that the name of a shard says, by its first word that says one; None if no word does."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


@dataclass(frozen=True)
class Manifest:
    """All shards of one data set and its class names. The order of the shards affects the order of the data."""

    root: str
    """The folder of the shards, a path or URL; not stored, so that the folder can be moved, and so that no manifest
    leads to a place that the user has not named."""
    classes: tuple[str, ...]
    """Class names; the index is the label."""
    splits: Mapping[str, tuple[Shard, ...]]
    """Shards by split: "train", "val"."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What the shards were built from, so that a builder recognizes its own finished work; empty if unknown."""
    store: Store | None = field(default=None, compare=False)
    """Keeps shards that come from a URL; not stored."""
    sound: bool = field(default=False, compare=False)
    """Whether every image was decoded completely, without an error, when the manifest was written."""

    @classmethod
    def load(cls, root: str | os.PathLike[str], file: str | None = None) -> Self:
        """Reads `root/manifest.json`, or a local `file` in its place.

        Raises:
            AbsentData: the folder or the manifest is missing.
            DataError: the manifest is unreadable or malformed, or has an unknown version.
            Unavailable: it cannot be read now.
        """
        source = source_of(root)
        path = file or source.path(NAME)
        if file is None and isinstance(source, Folder) and not Path(source.root).is_dir():
            if Path(source.root).is_file():
                raise DataError(f"{root}: a file; give the folder that holds the shards and {NAME}")
            if str(root).startswith("~"):
                raise DataError(f"{root}: the folder of shards does not exist: ~ is not expanded here; write $HOME")
            example = "digits" if Path(source.root).name == "digits" else "fashion-mnist"
            raise AbsentData(
                f"{root}: the folder of shards does not exist. Build it with `scaleprog shards image-folder SRC "
                f"{root}` or, to try scaleprog, `scaleprog shards {example} {root}`.",
                f"{root}: the folder of shards does not exist",
            )
        try:
            text = Folder("").text(file) if file else source.text(NAME)
        except FileNotFoundError:
            raise AbsentData(_missing(source, os.fspath(root), file), f"{path}: there is no such manifest") from None
        stored = _parse(path, text, source.root)
        known = {key: value for key, value in stored.source.items() if key != SOUND}
        return cls(source.root, stored.classes, stored.splits, known, sound=stored.source.get(SOUND) is True)

    def save(self, file: str | None = None) -> None:
        """Writes `root/manifest.json`, or `file`, atomically: even a power failure cannot leave half a file.

        Raises:
            DataError: it cannot be written.
        """
        path = Path(file or os.path.join(self.root, NAME))
        stored = {
            "kind": "scaleprog-manifest",
            "version": VERSION,
            "classes": self.classes,
            "source": {**self.source, **({SOUND: True} if self.sound else {})},
            "splits": {name: [asdict(shard) for shard in shards] for name, shards in self.splits.items()},
        }
        try:
            write_whole(path, json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
            sync_folder(path.parent)
        except OSError as error:
            raise DataError(f"{path.parent}: cannot write {path.name}: {error}") from error

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of split `name`. Raises DataError if the data set has no such split."""
        if name not in self.splits:
            there = ", ".join(self.splits) or "none"
            raise DataError(
                f"{self.root}: {NAME} has no split {name!r} (it has: {there}); add {name}-*.tar and index again."
            )
        return self.splits[name]

    def first(self, name: str, shards: int | None) -> "Manifest":
        """The same data set with only the first `shards` shards of a split (None: all).

        Raises:
            DataError: the split has fewer.
        """
        if shards is None:
            return self
        if shards > len(self.split(name)):
            raise DataError(f"data.shards: {shards}, but {self.root} has {len(self.split(name))} shards of {name!r}")
        return replace(self, splits={**self.splits, name: self.split(name)[:shards]})

    def samples(self, name: str) -> int:
        """Number of samples in split `name`. Raises DataError if the data set has no such split."""
        return sum(shard.samples for shard in self.split(name))

    def identity(self) -> dict[str, str]:
        """What tells one data set's contents from another's, wherever it lies: a line per split and for the classes."""

        def line(count: int, what: str, content: object) -> str:
            return f"{count} {what}, {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"

        splits = {
            name: line(self.samples(name), "samples", [[shard.samples, shard.sha256] for shard in self.splits[name]])
            for name in ("train", "val")
            if name in self.splits
        }
        return splits | {"classes": line(len(self.classes), "classes", list(self.classes))}

    def path(self, shard: Shard) -> str:
        """The path or URL of `shard`."""
        return source_of(self.root).path(shard.name)

    def verify_sizes(self, name: str) -> None:
        """Checks that every local shard of split `name` exists and has the right size, without reading any shard.

        Shards behind a URL are checked when they are read.

        Raises:
            AbsentData: a shard is missing; the message names the first one with a problem and counts the others.
            DataError: the first one with a problem has another size.
        """
        if not isinstance(source_of(self.root), Folder):
            return
        problems = [(shard, problem) for shard in self.split(name) if (problem := self._size_problem(shard))]
        if problems:
            shard, problem = problems[0]
            others = f" {len(problems) - 1} more shards of {name!r} have a similar problem." if problems[1:] else ""
            if not os.path.lexists(self.path(shard)):
                raise AbsentData(f"{problem}{others}", f"{self.path(shard)}: {NAME} lists it, but it is not there")
            raise DataError(f"{problem}{others}")

    def verify_counts(self, name: str) -> None:
        """Checks that the shards of split `name` are large enough for their samples, without reading any shard.

        Raises:
            DataError: a shard is too small for the number of samples in the manifest.
        """
        for shard in self.split(name):
            most = shard.bytes * (MOST_INFLATED if shard.name.endswith(GZIPPED) else 1)
            if shard.samples * SMALLEST_SAMPLE > most:
                raise DataError(
                    f"{self.path(shard)}: {NAME} says {shard.samples} samples in {shard.bytes} bytes, which is "
                    f"impossible. Rewrite {NAME}: {_rewrite(self.root)}."
                )

    def _size_problem(self, shard: Shard) -> str | None:
        path = self.path(shard)
        try:
            found = os.stat(path)
        except OSError as error:
            return f"{path}: {NAME} lists this shard, but: {error.strerror}. Copy it again or rebuild it."
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            return f"{path}: {NAME} lists this shard, but it is not a regular file. Copy it again or rebuild it."
        if size > MOST_BYTES:
            return f"{path}: {size} bytes, but a shard may have at most {MOST_BYTES}. Build smaller shards."
        if size == shard.bytes:
            return None if os.access(path, os.R_OK) else f"{path}: you may not read this shard. Make it readable."
        state = "truncated" if size < shard.bytes else "not the indexed file"
        return f"{path}: {state}, {size} bytes where {NAME} says {shard.bytes}. Copy it again or rebuild it."


class _Stored(Settings):
    """The schema of manifest.json."""

    kind: Literal["scaleprog-manifest"]
    version: Literal[1]
    classes: Annotated[tuple[str, ...], Field(max_length=MOST_CLASSES), FailFast()]
    source: dict[str, Annotated[str, Field(max_length=4096)] | int | float | bool | None] = Field(default_factory=dict)
    splits: dict[Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,64}$")], Annotated[tuple[Shard, ...], FailFast()]]

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, values: Any) -> Any:
        """Limits the number of keys, because pydantic collects an error for each wrong one, even for a million."""
        for group in (values, *values.values()) if isinstance(values, dict) else ():
            if isinstance(group, dict) and len(group) > MOST_KEYS:
                raise ValueError(f"a mapping has {len(group)} keys; at most {MOST_KEYS} are allowed")
        return values

    @field_validator("classes")
    @classmethod
    def _readable_classes(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if not all(name.isascii() or name.encode("utf-8", "ignore").decode() == name for name in classes):
            raise ValueError("the name of a class is not valid text")  # JSON can encode half of a surrogate pair
        return classes

    @field_validator("splits")
    @classmethod
    def _shards_in_order(cls, splits: dict[str, tuple[Shard, ...]]) -> dict[str, tuple[Shard, ...]]:
        names = [shard.name for shards in splits.values() for shard in shards]
        if len(set(names)) < len(names):
            raise ValueError("a shard is listed twice")
        for split, shards in splits.items():
            for before, shard in pairwise(shards):  # the order of the shards is that of the samples
                if shard.name < before.name:
                    raise ValueError(f"split {split!r} lists {shard.name} after {before.name}")
            if other := next((shard.name for shard in shards if split_of(shard.name) not in (split, None)), None):
                raise ValueError(f"split {split!r} lists {other}, whose name says {split_of(other)!r}")
        return splits


def _parse(path: str, text: str, root: str) -> _Stored:
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed, not JSON: {error}. Rewrite it: {_rewrite(root)}.") from None
    ours = isinstance(value, dict) and value.get("kind") == "scaleprog-manifest"
    if ours and (value.get("version") != VERSION or type(value["version"]) is not int):
        raise DataError(
            f"{path}: format version {reprlib.repr(value.get('version'))}, but this scaleprog reads version {VERSION}. "
            f"Use the scaleprog that wrote it, or rewrite it: {_rewrite(root)}."
        )
    try:
        return _Stored.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the top level"
        where = where if where.isprintable() and len(where) <= 200 else reprlib.repr(where)
        raise DataError(f"{path}: malformed at {where}: {first['msg']}. Rewrite it: {_rewrite(root)}.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _missing(source: Source, root: str, file: str | None) -> str:
    """What to do where there is no manifest."""
    if file:
        return (
            f"{file}: there is no such manifest. Write it with `scaleprog shards check {root} --write-manifest "
            f"--manifest {file}`."
        )
    if isinstance(source, Folder):
        return (
            f"{root}: the folder has no {NAME}. If a build was interrupted, run its command again. If it holds shards "
            f"(train-*.tar, val-*.tar), index them with `scaleprog shards check {root} --write-manifest`; otherwise "
            f"build them, for example with `scaleprog shards image-folder SRC {root}`."
        )
    return (
        f"{root}: the folder has no {NAME}. Copy it there, or index the shards with `scaleprog shards check {root} "
        "--write-manifest --manifest FILE` and add data.manifest: FILE to the recipe."
    )


def _rewrite(root: str) -> str:
    return f"remove it, then run `scaleprog shards check {root} --write-manifest`"
