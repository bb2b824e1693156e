"""Checkpoints as an attacker leaves them who knows the format: each change resealed with checksums that fit.

Nothing here knows more of the format than that a manifest of JSON names files with their sizes and SHA-256, and holds
its own checksum. Whoever writes other weights and all checksums anew leaves what nobody can tell from a checkpoint;
that is not counted as wrong data accepted.
"""

import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaleprog.rundir import storage
from tests.fuzz.files import KINDS, clear, damage, displace, replace
from tests.fuzz.values import Change, mutate, paths

MANIFEST = "manifest.json"
SEAL = "checksum"
NO_SEAL = "0" * 64


def newest(checkpoints: Path) -> Path:
    return steps(checkpoints)[-1]


def steps(checkpoints: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted(path for path in checkpoints.iterdir() if re.fullmatch(r"step-\d+", path.name))


def data_files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.iterdir() if path.name != MANIFEST)


# ---- sealing


def read(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MANIFEST).read_text())


def seal_text(text: str) -> str:
    """The text of a manifest whose checksum is NO_SEAL, sealed as far as it can be parsed at all."""
    try:
        values = json.loads(text)
        values.pop(SEAL, None)
        return text.replace(NO_SEAL, storage._checksum(values))
    except (ValueError, RecursionError, AttributeError, TypeError, OverflowError):
        return text


def write(checkpoint: Path, values: dict[str, Any]) -> None:
    """Writes a manifest and seals it."""
    replace(checkpoint / MANIFEST, seal_text(json.dumps({**values, SEAL: NO_SEAL}, indent=1)).encode())


def reseal(checkpoint: Path) -> None:
    """Gives every file of the manifest that can be read its size and checksum, and the manifest its own."""
    values = read(checkpoint)
    for name, entry in values.get("files", {}).items():
        path = checkpoint / name
        if path.is_file():
            with open(path, "rb") as file:
                content = file.read(2**26)
            values["files"][name] = resealed(entry, len(content), hashlib.sha256(content).hexdigest())
    write(checkpoint, values)


def resealed(entry: Any, size: int, digest: str) -> Any:
    """A file's entry with another size and checksum, in whatever shape it lists them."""
    if isinstance(entry, dict):
        return {
            key: resealed(value, size, digest) if key in ("bytes", "size", "sha256", "checksum", "digest") else value
            for key, value in entry.items()
        }
    if isinstance(entry, list):
        return [resealed(value, size, digest) for value in entry]
    if isinstance(entry, str) and re.fullmatch(r"[0-9a-f]{64}", entry):
        return digest
    return size if isinstance(entry, int) else entry


# ---- changes; each says what it did, and whether the same results are to be expected, if any


Told = tuple[str, bool]


def another_manifest(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """One value of the newest manifest, resealed. What `state` says cannot be told from the truth, but for the step."""
    checkpoint = newest(checkpoints)
    values = {**read(checkpoint), SEAL: NO_SEAL}
    places = [path for path in paths(values) if path[0] != SEAL]
    state = [path for path in places if path[0] == "state"]
    among = rng.choice((state, [p for p in places if p[0] != "state"], [p for p in state if p[-1] == "step"] or state))
    text, change = mutate(values, rng, "json", among)
    replace(checkpoint / MANIFEST, seal_text(text).encode(errors="surrogatepass"))
    where = ".".join(map(str, change.path))
    return f"manifest: {change.kind} {where[:80]}, resealed", told_by_reader(change)


def told_by_reader(change: Change) -> bool:
    """Whether a change of a manifest must not change results."""
    if change.kind == "twice":
        return False  # which of the two counts is the parser's choice
    if change.path[:1] != ("state",):
        return True
    return change.path == ("state", "step") and change.kind in ("replace", "wrap")


def damaged_manifest(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    return f"manifest: {damage(newest(checkpoints) / MANIFEST, rng)}", True


def damaged_data(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    path = rng.choice(data_files(newest(checkpoints)))
    return f"{path.name}: {damage(path, rng)}", True


def cut_data(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """Resealed: tensors are missing."""
    path = rng.choice(data_files(newest(checkpoints)))
    content = path.read_bytes()
    replace(path, content[: rng.randrange(len(content))])
    reseal(path.parent)
    return f"{path.name}: truncated, resealed", True


def rewritten_data(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """Resealed: other weights, or nonsense."""
    path = rng.choice(data_files(newest(checkpoints)))
    how = damage(path, rng)
    reseal(path.parent)
    return f"{path.name}: {how}, resealed", False


def something_else(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """In place of a file, a checkpoint or all of them."""
    checkpoint = newest(checkpoints)
    path = rng.choice((*data_files(checkpoint), checkpoint / MANIFEST, checkpoint, checkpoints))
    # that there was a newer checkpoint, nobody can tell
    return f"{path.name}: {displace(path, rng)}", path.parent == checkpoint


def listed_but_not_there(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """The manifest also names something outside or no file at all; sealed."""
    checkpoint = newest(checkpoints)
    name = rng.choice(
        ("../../recipe.yaml", "/etc/os-release", "/dev/zero", "nowhere", "", ".", "fifo", "link", "\udcff")
    )
    if name == "fifo":
        os.mkfifo(checkpoint / name)
    elif name == "link":
        (checkpoint / name).symlink_to("/dev/zero")
    values = read(checkpoint)
    values["files"][name] = next(iter(values["files"].values()))
    write(checkpoint, values)
    return f"manifest also lists {name!r}", True


def not_listed(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """A file that the manifest does not name (any more), there or not; sealed."""
    checkpoint = newest(checkpoints)
    values = read(checkpoint)
    name = rng.choice(sorted(values["files"]))
    del values["files"][name]
    there = rng.random() < 0.5
    if not there:
        (checkpoint / name).unlink()
    write(checkpoint, values)
    return f"{name} is not in the manifest{'' if there else ', nor there'}", True


def more_files(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """Files and folders that nobody wrote, beside the checkpoints or in one."""
    place = rng.choice((checkpoints, newest(checkpoints)))
    name = rng.choice(
        (
            "step-99999999",
            "step-00000099",
            ".step-00000099.old",
            ".step-00000026.7.writing",
            "step-x",
            "step-" + "9" * 50,
            "step-٣",
            "rank-7.safetensors",
            "__1_0.distcp",
            "step-00000000",
        )
    )
    kind = rng.choice(KINDS)
    if not (place / name).exists():
        kind(place / name)
    return f"{place.name}/{name}: {kind.__name__}", True


def swapped(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    one, two = rng.sample(steps(checkpoints), 2)
    aside = checkpoints / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    return f"{one.name} and {two.name} swapped", True


def renamed(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    one = rng.choice(steps(checkpoints))
    name = rng.choice(
        ("step-00000027", "step-00000039", "step-00000099", "step-00000001", "step-26", "step-0000000000026")
    )
    shutil.copytree(one, checkpoints / name)
    return f"{one.name} also as {name}", True


def from_another_run(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    one = newest(checkpoints)
    clear(one)
    shutil.copytree(newest(foreign), one)
    return f"{one.name} is another run's", True


def files_of_another(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """Data of another step or run under this manifest; where that is resealed it is other weights."""
    one = newest(checkpoints)
    other = rng.choice((newest(foreign), steps(checkpoints)[0]))
    for mine in data_files(one):
        if (other / mine.name).exists():
            replace(mine, (other / mine.name).read_bytes())
    sealed = rng.random() < 0.5
    if sealed:
        reseal(one)
    return f"data of {other.parent.parent.name}/{other.name}{', resealed' if sealed else ''}", not sealed


def another_header(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """One value of the header of a safetensors file, resealed; swapped offsets are other weights."""
    found = [path for path in data_files(newest(checkpoints)) if path.suffix == ".safetensors"]
    if not found:
        return rewritten_data(checkpoints, foreign, rng)
    path = rng.choice(found)
    header, data = opened(path.read_bytes())
    kind = rng.choice(("rename", "any", "any", "length", "move"))
    names = sorted(name for name in header if name != "__metadata__")
    if kind == "rename":
        name = rng.choice(names)
        header[f"{name}x"] = header.pop(name)
    elif kind == "move":
        one, two = rng.sample(names, 2)
        header[one], header[two] = header[two], header[one]
    text = mutate(header, rng, "json")[0] if kind == "any" else json.dumps(header)
    encoded = text.encode(errors="surrogatepass")
    sizes = (2**63, 0, 10**9, len(data), len(encoded) + 1)
    size = rng.choice(sizes) if kind == "length" else len(encoded)
    replace(path, struct.pack("<Q", size) + encoded + data)
    reseal(path.parent)
    return f"{path.name}: header, {kind}, resealed", kind == "rename"


def a_tensor_missing(checkpoints: Path, foreign: Path, rng: random.Random) -> Told:
    """From a file that is whole otherwise, and from the manifest if it names tensors; resealed."""
    found = [path for path in data_files(newest(checkpoints)) if path.suffix == ".safetensors"]
    if not found:
        return cut_data(checkpoints, foreign, rng)
    path = rng.choice(found)
    header, data = opened(path.read_bytes())
    gone = rng.choice(sorted(name for name in header if name != "__metadata__"))
    start, stop = header.pop(gone)["data_offsets"]
    for entry in (value for name, value in header.items() if name != "__metadata__"):
        entry["data_offsets"] = [offset - (stop - start) * (offset >= stop) for offset in entry["data_offsets"]]
    encoded = json.dumps(header).encode()
    replace(path, struct.pack("<Q", len(encoded)) + encoded + data[:start] + data[stop:])
    values = read(path.parent)
    if rng.random() < 0.5:
        values = {key: value if key == "state" else without(value, gone) for key, value in values.items()}
        write(path.parent, values)
    reseal(path.parent)
    return f"{path.name}: no {gone}, resealed", True


def opened(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def without(tree: Any, name: str) -> Any:
    """A tree without what is about a tensor of this name."""
    if isinstance(tree, dict):
        return {key: without(value, name) for key, value in tree.items() if key != name and value != name}
    if isinstance(tree, list):
        return [without(value, name) for value in tree if value != name]
    return tree


CHANGES: tuple[Callable[[Path, Path, random.Random], Told], ...] = (
    another_manifest,
    another_manifest,
    another_manifest,
    another_manifest,
    another_manifest,
    damaged_manifest,
    damaged_data,
    cut_data,
    rewritten_data,
    rewritten_data,
    something_else,
    something_else,
    listed_but_not_there,
    not_listed,
    more_files,
    swapped,
    renamed,
    from_another_run,
    files_of_another,
    another_header,
    another_header,
    a_tensor_missing,
    a_tensor_missing,
)
