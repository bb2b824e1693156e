"""A sweep: one run for every combination of the values that `KEY=V1,V2` and `KEY=A:B` give to keys of a recipe."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from scaleprog.errors import RecipeError
from scaleprog.files.display import as_text
from scaleprog.recipe.recipe import KEY, Recipe

MOST_RUNS = 1000
"""As many as an array of Slurm has, unless the cluster is set up otherwise."""
LONGEST_VALUE, LONGEST_NAME = 40, 200
"""Characters in a run's name; a file system takes names of 255."""
SEED = "seed"


@dataclass(frozen=True)
class Member:
    """One run of a sweep. `name` says its values, and is the name of its run directory."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Swept:
    """A key of a recipe, and the values that it takes, as the user wrote them."""

    key: str
    values: Sequence[str]

    @classmethod
    def parse(cls, text: str) -> "Swept":
        """Parses `KEY=V1,V2` or `KEY=A:B`, whole numbers without B. Raises RecipeError."""
        key, equals, written = text.partition("=")
        if not equals or not re.fullmatch(KEY, key):
            raise _malformed(text, "write KEY=V1,V2 or KEY=A:B, such as optimizer.lr=1e-3,2e-3")
        values: list[str] = []
        for part in split(written):
            if not part:
                raise _malformed(text, "a value is empty; for no value, write null")
            values += _expand(part, text)
            check_number(len(values))
        return cls(key, values)


def members(swept: Sequence[str], overrides: Sequence[str], load: Callable[[Sequence[str]], Recipe]) -> list[Member]:
    """The runs of a sweep, the last swept key varying fastest.

    Args:
        swept: for each key, `KEY=V1,V2` or `KEY=A:B`.
        overrides: `key=value`, for all runs.
        load: makes a recipe from overrides.

    Raises:
        RecipeError: the sweep is malformed, or recipes are invalid; the message has all their problems.
    """
    keys = [Swept.parse(text) for text in swept]
    names = [each.key for each in keys]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"--sweep: {twice[0]} is swept twice; write its values once, separated by commas")
    if fixed := [override for override in overrides if override.partition("=")[0] in names]:
        raise RecipeError(f"--sweep: {as_text(fixed[0], most=100)} sets a key that is swept; leave one of the two out")
    check_number(math.prod(len(each.values) for each in keys))
    found: list[Member] = []
    problems: dict[str, None] = {}
    for values in product(*(each.values for each in keys)):
        try:
            recipe = load([*overrides, *(f"{key}={value}" for key, value in zip(names, values))])
            found.append(Member(run_name(names, values), recipe))
        except RecipeError as error:
            problems[str(error)] = None
    if problems:
        raise RecipeError("\n".join(problems))
    same: dict[str, str] = {}
    for member in found:
        content = member.recipe.model_dump_json()
        if content in same:
            raise RecipeError(
                f"--sweep: {same[content]} and {member.name} are the same run; leave out one of the values"
            )
        same[content] = member.name
    return found


def check_number(runs: int) -> None:
    """Raises RecipeError if a sweep has too many runs."""
    if runs > MOST_RUNS:
        raise RecipeError(f"--sweep: more than {MOST_RUNS} runs; sweep fewer keys or values at a time")


def split(text: str) -> list[str]:
    """Splits at commas outside brackets, braces, and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
    return [part.strip() for part in parts]


def _expand(part: str, text: str) -> Sequence[str]:
    """The numbers of a range A:B, or the value itself."""
    found = re.fullmatch(r"(-?[0-9]{1,12}):(-?[0-9]{1,12})", part)
    if found is None:
        return [part]
    numbers = range(int(found[1]), int(found[2]))
    if not numbers:
        raise _malformed(text, f"the range {part} is empty; A:B has the whole numbers from A to B - 1")
    check_number(len(numbers))
    return [str(number) for number in numbers]


def _malformed(text: str, why: str) -> RecipeError:
    return RecipeError(f"--sweep {as_text(text, most=100)}: {why}")


def run_name(keys: Sequence[str], values: Sequence[str]) -> str:
    """The name of a run, such as `lr=1e-3_seed0`: the last parts of the keys, or whole keys if two end alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    parts = [
        f"{end if ends.count(end) == 1 else key}={_plain(value)}"
        for key, end, value in zip(keys, ends, values)
        if key != SEED
    ]
    seeds = [f"{SEED}{_plain(value)}" for key, value in zip(keys, values) if key == SEED]
    named = "_".join(parts)
    return "_".join(filter(None, [_apart(named, named[:LONGEST_NAME]), *seeds]))


def _plain(value: str) -> str:
    """A value in letters that any file name may have."""
    return _apart(value, re.sub("[^A-Za-z0-9.+_-]+", "-", value)[:LONGEST_VALUE])


def _apart(text: str, short: str) -> str:
    """What stands for a text in a name: `short` with, unless that is all of the text, a checksum."""
    return text if short == text else f"{short.strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
