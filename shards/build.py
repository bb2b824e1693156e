"""Builds a folder of shards, completely or not at all. An interrupted build is resumed.

`build` writes shards into `OUT/.building`, and beside each finished shard its entry of the manifest. When all shards
are on disk, it moves them to their final names; it writes the manifest last. So a folder with `.building`, but without
a manifest, is an interrupted build: the same build keeps its finished shards. Another one starts over beside them, in
case it was a slip, and removes them when it is finished. Shards without a manifest and without `.building` are someone
else's, and stay untouched.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from scaleprog.data.manifest import NAME, Manifest, Shard
from scaleprog.errors import DataError, WorkerDied
from scaleprog.files.atomic import lock, open_regular, read_text, sync_folder, unlock, write_whole
from scaleprog.shards.pool import run_all
from scaleprog.shards.samples import Sample, write_shard

STAGING, LOCK = ".building", ".building.lock"
SOURCE = "source.json"
"""File in STAGING that says what the shards there are built from."""
SPLITS = ("train", "val")
Job = tuple[str, Path, Iterable[Sample]]
"""The split of a shard, its path in STAGING, and its samples."""


def finished(out: Path, source: Mapping[str, Any]) -> Manifest | None:
    """The manifest of `out` if it holds this build, finished and undamaged; otherwise None. Reads all shards.

    Args:
        out: the folder of the shards.
        source: what the shards are built from, and every parameter that changes them; in JSON types.

    Raises:
        DataError: `out` holds another build, or shards from elsewhere without a manifest.
    """
    if not Path(out, NAME).exists():
        if shard_files(out) and not Path(out, STAGING).exists():
            raise DataError(
                f"{out}: holds shards ({shard_files(out)[0].name}, ...) but no {NAME}. To use them, run `scaleprog "
                f"shards check {out} --write-manifest`; to build others, choose another folder or remove them."
            )
        return None
    manifest = Manifest.load(out)
    if manifest.source != source:
        keys = sorted(set(manifest.source) | set(source))
        there, wanted = ({key: side.get(key) for key in keys} for side in (manifest.source, source))
        differences = ", ".join(
            f"{key}: built with {there[key]!r}, requested {wanted[key]!r}" for key in keys if there[key] != wanted[key]
        )
        raise DataError(
            f"{out}: holds shards of another build ({differences}). Choose another folder or remove this one."
        )
    listed = {shard.name for shard in chain(*manifest.splits.values())}
    for shard in chain(*manifest.splits.values()):
        if not _intact(manifest, shard):
            if others := [path.name for path in shard_files(out) if path.name not in listed]:
                raise DataError(
                    f"{out}: {shard.name} is missing or damaged, but to rebuild the shards would remove {others[0]} "
                    f"({len(others)} in all), which {NAME} does not list; move what is not of this build elsewhere"
                )
            print(f"{out}: {shard.name} is missing or damaged; rebuilding all shards")
            return None
    counts = ", ".join(f"{manifest.samples(split)} {split}" for split in manifest.splits)
    print(f"{out}: already built, nothing to do ({counts} samples; all checksums match)")
    return manifest


def build(
    out: Path,
    *,
    classes: Sequence[str],
    splits: Mapping[str, Sequence[Iterable[Sample]]],
    source: Mapping[str, Any],
    workers: int | None = None,
    keep: bool = False,
) -> Manifest:
    """Writes the shards, then the manifest. Replaces the shards in `out`, so call `finished` first.

    Args:
        out: the folder of the shards.
        classes: the names of the classes; a label is an index into them.
        splits: for each split, one iterable of samples per shard. With more than one worker, they are pickled and read
            in other processes.
        source: as in `finished`; goes into the manifest.
        workers: number of processes; default: one per CPU.
        keep: whether finished shards are kept if a sample cannot be used. So it must be if `source` tells samples
            apart by their content: they still hold when what is wrong has been mended.

    Raises:
        DataError: `out` cannot be written (for example, a full disk): finished shards are kept, and the same call
            resumes. Or a sample cannot be used. Or another process is building in `out`.
        Unavailable: a sample cannot be read now, or a worker died; as with a full disk.
    """
    jobs = [
        (split, Path(out, STAGING, f"{split}-{index:06d}.tar"), samples)
        for split, contents in splits.items()
        for index, samples in enumerate(contents)
    ]
    try:
        with _alone(out):
            _prepare(out, source)
            shards = _write_all(out, jobs, workers, keep)
            written = {split: tuple(shard for job, shard in zip(jobs, shards) if job[0] == split) for split in splits}
            manifest = Manifest(str(out), tuple(classes), written, source, sound=True)
            _publish(manifest)
    except OSError as error:
        raise DataError(
            f"{out}: cannot write shards: {error}. Fix this, then run the same command again; it keeps finished shards."
        ) from error
    counts = ", ".join(f"{manifest.samples(split)} {split} samples in {len(written[split])} shards" for split in splits)
    print(f"{out}: built {counts}, {len(classes)} classes")
    return manifest


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Inside, no other process builds in `out`. Raises DataError if one does, or OSError."""
    out.mkdir(parents=True, exist_ok=True)
    path = Path(out, LOCK)
    with open_regular(path, "r+b", os.O_CREAT | os.O_NOFOLLOW) as file:
        try:
            lock(file, 0, 0)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise TimeoutError  # the file of a build that has just ended
        except (TimeoutError, FileNotFoundError):
            raise DataError(
                f"{out}: another process is building shards there; wait for it, or choose another folder"
            ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            unlock(file)


def shard_files(out: Path) -> list[Path]:
    """The files in `out` with names of shards: train before val, each sorted by name."""
    return [path for split in SPLITS for path in sorted(out.glob(f"{split}-*.tar"))]


def _write_all(out: Path, jobs: Sequence[Job], workers: int | None, keep: bool) -> list[Shard]:
    """Writes the shards into STAGING. If a sample cannot be used, removes all of them, unless they are to be kept."""
    try:
        return run_all(_write, jobs, label=f"{out}: shards written", workers=workers)
    except WorkerDied:
        raise
    except DataError:
        if not keep:
            shutil.rmtree(out / STAGING, ignore_errors=True)
        raise


def _write(job: Job) -> Shard:
    """Writes one shard into STAGING, and then its entry. An intact shard that has its entry stays as it is."""
    _, path, samples = job
    entry = path.with_suffix(".json")
    with suppress(OSError, ValueError):
        known = TypeAdapter(Shard).validate_json(read_text(entry))
        if Shard.measure(path, known.samples) == known:
            return known
    path.unlink(missing_ok=True)
    shard = write_shard(path, samples)
    write_whole(entry, json.dumps(asdict(shard)))
    return shard


def _prepare(out: Path, source: Mapping[str, Any]) -> None:
    """Creates OUT/.building, or resumes what the same build has left there; puts aside what another one has left."""
    staging, description = Path(out, STAGING), json.dumps(source, sort_keys=True)
    if (found := _described(staging)) != description:
        if found is not None and (entries := _entries(out)):
            _withdraw(out)
            aside = _aside(out, found)
            shutil.rmtree(aside, ignore_errors=True)
            staging.rename(aside)
            print(
                f"{out}: keeps {len(entries)} finished shards of another, interrupted build until this one is finished"
            )
        shutil.rmtree(staging, ignore_errors=True)
        if _aside(out, description).exists():
            _aside(out, description).rename(staging)
    if _described(staging) == description:
        _withdraw(out)
        print(f"{out}: resuming an interrupted build, of which {len(_entries(out))} shards are finished")
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_whole(staging / SOURCE, description)


def _described(staging: Path) -> str | None:
    """What the shards in a staging folder are built from; None if it does not say."""
    try:
        return read_text(staging / SOURCE)
    except (OSError, UnicodeDecodeError):
        return None


def _aside(out: Path, description: str) -> Path:
    """Where another build puts aside what a build of this description has left."""
    return Path(out, f"{STAGING}.{hashlib.sha256(description.encode()).hexdigest()[:16]}")


def _entries(out: Path) -> list[Path]:
    """The entries of finished shards in OUT/.building."""
    return [path for path in Path(out, STAGING).glob("*.json") if path.name != SOURCE]


def _publish(manifest: Manifest) -> None:
    """Deletes the old manifest and shards, gives the staged shards their final names, and writes the manifest."""
    out = Path(manifest.root)
    try:
        for old in [out / NAME, *shard_files(out)]:
            old.unlink(missing_ok=True)
        for shard in chain(*manifest.splits.values()):
            Path(out, STAGING, shard.name).rename(out / shard.name)
        sync_folder(out)
        manifest.save()
    except BaseException:
        _withdraw(out)
        raise
    for staging in out.glob(f"{STAGING}*/"):
        shutil.rmtree(staging, ignore_errors=True)


def _withdraw(out: Path) -> None:
    """Moves the shards of a build without a manifest back into OUT/.building, from where the same build resumes."""
    if (out / NAME).exists():
        return
    for entry in _entries(out):
        with suppress(FileNotFoundError):
            Path(out, f"{entry.stem}.tar").rename(entry.with_suffix(".tar"))


def _intact(manifest: Manifest, shard: Shard) -> bool:
    try:
        return Shard.measure(manifest.path(shard), shard.samples) == shard
    except OSError:
        return False
