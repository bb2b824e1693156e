"""Recipes with one change, and whether that surely is none."""

import math
import random
from pathlib import Path
from typing import Any, Literal

import yaml

from tests.fuzz import files
from tests.fuzz.values import BOMB, Change, at, misspelled, mutate, paths


def change_recipe(path: Path, rng: random.Random, of_a_run: bool = False) -> tuple[str, Literal["anything", "refused"]]:
    """One change of a recipe, and what must become of it."""
    kind = rng.choice((*["value"] * 14, "key", "key", "base", "bytes", "place", "bomb"))
    tree = yaml.safe_load(path.read_text())
    if kind == "bytes":
        return f"recipe: {files.damage(path, rng)}", "anything"
    if kind == "place":
        return f"recipe: {files.displace(path, rng)}", "anything"
    if kind == "bomb":
        files.replace(path, path.read_bytes() + f"unknown: {BOMB}\n".encode())
        return "recipe: a bomb of aliases", "refused"
    if kind == "base":
        base = rng.choice(
            (
                "/etc/os-release",
                "/dev/zero",
                "fifo",
                "recipe.yaml",
                "..",
                "../../etc/os-release",
                "nowhere",
                "",
                1,
                [],
                None,
                {"a": 1},
                "a\0b",
                "copy.yaml",
                "a" * 5000,
            )
        )
        if base == "fifo":
            files.a_fifo(path.parent / "fifo")
        (path.parent / "copy.yaml").write_text(yaml.safe_dump(tree))
        files.replace(path, yaml.safe_dump({"base": base, **tree}).encode())
        refused = base is not None and (of_a_run or base != "copy.yaml")
        return f"recipe: base {str(base)[:40]!r}", "refused" if refused else "anything"
    if kind == "key":
        group = rng.choice([path for path in paths(tree) if isinstance(at(tree, path), dict)])
        values = at(tree, group)
        key = rng.choice(list(values))
        values[misspelled(key, rng)] = values.pop(key)
        files.replace(path, yaml.safe_dump(tree).encode())
        return f"recipe: {'.'.join(group)}.{key} misspelled", "refused"
    text, change = mutate(tree, rng, "yaml")
    files.replace(path, text.encode(errors="surrogatepass"))
    told = f"recipe: {change.kind} {'.'.join(map(str, change.path))[:60]}"
    if change.plain and change.kind in ("replace", "wrap"):
        told += f" by {change.value!r}"[:60]
    return told, "refused" if must_be_refused(change) else "anything"


def must_be_refused(change: Change) -> bool:
    """Whether a changed recipe surely is none: a key that is none, and where a number stood none that could be one."""
    if change.kind in ("add", "rename"):
        return change.path[-1] != "base"
    if change.kind == "twice":
        return True
    if change.kind not in ("replace", "wrap") or not is_number(change.old) or change.path[:1] == ("seed",):
        return False
    if not change.plain:
        return not change.finite
    value = change.value
    if isinstance(value, str):
        try:
            return not math.isfinite(float(value))
        except ValueError:
            return value not in ("null", "~")
    return isinstance(value, list | dict) or (is_number(value) and not math.isfinite(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
