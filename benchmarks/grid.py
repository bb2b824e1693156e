"""Grids of recipes: what `benchmarks.search_lab` says a grid's YAML may hold, as cases."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import yaml

from scaleprog.planning.plan import gmacs_of, outline
from scaleprog.recipe import Recipe

FINE = 1_000_000
"""Steps of an epoch where only parts of epochs matter, not what shards there are."""


@dataclass(frozen=True)
class Case:
    """One recipe of a grid. `settings`: overrides as the command line takes them; `curve`: whether it is drawn."""

    name: str
    group: str
    recipe: str
    settings: tuple[str, ...]
    curve: bool


@dataclass(frozen=True)
class Grid:
    """Cases, the first of which is what the others are compared with, and the seeds to run them with.

    `ingredients`: by what is told of it and by `alone` or `last`, the names of the case with an ingredient and of the
    case without it.
    """

    name: str
    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    ingredients: Mapping[str, Mapping[str, tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, recipe: str | None = None) -> "Grid":
        """Reads a grid's YAML; `recipe` takes the place of the one that it names."""
        values = yaml.safe_load(path.read_text())
        common, cases = values.get("settings", {}), []
        recipe = recipe or values["recipe"]
        named = dict(values["cases"])
        for budget in values.get("budgets", ()):
            for method, settings in values["methods"].items():
                limit = "search.budget" if settings.get("growth.schedule") == "automatic" else "cost"
                named.setdefault(f"{100 * budget:g} %, {method}", {**settings, limit: budget})
        for name, settings in named.items():
            settings = {**common, **settings}
            if settings.pop("only", recipe) != recipe:
                continue
            group, curve = settings.pop("group", name), settings.pop("curve", False)
            if "schedule" in settings:
                settings["growth.schedule"] = by_hand(settings.pop("schedule"))
            if "times" in settings:
                settings |= multiplied(settings.pop("times"), Recipe.load(recipe))
            if "cost" in settings:
                part = settings.pop("cost")
                settings |= lasting(part, Recipe.load(recipe, overrides(settings)))
            cases.append(Case(name, group, recipe, overrides(settings), curve))
        name = path.stem if recipe == values["recipe"] else f"{path.stem}_{Path(recipe).stem}"
        return cls(name, tuple(cases), tuple(values.get("seeds", (0, 1, 2))), values.get("ingredients", {}))


def overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings as the command line takes them."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())


def multiplied(factors: Mapping[str, float], recipe: Recipe) -> dict[str, float]:
    """Numbers of a recipe, times factors, by keys such as `optimizer.lr`."""
    return {key: factor * reduce(getattr, key.split("."), recipe) for key, factor in factors.items()}


def lasting(part: float, recipe: Recipe) -> dict[str, float]:
    """The epochs in which a recipe costs, by GMACs, a part of what the complete model costs in the recipe's own epochs.

    The warm-up keeps its share of the epochs. Both have three digits.
    """
    family, schedule = outline(recipe, FINE)
    gmacs = partial(gmacs_of, recipe, family, schedule)
    cost = schedule.cost(schedule.expected((), gmacs), gmacs)
    times = part * gmacs(schedule.full) * schedule.steps / cost
    lengths = {"train.epochs": recipe.train.epochs, "optimizer.warmup_epochs": recipe.optimizer.warmup_epochs}
    return {key: float(f"{epochs * times:.3g}") for key, epochs in lengths.items()}


def by_hand(text: str) -> list[dict[str, int]]:
    """`2 * 16x3 + 28x6` -> two stages of 16 px and 3 layers, and one of 28 px and 6."""
    stages = []
    for part in text.split("+"):
        count, times, size = part.rpartition("*")
        repeats = int(count) if times else 1
        resolution, depth = map(int, size.split("x"))
        stages += [{"resolution": resolution, "depth": depth}] * repeats
    return stages
