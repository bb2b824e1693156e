"""The optional libraries that a recipe needs, and the extras that install them."""

import importlib.util
from collections.abc import Iterable

from scaleprog.errors import RecipeError
from scaleprog.recipe.recipe import Recipe


def check_extras(recipe: Recipe) -> None:
    """Raises RecipeError if a library that the recipe needs is not installed here."""
    if recipe.sharding.engine == "zero" and not is_installed("deepspeed"):
        raise RecipeError("sharding.engine: zero needs DeepSpeed: pip install 'scaleprog[deepspeed]'")
    check_trackers(recipe.tracking, "tracking: ")


def check_trackers(names: Iterable[str], where: str = "") -> None:
    """Raises RecipeError if the library of a tracker is not installed here; `where`: who asks for it."""
    for name in names:
        if not is_installed(name):
            raise RecipeError(
                f"{where}{name} is not installed: pip install 'scaleprog[{name}]'; or train without it, and send "
                f"the run from another machine: scaleprog track RUN {name}"
            )


def is_installed(module: str) -> bool:
    """Whether a module is installed; does not import it. A folder of its name is importable, too, but has no origin."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
