"""Whether the loader keeps up: arithmetic on modeled steps and given rates, and what `plan --cores` prints of it."""

from pathlib import Path
from typing import Any

import pytest

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.models import resolve_family
from scaleprog.planning.cost_model import predict
from scaleprog.planning.devices import Device
from scaleprog.planning.supply import Supply
from scaleprog.recipe import Recipe
from tests.conftest import MakeRecipe
from tests.unit.command import Command, WriteRecipe, is_mistake, rows_of

DEVICE = Device.named("cpu")
PROG: dict[str, Any] = {"growth": {"schedule": "linear"}, "sharding": {"engine": "replicated"}}
SUBNETS = (Subnet(16, 2), Subnet(24, 3), Subnet(32, 4))


def supply(recipe: Recipe, rates: dict[int, float], cores: int = 3, world: int = 2) -> Supply:
    return Supply.of(recipe, world, DEVICE, cores, rates)


def test_a_step_takes_as_long_as_the_slower_of_device_and_cores(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**PROG, data={"workers": "auto"})
    found = supply(recipe, {16: 1e9, 24: 10.0, 32: 1e9})
    assert (found.decoders, [phase.network for phase in found.phases]) == (2, list(SUBNETS))
    small, middle, full = SUBNETS
    assert found.decoding[middle] == pytest.approx(8 / (10.0 * 2 * 2)), "2 decoders of each of 2 ranks"
    assert found.stepping[middle] == found.decoding[middle] > found.computing[middle]
    for subnet in (small, full):
        assert found.stepping[subnet] == found.computing[subnet] > found.decoding[subnet]
    first, second, last = found.phases
    assert found.waiting(first) == found.waiting(last) == 0
    assert found.waiting(second) == pytest.approx(1 - found.computing[middle] / found.decoding[middle])
    assert found.rate(second, found.decoding) == pytest.approx(10.0 * 2 * 2)
    full_speed = supply(recipe, dict.fromkeys((16, 24, 32), 1e9))
    assert full_speed.speedup(full_speed.stepping) == full_speed.speedup(full_speed.computing) > 0


def test_growth_saves_no_time_where_every_step_waits(make_recipe: MakeRecipe) -> None:
    found = supply(make_recipe(**PROG), dict.fromkeys((16, 24, 32), 0.01))
    assert found.speedup(found.stepping) == pytest.approx(0)
    assert found.speedup(found.computing) > 0.1


def test_with_the_cores_that_it_needs_no_phase_waits_and_with_one_fewer_it_does(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(**PROG, data={"workers": "auto"})
    family, full, _ = resolve_family(recipe.model)
    step = predict(recipe, family, full, 2, DEVICE).step
    rates = dict.fromkeys(
        (16, 24, 32), 8 / 2 / step / 5.5
    )  # 5.5 cores per rank decode as fast as the full network eats
    (*_, last) = supply(recipe, rates).phases
    needed = supply(recipe, rates).cores_needed(last)
    assert needed == 7
    assert (
        supply(recipe, rates, cores=needed).waiting(last) == 0 < supply(recipe, rates, cores=needed - 1).waiting(last)
    )


@pytest.mark.parametrize(
    ("workers", "cores", "decoders"), [(4, 12, 4), (4, 2, 2), (0, 12, 1), ("auto", 12, 11), ("auto", 1, 1)]
)
def test_decoders_are_workers_with_a_core(
    workers: int | str, cores: int, decoders: int, make_recipe: MakeRecipe
) -> None:
    found = supply(make_recipe(**PROG, data={"workers": workers}), dict.fromkeys((16, 24, 32), 1.0), cores)
    assert found.decoders == decoders


def test_a_size_without_a_rate_is_named(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match="not known at 16, 24 px"):
        supply(make_recipe(**PROG), {32: 100.0})


# ---- the command


def test_plan_says_which_stages_wait(
    command: Command, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    recipe = write_recipe(growth={"schedule": "linear"})
    arguments = ("plan", recipe, "--world=2", "--device=cpu", "--cores=3")
    told = command(*arguments, "--images-per-core-second=16=0.5,24=2e9", "data.workers=2")
    assert is_mistake(told, "--images-per-core-second: '16=0.5,24=2e9'", "224=300,160=450")
    told = command(*arguments, "--images-per-core-second=16=0.5,24=200000000,32=1.50000000000000001", "data.workers=2")
    assert (told.code, told.err) == (0, "")
    assert max(map(len, told.out.splitlines())) <= 80
    assert [(row[2], row[5], row[6]) for row in rows_of(told.out)[3:]] == [
        ("16", "2", "100%"),
        ("24", "800000000", "0%"),
        ("32", "6", "100%"),
    ]
    assert "2 ranks, 3 cores each, of which 2 prepare images" in told.out
    assert "not a measurement" in " ".join(told.out.split())


def test_plan_goes_on_after_ranks_that_cannot_train(command: Command, write_recipe: WriteRecipe) -> None:
    rates = "--images-per-core-second=16=100,24=100,32=100"
    told = command("plan", write_recipe(data={"lanes": 4}), "--world=8,4", "--device=cpu", "--cores=2", rates)
    assert (told.code, told.err) == (0, "")
    words = " ".join(told.out.split())
    assert "8 ranks: cannot run: 8 ranks do not divide data.lanes, 4" in words
    assert "4 ranks, 2 cores each" in words


def test_plan_measures_the_shards_if_nobody_says_how_fast(command: Command, write_recipe: WriteRecipe) -> None:
    told = command("plan", write_recipe(), "--world=1", "--device=cpu", "--cores=2")
    assert (told.code, told.err) == (0, "")
    assert "of a core at 32 px" in " ".join(told.out.split())


def test_plan_asks_for_what_it_lacks(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    assert is_mistake(command("plan", write_recipe(), "--cores=2"), "--cores 2: add the numbers of ranks", "--world 8")
    recipe = write_recipe(data={"path": str(tmp_path / "nowhere")})
    told = command("plan", recipe, "--world=1", "--cores=2")
    assert is_mistake(told, f"there are no shards in {tmp_path}/nowhere", "--images-per-core-second")
