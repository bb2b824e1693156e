"""Builds a folder of shards once, completely or not at all.

`build` writes shards into `OUT/.building`. When all shards are on disk, it moves them to their final names; it writes
the manifest last. So a folder with shards and `.building`, but without a manifest, is an interrupted build, and the
build starts again. Shards without a manifest and without `.building` are someone else's, and stay untouched.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from scaleprog.data.manifest import NAME, Manifest, Shard
from scaleprog.errors import DataError
from scaleprog.files.atomic import sync_folder
from scaleprog.shards.pool import run_all
from scaleprog.shards.samples import Sample, write_shard

STAGING = ".building"
SPLITS = ("train", "val")


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
    for shard in chain(*manifest.splits.values()):
        if not _intact(manifest, shard):
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
) -> Manifest:
    """Writes the shards, then the manifest. Replaces the shards in `out`, so call `finished` first.

    Args:
        out: the folder of the shards.
        classes: the names of the classes; a label is an index into them.
        splits: for each split, one iterable of samples per shard. With more than one worker, they are pickled and read
            in other processes.
        source: as in `finished`; goes into the manifest.
        workers: number of processes; default: one per CPU.

    Raises:
        DataError: `out` cannot be written (for example, a full disk), or a sample cannot be read. No shard is left
            behind.
    """
    jobs = [
        (split, Path(out, STAGING, f"{split}-{index:06d}.tar"), samples)
        for split, contents in splits.items()
        for index, samples in enumerate(contents)
    ]
    try:
        with _staging(out):
            shards = run_all(_write, jobs, label=f"{out}: shards written", workers=workers)
        written = {split: tuple(shard for job, shard in zip(jobs, shards) if job[0] == split) for split in splits}
        manifest = Manifest(str(out), tuple(classes), written, source)
        try:
            _publish(manifest)
        except BaseException:
            _withdraw(manifest)
            raise
    except OSError as error:
        raise DataError(f"{out}: cannot write shards: {error}. Fix this, then run the same command again.") from error
    counts = ", ".join(f"{manifest.samples(split)} {split} samples in {len(written[split])} shards" for split in splits)
    print(f"{out}: built {counts}, {len(classes)} classes")
    return manifest


def shard_files(out: Path) -> list[Path]:
    """The files in `out` with names of shards: train before val, each sorted by name."""
    return [path for split in SPLITS for path in sorted(out.glob(f"{split}-*.tar"))]


def _write(job: tuple[str, Path, Iterable[Sample]]) -> Shard:
    _, path, samples = job
    return write_shard(path, samples)


@contextmanager
def _staging(out: Path) -> Iterator[None]:
    """Creates an empty OUT/.building, in place of one from an interrupted build; removes it again on failure."""
    folder = Path(out, STAGING)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _publish(manifest: Manifest) -> None:
    """Deletes the old manifest and shards, gives the staged shards their final names, and writes the manifest."""
    out = Path(manifest.root)
    for old in [out / NAME, *shard_files(out)]:
        old.unlink(missing_ok=True)
    for shard in chain(*manifest.splits.values()):
        Path(out, STAGING, shard.name).rename(out / shard.name)
    sync_folder(out)
    manifest.save()
    Path(out, STAGING).rmdir()


def _withdraw(manifest: Manifest) -> None:
    """Removes all shards of a build that has no manifest: the next build writes them again."""
    out = Path(manifest.root)
    for shard in chain(*manifest.splits.values()):
        if not (out / NAME).exists():
            (out / shard.name).unlink(missing_ok=True)
    shutil.rmtree(out / STAGING, ignore_errors=True)


def _intact(manifest: Manifest, shard: Shard) -> bool:
    try:
        return Shard.measure(manifest.path(shard), shard.samples) == shard
    except OSError:
        return False
