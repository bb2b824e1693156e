"""Sizes have bounds: whatever number stands in a recipe, it is planned or refused, soon and with little memory."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog import models
from scaleprog.cli.planning import rank_counts
from scaleprog.errors import DataError, RecipeError, ScaleprogError
from scaleprog.models import resolve_family
from scaleprog.planning.plan import Plan, describe, plan_start
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import ModelSettings
from tests.conftest import MakeRecipe
from tests.unit.command import Command, WriteRecipe, is_mistake

CONFIGS = Path(__file__).parents[2] / "configs"
EXTREMES = (-1, 0, 1e9, 10**9, 1e300, -1e300, 10**300, float("nan"), float("inf"), 1e-300, "", "x", True, None, [], {},
            [0], [1e300] * 50, [[]], {"a": 1})  # fmt: skip
BASES = {
    name: Recipe.load(CONFIGS / f"{name}.yaml").model_dump(mode="json")
    for name in ("fashion_mnist/autoprog", "fashion_mnist/late", "fashion_mnist/autoprog_published")
}


def leaves(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where every value of nested plain values stands."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, below in items for leaf in leaves(below, (*at, key))]
    return [at]


def changed(values: Any, at: tuple[str | int, ...], new: Any) -> Any:
    """The same values, but for one."""
    if not at:
        return new
    copy = dict(values) if isinstance(values, dict) else list(values)
    copy[at[0]] = changed(values[at[0]], at[1:], new)  # type: ignore[index,call-overload]
    return copy


def plan(values: Any) -> str:
    """What is wrong with a recipe; empty if it can be planned. Anything but an error of ours raises."""
    try:
        describe(Recipe.of(values, "changed"))
    except (RecipeError, DataError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("base", BASES)
def test_every_value_replaced_by_every_extreme(base: str) -> None:
    """Each alone; most are refused by their type, and what is planned must be planned in time."""
    values = BASES[base]
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    for at in leaves(values):
        for extreme in EXTREMES:
            assert len(plan(changed(values, at, extreme))) < 10_000
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert int(peak) < 2 * 2**20


LEAVES = leaves(BASES["fashion_mnist/autoprog"])
VALUES = st.integers(1, 64) | st.integers(1, 2**17) | st.floats(0, 1)


@given(st.lists(st.tuples(st.sampled_from(LEAVES), VALUES), max_size=4))
def test_values_within_bounds_together(changes: list[tuple[tuple[str | int, ...], Any]]) -> None:
    values = BASES["fashion_mnist/autoprog"]
    for at, new in changes:
        values = changed(values, at, new)
    plan(values)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.depth=1000000000"], r"model\.depth: .* less than or equal to 256"),
        (["model.width=65536", "model.heads=1", "model.depth=256"], r"has 1\.\d+e\+13 parameters.*the limit is 1e\+11"),
        (["model.resolution=4096", "model.patch=4"], r"1048576 tokens; the limits are"),
        (["model.resolution=4096", "model.patch=64", "train.batch=1048576", "data.lanes=1"],
         r"train\.batch: 1048576 images of 4096 x 4096 pixels per rank, .* GiB decoded"),
        (["data.prefetch=1000", "evaluate.batch=100000"], r"evaluate\.batch: .* with data\.prefetch 1000, take .* GiB"),
        (["train.epochs=1e5", "growth.stages=32"], None),
        (["growth.stages=10000000"], r"growth\.stages"),
        (["growth.schedule=[" + "{resolution: 28, depth: 6}, " * 200 + "]"], r"growth\.schedule"),
        (["augment.randaugment=rand-n1000000"], r"randaugment: .* n from 1 to 16"),
        (["augment.randaugment=rand-m9-n2-mstd1e9"], r"randaugment"),
        (["augment.randaugment=rand-m9-q2"], r"timm does not understand"),
        (["augment.padding=1000000"], r"augment\.padding"),
        (["augment.repeats=1000000"], r"augment\.repeats"),
        (["data.workers=100000"], r"data\.workers"),
        (["optimizer.lr=1.0e+300"], r"optimizer\.lr"),
        (["optimizer.weight_decay=1.0e+300"], r"optimizer\.weight_decay"),
        (["ema.momenta=[" + "0.5, " * 50 + "]"], r"ema\.momenta"),
        (["model.channels=2"], r"model\.channels: 2; images have 1"),
        (["augment.mean=[0.5, 0.5]"], r"must have 1 numbers each"),
        (["data.lanes=true"], r"data\.lanes: Input should be a number, got True"),
    ],
)  # fmt: skip
def test_what_is_absurd_is_refused_with_its_number(overrides: list[str], message: str | None) -> None:
    overrides = [*overrides, "data.path=nowhere"]  # whoever runs this may have built the recipe's shards
    if message is None:
        assert describe(Recipe.load(CONFIGS / "fashion_mnist/prog.yaml", overrides))["stages"]
    else:
        with pytest.raises((RecipeError, DataError), match=message):
            describe(Recipe.load(CONFIGS / "fashion_mnist/prog.yaml", overrides))


def test_the_longest_search_is_planned_in_time() -> None:
    overrides = ["growth.stages=32", "search.candidates=all", "search.epochs=0.01", "model.depth=256",
                 "model.resolution=2048", "search.method=published"]  # fmt: skip
    assert describe(Recipe.load(CONFIGS / "imagenet/deit_small_autoprog_100.yaml", overrides))["stages"]


@pytest.mark.parametrize(
    "name",
    ["hf-hub:timm/vit_tiny_patch16_224", "hf_hub:timm/vit_tiny_patch16_224", "local-dir:.", "http://127.0.0.1/x", "a/b",
     "../vit_tiny_patch16_224", "vit_tiny_patch16_224.a.b", "vit_tiny_patch16_224.", ".", "vit_tiny_patch16_224\n", "",
     "vit_tiny_patch16_224.no_such_tag", "file:vit_tiny_patch16_224", "vit_tiny_patch16_224@main"],
)  # fmt: skip
def test_a_model_is_named_and_nothing_is_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    create = models.timm.create_model
    monkeypatch.setattr(models.timm, "create_model", lambda **kinds: (built.append(kinds), create(**kinds))[1])
    with pytest.raises((RecipeError, ValueError)):
        resolve_family(ModelSettings(name=name))
    assert all(kinds["model_name"] == "vit_tiny_patch16_224.no_such_tag" for kinds in built)


def test_what_a_rank_may_decode_depends_on_how_many_there_are(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        train={"batch": 160}, data={"prefetch": 800, "workers": 1, "lanes": 4}, growth={"schedule": "original"},
        model={"resolution": 768, "patch": 64},
    )  # fmt: skip
    assert describe(recipe)
    with pytest.raises(RecipeError, match=r"train\.batch: 160 images of 768 x 768 pixels per rank"):
        plan_start(recipe, 1, 1)
    plan_start(recipe, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": 10**9}, "1000000000 samples in .* bytes, which is im"), ({"bytes": 10**12}, "manifest.json says"),
     ({"samples": -1}, "malformed at splits.train.0.samples"), ({"name": "pipe:touch ruined.tar"}, "malformed at")],
)  # fmt: skip
@pytest.mark.parametrize("command_name", ["plan", "train"])
def test_shards_that_cannot_be_are_refused_by_plan(
    change: dict[str, Any], message: str, command_name: str, patterns: Path, tmp_path: Path,
    write_recipe: WriteRecipe, command: Command,
) -> None:  # fmt: skip
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in patterns.iterdir():
        (folder / path.name).symlink_to(path)
    manifest = json.loads((patterns / "manifest.json").read_text())
    manifest["splits"]["train"][0] |= change
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    recipe = write_recipe(data={"path": str(folder)})
    told = command(command_name, recipe, *([] if command_name == "plan" else ["--run-dir", tmp_path / "run"]))
    assert is_mistake(told, str(folder))
    with pytest.raises(DataError, match=message):
        Plan.of(Recipe.load(recipe))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text", ["0", "8,", "", "-1", "1e3", "1000000", "9" * 5000, "²", "٣", ",".join(["8"] * 33), "8;9"]
)
def test_numbers_of_ranks(text: str) -> None:
    with pytest.raises(ScaleprogError, match="--world") as caught:
        rank_counts(text)
    assert len(str(caught.value)) < 300


def test_numbers_of_the_command_line(write_recipe: WriteRecipe, command: Command) -> None:
    recipe = write_recipe()
    assert is_mistake(command("train", recipe, "--nproc", 10**9))
    assert is_mistake(command("train", recipe, "--nproc", "9" * 5000))
    assert is_mistake(command("submit", recipe, "--nodes", 10**8, "--dry-run"))
    for wrong in (["plan", recipe, "--nproc", 10**9], ["train", recipe, "--restarts", 10**9],
                  ["submit", recipe, "--gpus-per-node", 10**9], ["shards", "check", "x", "--workers", 10**9],
                  ):  # fmt: skip
        assert command(*wrong).code == 2
    told = command("plan", recipe, "--world", 999999)
    assert told.code == 0
    assert "999999 ranks: cannot run" in told.out
