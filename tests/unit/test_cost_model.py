"""Memory, traffic and step time of every engine: laws that hold for any network, and figures by hand."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models.cost import Unit, activations, parameters, units
from scaleprog.models.elastic import Structure
from scaleprog.models.vit import ElasticViT
from scaleprog.planning.cost_model import (
    Prediction,
    assumptions,
    check_offload,
    engines,
    host_memory_available,
    predict,
    state_memory,
    traffic,
)  # fmt: skip
from scaleprog.planning.devices import DEVICES, Collective, Device
from scaleprog.planning.plan import forecast
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import ModelSettings, ShardingSettings
from scaleprog.recipe.worlds import Worlds

RECIPE = Path(__file__).parents[2] / "configs" / "imagenet" / "deit_small_prog_100.yaml"
H100 = DEVICES["h100"]
TINY = ModelSettings(name="vit_tiny_patch16_224", classes=10, channels=1, resolution=28, patch=4, width=32, heads=2)
SHAPES = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)
NETWORKS = st.lists(st.lists(SHAPES, min_size=1, max_size=4).map(tuple), min_size=2, max_size=5).map(tuple)
WORLDS = st.integers(1, 40)
PRECISIONS = st.sampled_from(("fp32", "autocast", "bf16"))


def sharding(engine: str, **settings: object) -> ShardingSettings:
    return ShardingSettings.model_validate({"engine": engine, **settings})


def recipe(*overrides: str) -> Recipe:
    return Recipe.load(RECIPE, overrides)


def elements(network: tuple[Unit, ...]) -> int:
    return sum(math.prod(shape) for unit in network for shape in unit)


# ---- memory


@given(NETWORKS, WORLDS, WORLDS, st.integers(1, 3), PRECISIONS)
def test_more_ranks_never_hold_more_each(
    network: tuple[Unit, ...], one: int, other: int, emas: int, precision: str
) -> None:
    few, many = sorted((one, other))
    for engine in (sharding("fsdp", precision=precision), sharding("zero", precision=precision)):
        less, more = (state_memory(network, engine, emas, world, world) for world in (many, few))
        for part in ("parameters", "gradients", "optimizer", "ema"):
            assert getattr(less, part) <= getattr(more, part)


@given(NETWORKS, WORLDS, st.integers(1, 3), PRECISIONS)
def test_the_ranks_of_fsdp_together_hold_everything_once_and_padding(
    network: tuple[Unit, ...], world: int, emas: int, precision: str
) -> None:
    held = state_memory(network, sharding("fsdp", precision=precision), emas, world, world)
    whole = 4 * (4 + emas) * elements(network)
    assert held.state * world >= whole
    rows = sum(math.prod(shape[1:]) for unit in network for shape in unit)
    assert held.state * world < whole + 4 * (4 + emas) * rows * world


@given(NETWORKS, WORLDS, st.integers(1, 3), PRECISIONS)
def test_hsdp_lies_between_fsdp_and_replicated(
    network: tuple[Unit, ...], world: int, emas: int, precision: str
) -> None:
    def held(engine: str, **settings: int) -> tuple[int, ...]:
        memory = state_memory(network, sharding(engine, precision=precision, **settings), emas, world, world)
        return memory.parameters, memory.gradients, memory.optimizer, memory.ema

    assert held("hsdp", shard=world) == held("fsdp")
    assert held("hsdp", shard=1) == held("replicated")


@given(NETWORKS, WORLDS, st.integers(1, 3))
def test_the_stages_of_zero_hold_less_and_less(network: tuple[Unit, ...], world: int, emas: int) -> None:
    # shapes that divide: padding can outweigh what sharding saves
    network = tuple(tuple((world * shape[0], *shape[1:]) for shape in unit) for unit in network)
    first, second, third = (
        state_memory(network, sharding("zero", stage=n), emas, world, world).state for n in (1, 2, 3)
    )
    assert first > second >= third


def test_by_hand() -> None:
    network = (((5, 3),), ((8, 2), (8,)))  # 15 and 24 elements
    fsdp = state_memory(network, sharding("fsdp"), 1, 4, 4)
    assert (fsdp.parameters, fsdp.gradients, fsdp.optimizer, fsdp.ema) == (48, 48, 96, 48)  # 2 * 3 + 2 * 2 + 2
    assert fsdp.buffers == 4 * (24 + 24) + 8 * 24
    for precision, buffers in (("fp32", 156), ("autocast", 156), ("bf16", 156 + 78)):
        whole = state_memory(network, sharding("replicated", precision=precision), 2, 4, 4)
        assert (whole.parameters, whole.gradients, whole.optimizer, whole.ema) == (156, 156, 312, 312)
        assert whole.buffers == buffers
    zero = state_memory(network, sharding("zero", stage=1, precision="bf16"), 1, 4, 4)
    assert (zero.parameters, zero.gradients, zero.optimizer, zero.ema) == (78, 78 + 40, 120, 40)
    zero = state_memory(network, sharding("zero", stage=2, precision="bf16"), 1, 4, 4)
    assert (zero.parameters, zero.gradients, zero.optimizer, zero.ema) == (78, 40, 120, 40)
    zero = state_memory(network, sharding("zero", stage=3), 1, 4, 4)
    assert (zero.parameters, zero.gradients, zero.optimizer, zero.ema) == (40, 40, 120, 40)


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({"engine": "fsdp", "offload": "all"}, ("parameters", "gradients", "optimizer", "ema")),
        ({"engine": "zero", "offload": "all"}, ("parameters", "gradients", "optimizer", "ema")),
        ({"engine": "zero", "offload": "optimizer", "stage": 2}, ("optimizer", "ema")),
    ],
)
def test_an_offload_moves_and_loses_nothing(settings: dict[str, object], host: tuple[str, ...]) -> None:
    network = units(ElasticViT, TINY, 3)
    here = state_memory(network, ShardingSettings.model_validate(settings | {"offload": None}), 2, 4, 4)
    away = state_memory(network, ShardingSettings.model_validate(settings), 2, 4, 4)
    assert away.host == sum(getattr(here, part) for part in host)
    assert away.state == here.state
    assert away.device == here.device - away.host


def test_units_are_all_parameters() -> None:
    network = units(ElasticViT, TINY, 3)
    assert len(network) == 1 + 3
    assert network[1] == network[2] == network[3]
    assert elements(network) == parameters(ElasticViT, TINY, 3)


# ---- traffic


@given(NETWORKS, st.integers(2, 40), PRECISIONS, st.integers(1, 3))
def test_rings_send_all_but_a_ranks_own_part(
    network: tuple[Unit, ...], world: int, precision: str, passes: int
) -> None:
    fsdp = traffic(network, sharding("fsdp", precision=precision), world, world, passes)
    padded = sum(world * -(-shape[0] // world) * math.prod(shape[1:]) for unit in network for shape in unit)
    assert fsdp.sent("reduce_scatter") == pytest.approx(passes * 4 * padded * (world - 1) / world)
    assert fsdp.count("all_gather") == passes * (2 * len(network) - 1)
    assert fsdp.count("reduce_scatter") == passes * len(network)
    once = traffic(network, sharding("fsdp", precision=precision, reshard_after_forward=False), world, world, passes)
    compute = 2 if precision == "bf16" else 4
    assert once.sent("all_gather") == pytest.approx(passes * compute * padded * (world - 1) / world)
    ddp = traffic(network, sharding("replicated", precision=precision), world, world, passes)
    assert ddp.sent() == pytest.approx(2 * 4 * elements(network) * (world - 1) / world), "once a step"


@given(NETWORKS, st.integers(1, 8), st.integers(1, 8))
def test_hsdp_reduces_across_its_groups(network: tuple[Unit, ...], groups: int, ranks: int) -> None:
    world = groups * ranks
    hsdp = traffic(network, sharding("hsdp", shard=ranks), world, world)
    if groups == 1:
        assert hsdp == traffic(network, sharding("fsdp"), world, world)
    across = [c for c in hsdp.collectives if c.ranks == groups and c.spacing == ranks and c.kind == "all_reduce"]
    owned = sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for unit in network for shape in unit)
    if groups > 1 and ranks > 1:
        assert sum(c.size for c in across) == 4 * owned
    assert not traffic(network, sharding("fsdp"), 1, 1).collectives


@given(st.sampled_from(("all_gather", "reduce_scatter", "all_reduce")), st.floats(1, 1e9), WORLDS)
def test_a_ring_leaves_each_node_once(kind: str, size: float, nodes: int) -> None:
    inside = Collective(kind, size, 8)
    assert inside.between_nodes(H100) == 0
    across = Collective(kind, size, 8 * nodes)
    assert across.between_nodes(H100) == pytest.approx(across.sent / 8 if nodes > 1 else 0)
    apart = Collective(kind, size, nodes, spacing=8)  # one rank of each node
    assert apart.between_nodes(H100) == pytest.approx(apart.sent)


@given(st.sampled_from(("all_gather", "reduce_scatter", "all_reduce")), st.floats(1, 1e9))
def test_more_ranks_and_bytes_take_longer(kind: str, size: float) -> None:
    times = [Collective(kind, size, ranks).seconds(H100) for ranks in (1, 2, 4, 8, 16, 64, 512)]
    assert times[0] == 0
    assert all(a < b for a, b in pairwise(times[:4]))
    assert all(a < b for a, b in pairwise(times[4:]))
    assert Collective(kind, 2 * size, 64).seconds(H100) > times[5]
    assert Collective(kind, size, 64, count=3).seconds(H100) == pytest.approx(3 * times[5])


# ---- activations


def kept_by(network: ElasticViT, images: int, resolution: int) -> int:
    """Bytes that autograd really keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.randn(images, 1, resolution, resolution))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(("images", "resolution", "depth"), [(1, 28, 1), (3, 28, 4), (5, 16, 2)])
def test_activations_are_what_autograd_keeps(images: int, resolution: int, depth: int) -> None:
    network = ElasticViT(TINY, Structure.plain((depth,)))
    predicted = activations(ElasticViT, TINY, Subnet(resolution, depth), images, "fp32")
    assert predicted == kept_by(network, images, resolution)


def test_half_the_precision_keeps_half() -> None:
    full, half = (activations(ElasticViT, TINY, Subnet(28, 4), 8, dtype) for dtype in ("fp32", "bf16"))
    assert half == pytest.approx(full / 2, rel=0.02)  # attention keeps its log-sum-exp in fp32
    assert half < activations(ElasticViT, TINY, Subnet(28, 4), 8, "autocast") < full


def test_recomputing_keeps_one_layer_and_the_inputs_of_all() -> None:
    few, more, most = (activations(ElasticViT, TINY, Subnet(28, d), 6, "fp32", recompute=True) for d in (1, 2, 5))
    tokens = 4 * 6 * (7 * 7 + 1) * 32
    assert few == activations(ElasticViT, TINY, Subnet(28, 1), 6, "fp32")
    assert (more - few, most - few) == (tokens, 4 * tokens)


# ---- a step


@pytest.mark.parametrize("engine", ["replicated", "fsdp", "zero"])
def test_a_step_is_never_faster_than_its_parts(engine: str) -> None:
    chosen = recipe(f"sharding.engine={engine}")
    alone = predict(chosen, ElasticViT, Subnet(224, 12), 1, H100)
    assert (alone.images, alone.communication, alone.exposed) == (1024, 0, 0)
    assert alone.step == alone.compute + alone.update
    assert alone.compute == pytest.approx(6 * 4.6e9 * 1024 / (0.4 * 989e12), rel=0.01)
    for world in (2, 8, 64):
        step = predict(chosen, ElasticViT, Subnet(224, 12), world, H100)
        assert step.compute == pytest.approx(alone.compute / world)
        assert step.step >= max(step.compute + step.exposed, step.communication) + step.update
        assert 0 < step.efficiency < alone.efficiency


def test_micro_batches_bound_the_activations_and_repeat_the_gathers() -> None:
    def step(*changes: str) -> Prediction:
        return predict(recipe(*changes), ElasticViT, Subnet(224, 12), 8, H100)

    whole, quarter = step("sharding.precision=bf16"), step("sharding.precision=bf16", "train.micro_batch=32")
    assert quarter.memory.activations == pytest.approx(whole.memory.activations / 4)
    casts = 4 * step("train.micro_batch=32").memory.activations - step().memory.activations
    assert casts == pytest.approx(3 * 2 * 22e6, rel=0.05), "autocast keeps bf16 copies of 22 million weights besides"
    assert quarter.traffic.count("all_gather", "reduce_scatter") == 4 * whole.traffic.count(
        "all_gather", "reduce_scatter"
    )
    assert quarter.compute == whole.compute


@pytest.mark.parametrize(
    ("changes", "in_turn"),
    [
        (("sharding.engine=fsdp",), True),
        (("sharding.engine=fsdp", "train.micro_batch=32"), False),  # gradients of the first are there in the others
        (("sharding.engine=zero",), False),
    ],
)
def test_gradients_take_the_place_of_activations_where_nothing_keeps_them(
    changes: tuple[str, ...], in_turn: bool
) -> None:
    memory = predict(recipe(*changes), ElasticViT, Subnet(224, 12), 8, H100).memory
    passing = max(memory.activations, memory.gradients) if in_turn else memory.activations + memory.gradients
    assert memory.device == memory.parameters + memory.optimizer + memory.ema + memory.buffers + passing


def test_recomputing_costs_a_third_more_work() -> None:
    plain, again = (
        predict(recipe(f"sharding.recompute={value}"), ElasticViT, Subnet(224, 12), 8, H100)
        for value in ("false", "true")
    )
    assert again.compute == pytest.approx(plain.compute * 4 / 3)
    assert again.memory.activations < plain.memory.activations / 3


def test_a_forecast_marks_the_recipes_engine_and_its_growths() -> None:
    found = forecast(recipe("train.micro_batch=1"), 8, H100)
    assert list(found) == ["replicated", "fsdp *", "hsdp/8", "zero 1", "zero 2", "zero 3"]
    prediction, peak = found["replicated"]
    ladder = [4 * 4 * parameters(ElasticViT, recipe().model, depth) for depth in (10, 12)]  # weights, moments, EMA
    assert peak == max(prediction.memory.device, sum(ladder))


def test_an_engine_that_cannot_train_the_recipe_is_left_out() -> None:
    chosen = recipe("sharding={precision: bf16, recompute: true}")
    assert list(forecast(chosen, 8, H100)) == ["fsdp *", "hsdp/8", "zero 1", "zero 2", "zero 3"]


def test_every_engine_keeps_what_the_recipe_says_and_its_own_stays_as_it_is() -> None:
    chosen = recipe("sharding={engine: zero, stage: 2, offload: optimizer, recompute: true}")
    found = engines(chosen, 16, H100)
    assert found["zero 2 *"].sharding == chosen.sharding
    assert found["hsdp/8"].sharding.shard == 8
    assert all(variant.sharding.recompute for variant in found.values())
    assert [name for name, variant in found.items() if variant.sharding.offload] == ["zero 2 *"]
    with pytest.raises(RecipeError, match=r"16 ranks are not a multiple of 3"):
        forecast(recipe("sharding={engine: hsdp, shard: 3}"), 16, H100)


# ---- what cannot run


@pytest.mark.parametrize(
    ("overrides", "world", "change"),
    [
        (["augment.repeats=1"], 512, r"data\.lanes=512$"),
        ([], 512, r"data\.lanes=512 train\.batch=3072 \(which"),
        ([], 3, r"data\.lanes=57 train\.batch=1026 \(which changes the training\)$"),
        ([], 4096, r"data\.lanes=4096 train\.batch=24576 \(which"),
        (["augment.mixup=0", "augment.cutmix=0"], 1024, r"data\.lanes=1024$"),
    ],
)
def test_a_world_that_cannot_run_is_told_what_could(overrides: list[str], world: int, change: str) -> None:
    with pytest.raises(RecipeError, match=change) as caught:
        Worlds.of(recipe(*overrides)).check(world)
    settings = [word for word in str(caught.value).replace(",", "").split() if "=" in word]
    Worlds.of(recipe(*overrides, *settings)).check(world)


def test_an_offload_that_does_not_fit_is_refused_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe("sharding={engine: fsdp, offload: all}")
    needed = 4 * state_memory(units(ElasticViT, chosen.model, 12), chosen.sharding, 1, 4, 4).host
    check_offload(chosen, 4, 4, needed)
    with pytest.raises(RecipeError, match=r"0\.4 GiB of 4 ranks .* 0\.4 GiB are available; use more nodes"):
        check_offload(chosen, 4, 4, needed - 1)
    check_offload(chosen, 4, 2, needed // 2)
    check_offload(recipe(), 4, 4, 0)
    monkeypatch.setattr("scaleprog.planning.cost_model.host_memory_available", lambda: needed // 2)
    check_offload(chosen, 4, 2)
    with pytest.raises(RecipeError, match=r"0\.2 GiB are available"):
        check_offload(chosen, 4, 4)


def test_the_machine_says_what_memory_it_has(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    123 kB\n")
    assert host_memory_available(meminfo) == 123 * 1024
    assert host_memory_available() > 2**20
    meminfo.write_text("MemTotal: 9 kB\n")
    with pytest.raises(RecipeError, match="no line MemAvailable"):
        host_memory_available(meminfo)
    with pytest.raises(RecipeError, match="cannot tell how much memory"):
        host_memory_available(tmp_path / "none")


def test_an_unknown_device_is_refused_with_the_known() -> None:
    with pytest.raises(RecipeError, match=r"unknown device 'h10'; did you mean h100\? known devices: h100, a100, cpu"):
        Device.named("h10")


def test_hsdp_without_groups_shards_within_a_node() -> None:
    """16 ranks on nodes of 8: each rank offloads an eighth of the state, not a sixteenth."""
    chosen = recipe("sharding={engine: hsdp, offload: all}")
    by_node = recipe("sharding={engine: hsdp, shard: 8, offload: all}")
    network = units(ElasticViT, chosen.model, 12)
    memory = state_memory(network, chosen.sharding, 1, 16, 8)
    assert memory == state_memory(network, by_node.sharding, 1, 16, 8)
    assert traffic(network, chosen.sharding, 16, 8) == traffic(network, by_node.sharding, 16, 8)
    check_offload(chosen, 16, 8, 8 * memory.host)
    with pytest.raises(RecipeError, match="of 8 ranks into this machine's memory"):
        check_offload(chosen, 16, 8, 8 * memory.host - 1)


def test_what_the_operations_take_of_an_accelerator_is_said() -> None:
    for count, device in enumerate(("cpu", "accelerator")):
        recipe = Recipe.load(RECIPE, [f"augment.device={device}"])
        said = [line for line in assumptions(recipe, H100) if line.startswith("augment.device")]
        assert len(said) == count
        assert all("at most 0.5 GiB" in line for line in said)
