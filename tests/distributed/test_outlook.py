"""Predicted memory and traffic against bytes counted on ranks, and on one rank of larger worlds that are not there."""

import json
from pathlib import Path

import pytest

from launchers.local import launch
from tests.distributed import ranks

DEPTH = 4


def sharding(engine: str, precision: str, **more: object) -> dict:
    return {"engine": engine, "precision": precision, **more}


@pytest.mark.parametrize(
    ("engine", "precision", "world"),
    [("fsdp", "fp32", 1), ("fsdp", "fp32", 2), ("fsdp", "bf16", 2), ("fsdp", "fp32", 4),
     ("replicated", "fp32", 1), ("replicated", "bf16", 2), ("replicated", "fp32", 4)],
)  # fmt: skip
def test_a_step_holds_and_moves_what_was_predicted(engine: str, precision: str, world: int, tmp_path: Path) -> None:
    settings = sharding(engine, precision)
    launch(world, ranks.count_here, settings, ranks.MODEL, DEPTH, tmp_path / "out.json")
    counted = json.loads((tmp_path / "out.json").read_text())
    if world == 1:  # collectives of one rank with itself move nothing
        counted["collectives"] = {}
    assert counted == ranks.predicted_step(settings, ranks.MODEL, DEPTH, world)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [3, 8, 64, 512])
def test_worlds_that_do_not_fit_here(world: int, precision: str) -> None:
    settings = sharding("fsdp", precision)
    counted = ranks.count_pretended(settings, ranks.MODEL, DEPTH, world)
    assert counted == ranks.predicted_step(settings, ranks.MODEL, DEPTH, world)


@pytest.mark.parametrize(("world", "group"), [(8, 4), (6, 3), (64, 8)])
@pytest.mark.parametrize(("precision", "again"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_what_groups_hold_and_send(world: int, group: int, precision: str, again: bool) -> None:
    settings = sharding("hsdp", precision, shard=group, reshard_after_forward=again)
    counted = ranks.count_pretended(settings, ranks.MODEL, DEPTH, world)
    assert counted == ranks.predicted_step(settings, ranks.MODEL, DEPTH, world)
