"""Twenty growths in one process leave nothing behind."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaleprog.launchers.local import launch
from scaleprog.models import resolve_family
from scaleprog.models.cost import units
from tests.conftest import SHARDINGS
from tests.distributed import growths
from tests.distributed.ranks import MODEL

VOLO_SHARDINGS = ({"engine": "fsdp"}, {"engine": "zero", "stage": 3})


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, int]]]:
    vit, volo = (tmp_path_factory.mktemp("growths") / f"{name}.json" for name in ("vit", "volo"))
    launch(2, growths.grow_often, list(SHARDINGS), vit)
    launch(2, growths.volo_grows_often, list(VOLO_SHARDINGS), volo)
    return json.loads(vit.read_text()) + json.loads(volo.read_text())


@pytest.mark.parametrize(
    "number",
    range(len(SHARDINGS) + len(VOLO_SHARDINGS)),
    ids=[*map(str, SHARDINGS), *(f"volo {sharding}" for sharding in VOLO_SHARDINGS)],
)
def test_twenty_growths_leave_nothing_behind(number: int, told: list[list[dict[str, int]]]) -> None:
    held = told[number]
    assert len(held) == growths.GROWTHS // 2
    second, last = held[0], held[-1]
    assert last["resident"] <= 1.03 * second["resident"]
    assert last["tensors"] <= 1.001 * second["tensors"]
    for what in ("modules", "groups", "threads", "descriptors"):
        assert last[what] <= second[what], what


def test_the_old_network_is_gone_when_the_new_one_has_grown(tmp_path: Path) -> None:
    """Engines form reference cycles, which nothing else breaks while training has disabled garbage collection."""
    launch(2, growths.outlived, list(SHARDINGS), tmp_path / "out.json")
    for sharding, (held, left) in zip(SHARDINGS, json.loads((tmp_path / "out.json").read_text()), strict=True):
        assert held > 100, sharding
        assert left == 0, sharding


# ---- collectives of a training step, of A active layers and the root; one all-reduce is the test's own


def gathers(layers: int, times: int) -> dict[str, int]:
    """FSDP2's: each layer's parameters so many times, the root's once; each one's gradient once; the norm."""
    return {"all_gather": times * layers + 1, "reduce_scatter": layers + 1, "all_reduce": 1 + 1}


COUNTED: tuple[tuple[dict[str, Any], Callable[[int], dict[str, int]]], ...] = (
    ({"engine": "fsdp"}, lambda layers: gathers(layers, 2)),
    ({"engine": "fsdp", "recompute": True}, lambda layers: gathers(layers, 2)),
    ({"engine": "fsdp", "reshard_after_forward": False}, lambda layers: gathers(layers, 1)),
    ({"engine": "fsdp", "gather": "model"}, lambda layers: gathers(0, 0)),  # the network is one unit
    # the shards' gradients across the copies
    ({"engine": "hsdp", "shard": 2}, lambda layers: gathers(layers, 2) | {"all_reduce": layers + 1 + 1 + 1}),
    ({"engine": "replicated"}, lambda layers: {"all_reduce": 1 + 1}),  # all gradients at once
    # gradients in buckets of a layer, the norms of decayed and other parameters; both are gathered after the step
    ({"engine": "zero", "stage": 1}, lambda layers: {"all_reduce": layers + 1 + 2 + 1, "all_gather": 2}),
    ({"engine": "zero", "stage": 2}, lambda layers: {"all_reduce": layers + 1 + 2 + 1, "all_gather": 2}),
    # each layer's parameters twice, the root's module by module; gradients in buckets of a layer; the norms of three
    # flat tensors; whether all ranks have run the same layers
    ({"engine": "zero", "stage": 3},
     lambda layers: {
         "all_gather": 2 * layers + 8, "reduce_scatter": layers + 1, "all_reduce": 3 + 1, "broadcast": 2
     }),
)  # fmt: skip


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, tuple[int, int]]]]:
    out = tmp_path_factory.mktemp("collectives") / "out.json"
    launch(2, growths.count_collectives, [sharding for sharding, _ in COUNTED], out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("number", range(len(COUNTED)), ids=[str(s) for s, _ in COUNTED])
def test_a_step_takes_the_collectives_of_theory_and_none_for_inactive_layers(
    number: int, counted: list[dict[str, dict[str, tuple[int, int]]]]
) -> None:
    sharding, theory = COUNTED[number]
    for name, layers in (("all", 6), ("three", 3), ("all again", 6)):
        found = counted[number][name]
        if name == "all" and sharding.get("stage") == 3:
            continue  # the same layers a second time: DeepSpeed prefetches several with one collective
        assert {kind: count for kind, (count, _) in found.items()} == theory(layers), name


def test_zero_3_carries_active_layers_only(counted: list[dict[str, dict[str, tuple[int, int]]]]) -> None:
    root, layer, *_ = (4 * sum(map(math.prod, unit)) for unit in units(resolve_family(MODEL)[0], MODEL, 6))
    found = counted[-1]
    for name, layers in (("three", 3), ("all again", 6)):
        assert found[name]["all_gather"][1] == 2 * (root + layers * layer)
        assert found[name]["reduce_scatter"][1] == root + layers * layer
