"""A rank that is slow in earnest: which rank the rows name, what the events and the status say of it."""

import socket
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import scaleprog.rundir.straggler
import scaleprog.training.loop
from scaleprog.launchers import status
from scaleprog.launchers.local import launch
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from scaleprog.training.loop import train_rank
from tests.conftest import MakeRecipe

SLEPT = 0.4
SLOW = 1


def train_slowly(recipe: Recipe, folder: Path) -> None:
    """A rank of a run in which one rank takes its time for its part of a batch."""
    scaleprog.rundir.straggler.LEAST_SECONDS = 0.0
    original = scaleprog.training.loop.mixed_batch

    def mixed_batch(run: Any, *arguments: Any) -> Any:
        if run.coordinator.rank == SLOW:
            time.sleep(SLEPT)
        return original(run, *arguments)

    scaleprog.training.loop.mixed_batch = mixed_batch
    train_rank(recipe, folder)


@pytest.mark.parametrize(
    ("ranks", "sharding"),
    [
        (2, {"engine": "replicated"}),
        (2, {"engine": "fsdp"}),
        (4, {"engine": "hsdp", "shard": 2}),
    ],
    ids=["replicated", "fsdp", "hsdp"],
)
def test_a_slow_rank_is_named(ranks: int, sharding: dict[str, Any], make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(train={"log_every": 2, "max_steps": 10}, sharding=sharding), tmp_path / "run"
    launch(ranks, train_slowly, recipe, run)
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 10
    rows = rows[2:]  # the first steps warm up
    assert Counter(row["slowest_rank"] for row in rows).most_common(1)[0][0] == SLOW
    assert all(row["slowest_rank_seconds"] > SLEPT for row in rows if row["slowest_rank"] == SLOW)
    assert median(row["collective_wait_seconds"] for row in rows) > SLEPT / 4, "rank 0 waits for the slow one"
    events = [event for event in read_rows(run / "events.jsonl") if event["event"] == "straggler"]
    slow = next(slow for event in events for slow in event["slow"] if slow["rank"] == SLOW)
    assert slow["host"] == socket.gethostname()
    assert slow["seconds"] > SLEPT
    slowest = status.status(run).slow[0]  # intervals of two steps may name others, too, by chance
    assert slowest.startswith(f"rank {SLOW} on {socket.gethostname()}")


def test_an_engine_whose_waits_are_not_known_names_nobody(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = make_recipe(train={"log_every": 2, "max_steps": 2}, sharding={"engine": "zero"}), tmp_path / "run"
    launch(2, train_slowly, recipe, run)
    rows = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert not {key for row in rows for key in row if "slowest" in key or "collective" in key}
