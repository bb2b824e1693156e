"""Whole runs, one after the other on the same ranks, which are started once for all of them."""

from pathlib import Path

from scaleprog.launchers.local import launch
from scaleprog.ranks.coordinator import process_group
from scaleprog.recipe import Recipe
from scaleprog.training.loop import train


def train_in_turn(runs: list[tuple[Recipe, Path]]) -> None:
    """What a rank does."""
    with process_group() as (coordinator, device):
        for recipe, folder in runs:
            train(recipe, folder, coordinator, device)


def train_all(world: int, runs: list[tuple[Recipe, Path]]) -> None:
    """Trains every recipe in its run directory on `world` ranks."""
    launch(world, train_in_turn, runs)
