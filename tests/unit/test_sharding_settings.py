"""What of a recipe's sharding is refused, with what words, and that it is before any process is started."""

import importlib.util
from pathlib import Path

import pytest
from pydantic import ValidationError

from scaleprog.cli import main
from scaleprog.errors import RecipeError
from scaleprog.planning.plan import plan_start
from scaleprog.recipe.keys import ShardingSettings
from tests.conftest import MakeRecipe


@pytest.mark.parametrize(
    ("sharding", "said"),
    [
        ({"engine": "zero", "stage": 4}, r"sharding\.stage: Input should be 1, 2 or 3, got 4"),
        ({"engine": "fsdp", "stage": 2}, r"sharding: stage needs engine zero, got engine fsdp"),
        ({"engine": "fsdp", "shard": 2}, r"sharding: shard needs engine hsdp, got engine fsdp"),
        ({"engine": "hsdp", "shard": 0}, r"sharding\.shard: .* greater than or equal to 1, got 0"),
        ({"engine": "replicated", "offload": "all"}, r"offload needs an engine that shards: fsdp, hsdp or zero"),
        ({"engine": "zero", "stage": 2, "offload": "all"}, r"offload: all needs stage 3, .* use offload: optimizer"),
        ({"engine": "fsdp", "offload": "optimizer"}, r"engine fsdp offloads all or nothing, got offload: optimizer"),
    ],
)
def test_settings_that_contradict_each_other(sharding: dict, said: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=said):
        make_recipe(sharding=sharding)


def test_an_optimizer_that_cannot_be_sharded(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.name: 'muon' cannot be sharded; use adamw.* element by element"):
        make_recipe(optimizer={"name": "muon"})
    with pytest.raises(RecipeError, match=r"optimizer\.name: 'sgd' is not there; the only optimizer is adamw"):
        make_recipe(optimizer={"name": "sgd"})


def test_groups_that_do_not_divide_the_ranks(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(sharding={"engine": "hsdp", "shard": 3})
    with pytest.raises(RecipeError, match=r"sharding\.shard: 4 ranks are not a multiple of 3, the ranks"):
        plan_start(recipe, world=4, per_node=4)
    assert ShardingSettings(engine="hsdp").shard_ranks(8, per_node=4) == 4


def test_zero_without_deepspeed(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(sharding={"engine": "zero"})
    plan_start(recipe, world=2, per_node=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"zero needs DeepSpeed: pip install 'scaleprog\[deepspeed\]'"):
        plan_start(recipe, world=2, per_node=2)


def test_offload_to_a_host_that_is_too_small(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(sharding={"engine": "fsdp", "offload": "all"})
    plan_start(recipe, world=2, per_node=2)
    monkeypatch.setattr("scaleprog.planning.cost_model.host_memory_available", lambda: 1000)
    with pytest.raises(RecipeError, match=r"offload: all puts .* of 2 ranks into this machine's memory, but 0\.0 GiB"):
        plan_start(recipe, world=2, per_node=2)


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (["sharding.engine=zero", "sharding.stage=4"], "2", "sharding.stage: Input should be 1, 2 or 3, got 4"),
        (["sharding.engine=hsdp", "sharding.shard=4"], "2", "sharding.shard: 2 ranks are not a multiple of 4"),
        ([], "3", "3 ranks do not divide data.lanes, 4"),
    ],
)
def test_nothing_is_started_for_what_cannot_run(
    overrides: list[str], ranks: str, said: str, make_recipe: MakeRecipe, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(make_recipe().dump())
    monkeypatch.setattr("scaleprog.launchers.local.launch", lambda *_, **__: pytest.fail("ranks were started"))
    arguments = ["train", str(path), *overrides, "--nproc", ranks, "--run-dir", str(folder)]
    monkeypatch.setattr("sys.argv", ["scaleprog", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not folder.exists()


def test_recompute_in_bf16_needs_an_engine_that_casts_before() -> None:
    with pytest.raises(ValidationError, match="recompute with engine replicated needs precision autocast or fp32"):
        ShardingSettings(engine="replicated", precision="bf16", recompute=True)
    ShardingSettings(engine="replicated", precision="autocast", recompute=True)
    ShardingSettings(engine="fsdp", precision="bf16", recompute=True)
