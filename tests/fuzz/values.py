"""Hostile values, and how they get into JSON and YAML: what a parser takes and a program did not think of."""

import json
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import yaml

Path = tuple[str | int, ...]  # keys and indices to a value in a tree
Format = Literal["json", "yaml"]

RAW, TWICE = "raw-7f3a-", "twice-7f3a-"
ESCAPES = "\x1b]0;pwned\x07\x1b[31mred\x1b[0m\x9b2J\x07\x08\x7f"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"
SHELL = "pipe:touch pwned"

WORDS: tuple[str, ...] = (
    "",
    "A" * 100_000,
    ESCAPES,
    "two\nlines\r\x1b[2Kone",
    "nul\0",
    "\ud800",
    "\u202egnp.exe",
    HTML,
    "[/red][bold]x",
    "{x} %s %n",
    "../../../../etc/os-release",
    "/dev/zero",
    SHELL,
    "`touch pwned`$(touch pwned)",
    "nan",
    "1e999",
    "-1",
    "٣",
    "null",
    "x|y||z",
    "a" * 300,
)
NUMBERS: tuple[Any, ...] = (-1, 0, 1, 2, 10**9, -(10**9), 2**31, 2**63, 10**30, 0.5, -0.5, 1.5, 1e-300, 1e18, -1e18)
NOT_FINITE: dict[Format, tuple[str, ...]] = {
    "json": ("NaN", "Infinity", "-Infinity", "1e300", "-1e300", "1e999", "1" + "0" * 400, "1" + "0" * 5000),
    "yaml": (".nan", ".inf", "-.inf", "1.0e+300", "-1.0e+300", "1" + "0" * 400, "1" + "0" * 5000),
}
"""Numbers that no setting and no measurement can be."""
DEEP: dict[Format, tuple[str, ...]] = {
    "json": ("[" * 200_000 + "]" * 200_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 900 + "]" * 900),
    "yaml": ("[" * 3000 + "]" * 3000, "[" * 200 + "]" * 200),
}
BOMB = "[" + ", ".join(
    f"&a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x, x, x, x, x, x, x, x, x'}]" for i in range(12)
) + "]"  # fmt: skip
"""Nine to the power of twelve values in a kilobyte of YAML."""
ONLY_YAML = (
    BOMB,
    "2020-01-01",
    "2020-99-99",
    "!!binary aGk=",
    "!!set {a, b}",
    "!!python/object/apply:os.system ['touch pwned']",
    "&self [*self]",
    "{<<: {a: 1}}",
    "!!int 'x'",
    "0o17",
    "1:30",
    "yes",
)
SHAPES: tuple[Any, ...] = (None, True, False, [], {}, [None], [[]], {"": None}, [0] * 1000, ["x", 1], {"a": {"b": {}}})


@dataclass(frozen=True)
class Change:
    """What was done to a tree, where; `value` is what a replaced value became (None: not known as a value)."""

    kind: Literal["replace", "delete", "add", "twice", "rename", "swap", "repeat", "wrap"]
    path: Path
    old: Any = None
    value: Any = None
    finite: bool = True
    plain: bool = True
    """Whether the value is one that the format's plain writing has."""


def paths(tree: Any, above: Path = ()) -> list[Path]:
    """Of every value in a tree."""
    found = [above] if above else []
    if isinstance(tree, dict):
        for key, value in tree.items():
            found += paths(value, (*above, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            found += paths(value, (*above, index))
    return found


def at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Any) -> None:
    at(tree, path[:-1])[path[-1]] = value


def mutate(tree: Any, rng: random.Random, form: Format, among: Sequence[Path] | None = None) -> tuple[str, Change]:
    """A tree with one change, as text of a format; at one of the paths `among`, where given."""
    tree = deepcopy(tree)
    places = list(among if among is not None else paths(tree))
    path = rng.choice(places) if places else ()
    if not path:
        value, raw, finite = draw(rng, form, None)
        return write(raw or value, form), Change("replace", (), tree, value, finite, not raw)
    parent, key, old = at(tree, path[:-1]), path[-1], at(tree, path)
    kinds: list[str] = ["replace"] * 6 + ["delete", "wrap", "swap"]
    kinds += ["add", "add", "twice", "rename", "rename"] if isinstance(parent, dict) else ["repeat"]
    kind = rng.choice(kinds)
    if kind == "replace":
        value, raw, finite = draw(rng, form, old)
        put(tree, path, raw or value)
        return write(tree, form), Change("replace", path, old, value, finite, not raw)
    if kind == "delete":
        del parent[key]
        return write(tree, form), Change("delete", path, old)
    if kind == "wrap":
        put(tree, path, rng.choice(([old], {"value": old}, str(old), [old, old])))
        return write(tree, form), Change("wrap", path, old, at(tree, path))
    if kind == "swap":
        other = rng.choice(places)
        if other[: len(path)] != path and path[: len(other)] != other:
            theirs = at(tree, other)
            put(tree, path, theirs)
            put(tree, other, old)
        return write(tree, form), Change("swap", path, old, at(tree, path))
    if kind == "repeat":
        parent[:] = parent * rng.choice((2, 3, 1000 // len(parent) + 1))
        return write(tree, form), Change("repeat", path, old)
    if kind == "add":
        value, raw, _ = draw(rng, form, old)
        new = rng.choice(("unknown", "base", "__class__", "", ESCAPES, HTML, f"{key}s", "x" * 10_000, "a.b"))
        parent[new] = raw or value
        return write(tree, form), Change("add", (*path[:-1], new), None, value)
    if kind == "rename":
        new = misspelled(str(key), rng)
        renamed = {(new if k == key else k): v for k, v in parent.items()}
        parent.clear()
        parent.update(renamed)
        return write(tree, form), Change("rename", (*path[:-1], new), old)
    value, raw, finite = draw(rng, form, old)
    first, second = (old, raw or value) if rng.random() < 0.5 else (raw or value, old)
    doubled = dict(parent)
    parent.clear()
    for k, v in doubled.items():
        parent[k] = first if k == key else v
    parent[f"{TWICE}{key}"] = second
    return write(tree, form), Change("twice", path, old, value, finite, not raw)


def draw(rng: random.Random, form: Format, old: Any) -> tuple[Any, str, bool]:
    """A hostile value in place of `old`: as a value or, where a format's writer would not write it, as raw text; and
    whether it is finite if it is a number."""
    kind = rng.choice(("number", "number", "not finite", "word", "word", "shape", "near", "raw"))
    if kind == "number":
        return rng.choice(NUMBERS), "", True
    if kind == "word":
        return rng.choice(WORDS), "", True
    if kind == "shape":
        return rng.choice(SHAPES), "", True
    if kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        return rng.choice((old + 1, old - 1, -old, old * 1000, float(old), str(old), old + 0.5)), "", True
    if kind == "near" and isinstance(old, str):
        return rng.choice((old + " ", old.upper(), old[:-1], f"../{old}", f"{old}\n{old}", old + "\0")), "", True
    if kind == "near" and isinstance(old, list) and old:
        return rng.choice((old[:-1], old + old, old[::-1], {"0": old})), "", True
    kind = "not finite" if kind == "not finite" else "raw"
    raw = NOT_FINITE[form] if kind == "not finite" else DEEP[form] + (ONLY_YAML if form == "yaml" else ())
    return None, f"{RAW}{form}-{kind}-{rng.randrange(len(raw))}", kind != "not finite"


def write(tree: Any, form: Format) -> str:
    """A tree as text, raw texts and doubled keys in their places."""
    if form == "json":
        text = json.dumps(tree, indent=1)
        text = text.replace(f'"{TWICE}', '"')
    else:
        text = yaml.safe_dump(tree, sort_keys=False, width=10**9).replace(TWICE, "")
    if RAW in text:
        for kind, raws in (
            ("not finite", NOT_FINITE[form]),
            ("raw", DEEP[form] + (ONLY_YAML if form == "yaml" else ())),
        ):
            for number in reversed(range(len(raws))):
                name = f"{RAW}{form}-{kind}-{number}"
                text = text.replace(f'"{name}"', raws[number]).replace(f"'{name}'", raws[number])
                text = text.replace(name, raws[number])
    return text


def misspelled(key: str, rng: random.Random) -> str:
    """The key with a typing error."""
    place = rng.randrange(len(key)) if key else 0
    changes: tuple[Callable[[], str], ...] = (
        lambda: key[:place] + key[place + 1 :],
        lambda: key[:place] + "q" + key[place:],
        lambda: key.upper() if key.upper() != key else key + "_",
        lambda: key + " ",
        lambda: key.replace("_", "-") if "_" in key else key + "s",
    )
    return rng.choice(changes)() or "q"
