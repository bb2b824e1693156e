"""How a model is sharded over ranks: one backend for each engine."""

from importlib import import_module
from typing import cast

from scaleprog.recipe.keys import Engine
from scaleprog.sharding.backend import Backend

ENGINES = {
    "fsdp": "scaleprog.sharding.fsdp.FsdpBackend",
    "hsdp": "scaleprog.sharding.fsdp.FsdpBackend",
    "zero": "scaleprog.sharding.zero.ZeroBackend",
    "replicated": "scaleprog.sharding.replicated.ReplicatedBackend",
}
"""The backend of each engine, by its import path: DeepSpeed is imported only if a recipe asks for it."""


def engine(name: Engine) -> type[Backend]:
    """The backend of an engine. Raises ValueError for an unknown name, and RecipeError for zero without DeepSpeed."""
    if name not in ENGINES:
        raise ValueError(f"{name!r} is not an engine; choose from {', '.join(ENGINES)}")
    module, _, backend = ENGINES[name].rpartition(".")
    return cast(type[Backend], getattr(import_module(module), backend))
