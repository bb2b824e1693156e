"""Engines against the unsharded reference, through every operator; growth without communication; ranks that agree."""

import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from scaleprog.launchers.local import RankFailed, launch
from tests.distributed import ranks

ZERO = [{"engine": "zero", "stage": stage} for stage in (1, 2, 3)]
REFERENCE = {"engine": "replicated"}
ENGINES = [{"engine": "fsdp"}, *ZERO, REFERENCE]
SHARDINGS = {
    1: [*ENGINES, {"engine": "hsdp"}],
    2: [
        *ENGINES,
        {"engine": "fsdp", "gather": "model"},
        {"engine": "hsdp", "shard": 1},
        *({"engine": "fsdp", **more} for more in ({"recompute": True}, {"reshard_after_forward": False})),
        {"engine": "fsdp", "offload": "all"},
        {"engine": "zero", "stage": 2, "offload": "optimizer", "recompute": True},
        {"engine": "zero", "stage": 3, "offload": "all"},
        {"engine": "fsdp", "precision": "bf16", "recompute": True},
        *({**engine, "precision": precision} for engine in ENGINES for precision in ("autocast", "bf16")),
    ],
    4: [{"engine": "fsdp"}, *ZERO, {"engine": "hsdp", "shard": 2}],
}
"""What is tried on how many ranks."""


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """What the engines of `SHARDINGS` recorded on so many ranks, which are started once for all."""

    @cache
    def started(world: int) -> list[dict[str, Any]]:
        out = tmp_path_factory.mktemp("lives") / "out.json"
        launch(world, ranks.whole_lives, SHARDINGS[world], out)
        return json.loads(out.read_text())

    return started


@pytest.mark.parametrize(
    ("world", "sharding"),
    [
        (world, sharding)
        for world in SHARDINGS
        for sharding in SHARDINGS[world]
        if "precision" not in sharding and (world, sharding) != (1, REFERENCE)
    ],
    ids=str,
)
def test_engines_train_what_one_unsharded_process_trains(
    world: int, sharding: dict[str, Any], lives: Callable[[int], list[dict[str, Any]]]
) -> None:
    reference = lives(1)[SHARDINGS[1].index(REFERENCE)]
    found = lives(world)[SHARDINGS[world].index(sharding)]
    assert len(reference["record"]) == 2 * (3 + 5 * 5 + 2) + 5 * 3
    assert found["record"] == pytest.approx(reference["record"], rel=1e-5)
    # in exact arithmetic the key's bias has no gradient: AdamW normalises what rounding leaves of it
    assert found["ema"] == pytest.approx(reference["ema"], rel=5e-4)


@pytest.mark.parametrize(
    "sharding",
    [settings for settings in SHARDINGS[2] if "precision" in settings and settings["engine"] != "replicated"],
    ids=str,
)
def test_a_precision_is_the_same_arithmetic_in_every_engine(
    sharding: dict[str, Any], lives: Callable[[int], list[dict[str, Any]]]
) -> None:
    precision = sharding["precision"]
    engines, apart = (
        [lives(2)[SHARDINGS[2].index(settings)]["record"] for settings in both]
        for both in (
            (sharding, {"engine": "replicated", "precision": precision}),
            ({"engine": "replicated", "precision": "autocast"}, {"engine": "replicated", "precision": "bf16"}),
        )
    )
    found, reference = engines
    sums_in_bf16 = sharding == {"engine": "zero", "stage": 1, "precision": "bf16"}
    nearly = pytest.approx(reference[:2], rel=5e-4 if sums_in_bf16 else 2e-5)
    assert found[:2] == nearly, "loss and gradient norm of the first step, of two micro-batches"
    assert apart[0][1] != pytest.approx(apart[1][1], rel=2e-5), "the other precision is told apart"
    assert found == pytest.approx(reference, rel=2e-2), "then the last digit of fp32 decides how bf16 is rounded"


def test_growth_under_fsdp_moves_nothing_between_ranks(tmp_path: Path) -> None:
    launch(2, ranks.regrow_traffic, tmp_path / "out.json")
    counted = json.loads((tmp_path / "out.json").read_text())
    assert counted["step"] >= 3 * 4  # the counter sees the gathers and scatters of a step
    assert counted["growths"] == dict.fromkeys(("mogrow", "identity", "stacking", "rand_init"), 0)


@pytest.mark.parametrize("world", [2, 3])
def test_rank_0_decides_and_all_ranks_hold_the_same(world: int, tmp_path: Path) -> None:
    launch(world, ranks.decide, tmp_path)
    decided, collectives, mean, total, maximum = json.loads((tmp_path / "0.json").read_text())
    assert decided == {"on": 0, "value": 0.1}
    assert collectives == {"broadcast": 2, "all_reduce": 1}
    assert (mean, total, maximum) == ([(world - 1) / 2, 2.0], [world], [0.0, world - 1])
    for rank in range(1, world):
        assert (tmp_path / f"{rank}.json").read_text() == (tmp_path / "0.json").read_text()


def test_ranks_that_disagree_end_the_run_with_both_values_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"choice of stage 2: rank 0 has 7; rank 1 has 8"):
        launch(2, ranks.disagree, tmp_path)


def fail_on_rank_1(kind: str) -> None:
    from scaleprog.errors import DataError
    from scaleprog.ranks.coordinator import process_group

    with process_group() as (coordinator, _):
        if coordinator.rank == 1:
            raise DataError("shard train-000003.tar is truncated") if kind == "user" else ZeroDivisionError("a bug")
        coordinator.barrier()
        time.sleep(600)


@pytest.mark.parametrize(("kind", "text"), [("user", "rank 1: shard train-000003.tar is trunc"), ("bug", "a bug")])
def test_a_rank_that_raises_ends_all_with_its_error_on_top(kind: str, text: str) -> None:
    with pytest.raises(RankFailed, match=text) as caught:
        launch(3, fail_on_rank_1, kind)
    assert str(caught.value).startswith("rank 1")
    assert ("Traceback" in str(caught.value)) == (kind == "bug")
