"""Predicted memory and traffic against bytes counted on ranks, and on one rank of larger worlds that are not there."""

import json

import pytest

from scaleprog.launchers.local import launch
from tests.distributed import ranks

DEPTH = 4


def sharding(engine: str, precision: str, **more: object) -> dict:
    return {"engine": engine, "precision": precision, **more}


HERE: dict[int, list[dict]] = {
    1: [sharding("fsdp", "fp32"), sharding("replicated", "fp32")],
    2: [
        sharding("fsdp", "fp32"),
        sharding("fsdp", "bf16"),
        sharding("fsdp", "bf16", gather="model"),
        sharding("replicated", "bf16"),
        *(sharding("zero", precision, stage=stage) for stage in (1, 2, 3) for precision in ("fp32", "bf16")),
    ],
    4: [sharding("fsdp", "fp32"), sharding("replicated", "fp32")],
}


@pytest.fixture(scope="module", params=HERE)
def counted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict, dict, dict]]:
    """Settings, what a step of theirs was counted to hold and carry, and the prediction."""
    world, out = request.param, tmp_path_factory.mktemp("counted") / "out.json"
    launch(world, ranks.count_here, HERE[world], ranks.MODEL, DEPTH, out)
    found = zip(HERE[world], json.loads(out.read_text()), strict=True)
    return [(s, c, ranks.predicted_step(s, ranks.MODEL, DEPTH, world)) for s, c in found]


def test_a_step_holds_and_moves_what_was_predicted(counted: list[tuple[dict, dict, dict]]) -> None:
    for settings, step, predicted in counted:
        if settings["engine"] == "zero":
            nearly(step, predicted, settings["stage"])
        else:
            if not predicted["collectives"]:  # collectives of one rank with itself move nothing
                step["collectives"] = {}
            assert step == predicted, settings


def nearly(counted: dict, predicted: dict, stage: int) -> None:
    """DeepSpeed aligns what it cuts, and keeps in stage 3 what ends the forward for the backward to begin with."""
    held, foreseen = counted["memory"], predicted["memory"]
    assert held["optimizer"] + held["parameters"] == pytest.approx(foreseen["optimizer"], rel=1e-3)  # fp32 weights
    assert held["ema"] == pytest.approx(foreseen["ema"], rel=1e-3)
    sizes, expected = ({kind: size for kind, (_, size) in step["collectives"].items()} for step in (counted, predicted))
    if stage < 3:
        assert sizes == pytest.approx(expected, rel=1e-3)
    else:
        assert sizes["reduce_scatter"] == expected["reduce_scatter"]
        assert 0.8 * expected["all_gather"] <= sizes["all_gather"] <= expected["all_gather"]


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
