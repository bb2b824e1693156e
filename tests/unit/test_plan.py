"""Plans: what model, shards and ranks make of a recipe, and the refusal of all that cannot work before it starts."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprog.errors import DataError, RecipeError
from scaleprog.growth.space import Choice, Subnet
from scaleprog.planning.plan import Plan, describe, gmacs_of, outline, plan_start
from scaleprog.recipe import Recipe
from scaleprog.rundir.planned import read_plan, write_plan
from tests.conftest import CONFIGS, MakeRecipe


def deit(schedule: str, *overrides: str) -> Recipe:
    return Recipe.load(CONFIGS / "imagenet" / f"deit_small_{schedule}_100.yaml", overrides)


def deit_small_parameters(depth: int) -> int:
    """By hand, for width 384, patches of 16 and 1000 classes at 224 px."""
    block = (384 * 3 * 384 + 3 * 384) + (384 * 384 + 384) + (384 * 1536 + 1536) + (1536 * 384 + 384) + 2 * 2 * 384
    patches, positions, norm, head = 3 * 16 * 16 * 384 + 384, (1 + 14 * 14) * 384 + 384, 2 * 384, 384 * 1000 + 1000
    return patches + positions + depth * block + norm + head


def deit_small_gmacs(resolution: int, depth: int) -> float:
    """By hand: linear layers are 12 width^2 a token, queries by keys and weights by values width each a pair."""
    patches = (resolution // 16) ** 2
    block = (patches + 1) * 12 * 384**2 + 2 * (patches + 1) ** 2 * 384
    return (patches * 3 * 16 * 16 * 384 + depth * block + 384 * 1000) / 1e9


# ---- what a recipe amounts to


def test_a_split_without_samples_is_refused(make_recipe: MakeRecipe, patterns: Path, tmp_path: Path) -> None:
    shutil.copytree(patterns, tmp_path / "shards")
    manifest = tmp_path / "shards" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"splits": values["splits"] | {"val": []}}))
    with pytest.raises(DataError, match="shards: the split 'val' has no samples to evaluate with"):
        Plan.of(make_recipe(data={"path": str(tmp_path / "shards")}))


def test_a_plan_counts_steps_batches_and_layers(make_recipe: MakeRecipe, patterns: Path) -> None:
    plan = Plan.of(make_recipe())
    assert (plan.order.samples, plan.order.steps_per_epoch, plan.order.per_lane) == (160, 20, 2)
    assert (plan.schedule.steps, plan.schedule.search_steps) == (80, 10)
    assert plan.schedule.ladder == (Subnet(16, 2), Subnet(24, 3), Subnet(32, 4))
    assert plan.search_batches == 2
    assert plan.manifest.root == str(patterns)
    supernet, trained = plan.schedule.phases([Choice(Subnet(16, 2))])[:2]
    assert plan.schedule.active(trained, Subnet(16, 2)) == ((0, 1),)
    assert [len(*plan.schedule.active(supernet, Subnet(32, depth))) for depth in (2, 3, 4)] == [2, 3, 4]


@pytest.mark.parametrize(("subset", "batches"), [(1, 1), (7, 1), (8, 1), (17, 2), (159, 19), (10**9, 20)])
def test_the_search_subset_is_whole_batches_of_an_epoch(subset: int, batches: int, make_recipe: MakeRecipe) -> None:
    assert Plan.of(make_recipe(search={"subset": subset})).search_batches == batches


def test_one_class_leaves_a_search_nothing_to_compare(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"compares losses, which are all 0 with model\.classes: 1; use linear"):
        describe(make_recipe(model={"classes": 1}, data={"path": "none"}))


def test_a_search_is_a_part_of_the_run_where_the_recipe_does_not_say(make_recipe: MakeRecipe) -> None:
    plan = Plan.of(make_recipe(search={"subset": None, "epochs": None}, train={"epochs": 40, "batch": 4}))
    assert (plan.order.steps_per_epoch, plan.schedule.search_steps, plan.search_batches) == (40, 20, 1)
    assert outline(deit("autoprog", "search.most_cost=null"), 1000)[1].search_steps == 1250


@pytest.mark.parametrize("budget", ["null", "0.45", "0.6", "1.0"])
@pytest.mark.parametrize("part", [0.005, 0.02, 0.5])
@pytest.mark.parametrize("most", ["null", "1"])
@pytest.mark.parametrize("stages", [4, 9, 16])
def test_searches_are_as_short_as_their_most_cost_asks_for(budget: str, part: float, most: str, stages: int) -> None:
    limits = f"search.budget={budget}", f"search.most_cost={part}", f"search.most_searches={most}"
    recipe = deit("autoprog", *limits, f"growth.stages={stages}", "growth.resolution_multiple=16")
    family, schedule = outline(recipe, 1000)
    price = partial(gmacs_of, recipe, family, schedule)
    searches = [phase for phase in schedule.expected((), price) if phase.searched]
    spent = schedule.cost(searches, price) / price(schedule.full) / schedule.steps
    assert spent <= schedule.budget.limit * part
    assert schedule.search_steps == 1250 or spent > 0.9 * schedule.budget.limit * part, "and hardly shorter"


def test_a_search_whose_length_is_given_has_it() -> None:
    assert outline(deit("autoprog", "search.epochs=3"), 1000)[1].search_steps == 3000
    assert outline(deit("autoprog", "search.most_cost=1e-6"), 1000)[1].search_steps == 2 * 4, "of four candidates"


@settings(max_examples=10, deadline=None)
@given(steps_per_epoch=st.integers(1, 2000), epochs=st.floats(1, 50), stages=st.integers(1, 4))
def test_the_schedule_covers_all_steps_whatever_their_number(steps_per_epoch: int, epochs: float, stages: int) -> None:
    recipe = deit("prog", f"train.epochs={epochs}", f"growth.stages={stages}")
    if round(epochs * steps_per_epoch) < stages:
        return
    _, schedule = outline(recipe, steps_per_epoch)
    phases = schedule.phases([])
    assert phases[0].start == 0
    assert phases[-1].stop == round(epochs * steps_per_epoch)
    assert all(before.stop == after.start for before, after in pairwise(phases))
    assert max(p.stop - p.start for p in phases) - min(p.stop - p.start for p in phases) <= 1


# ---- refused: batch, lanes, ranks


def test_a_batch_that_the_lanes_do_not_divide_is_refused_with_lanes_that_do(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(train={"batch": 6}, data={"lanes": 4})
    with pytest.raises(RecipeError, match=r"6 images in 4 lanes do not give .* whole number; use data\.lanes=3$"):
        Plan.of(recipe)
    for lanes in (1, 2, 3, 6):
        Plan.of(make_recipe(train={"batch": 6}, data={"lanes": lanes}))


def test_lanes_that_the_world_does_not_divide_are_refused_with_a_run_that_could(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"^3 ranks do not divide data\.lanes, 4; .* with data\.lanes=3 train"):
        plan_start(make_recipe(), 3, 3)
    for world in (1, 2, 4):
        plan_start(make_recipe(), world, world)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixing_needs_pairs_in_every_lane(mix: str, make_recipe: MakeRecipe) -> None:
    odd = {"train": {"batch": 12}, "data": {"lanes": 4}}
    with pytest.raises(RecipeError, match=r"12 images in 4 lanes do not give .* even number, .* use data\.lanes=3$"):
        Plan.of(make_recipe(augment={mix: 0.8}, **odd))
    Plan.of(make_recipe(**odd))
    Plan.of(make_recipe(augment={mix: 0.8}))


def test_a_batch_larger_than_the_data_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(DataError, match="160 samples in 4 lanes do not fill one global batch of 164"):
        Plan.of(make_recipe(train={"batch": 164}))


# ---- refused: shards


def test_missing_shards_are_refused_with_the_way_to_build_them(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist\. Build it with `scaleprog shards image-folder SRC"):
        Plan.of(make_recipe(data={"path": str(tmp_path / "nowhere")}))
    with pytest.raises(DataError, match=r"has no manifest\.json\. .* `scaleprog shards check .* --write-manifest`"):
        Plan.of(make_recipe(data={"path": str(tmp_path)}))


def damaged(patterns: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """A copy of the shards whose manifest `change` has edited."""
    shutil.copytree(patterns, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["splits"].pop("val"), "has no split 'val'"),
        (lambda m: m["splits"].pop("train"), "has no split 'train'"),
        (lambda m: m["splits"].update(train=[]), "0 samples in 4 lanes do not fill one global batch"),
        (lambda m: m["classes"].pop(), r"model\.classes: 4, but .* has 3 classes"),
        (lambda m: m.update(version=2), "format version 2, but this scaleprog reads version 1"),
        (lambda m: m["splits"]["train"][2].update(bytes=7), r"train-000002\.tar: not the indexed file"),
        (lambda m: m["splits"]["val"][1].update(bytes=10**9), r"val-000001\.tar: truncated"),
        (lambda m: m["splits"]["val"][0].update(name="val-0.tar"), r"val-0\.tar: .* lists this shard, but: No such"),
    ],
)
def test_shards_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], object], message: str, make_recipe: MakeRecipe, patterns: Path, tmp_path: Path
) -> None:
    path = damaged(patterns, tmp_path / "shards", change)
    with pytest.raises((DataError, RecipeError), match=message) as caught:
        Plan.of(make_recipe(data={"path": path}))
    assert "lanes do not fill" in message or path in str(caught.value)


# ---- refused: model and growth


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.resolution=220", "model.resolution: 220 is not a multiple of the model's stride, 16 pixels"),
        ("growth.resolution_multiple=448", "growth.resolution_multiple: 448 is more than model.resolution, 224"),
        ("growth.resolution_multiple=24", "growth.resolution_multiple: 24 is not a multiple of the model's stride, 16"),
        ("model.name=deit_smal_patch16_224",
         "model.name: timm has no model 'deit_smal_patch16_224'; did you mean deit_small_patch16_224 or "),
        ("model.name=deit_small_patch16_224.fb_in1k",
         "model.name: deit_small_patch16_224.fb_in1k names pretrained weights (fb_in1k), but a run starts from "
         "scratch; use deit_small_patch16_224"),
        ("model.name=deit_smal_patch16_224.fb_in1k", "model.name: timm has no model 'deit_smal_patch16_224.fb_in1k'"),
        ("model.name=resnet18", "model.name: resnet18 is not in an elastic family; use "),
        ("model.name=swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224 is not in an elastic family"),
        ("model.heads=5", "model: timm cannot build deit_small_patch16_224 with these sizes: "),
        ("train.epochs=0.003 optimizer.schedule=smooth", "train.epochs: 3 steps are fewer than the 4 stages"),
        ("train.epochs=0.003 optimizer.schedule=smooth optimizer.cooldown_epochs=1",
         "train.epochs: 3 steps are fewer than the 4 stages"),
        ("train.epochs=0.9",
         "optimizer.schedule: timm changes the learning rate once an epoch, but train.epochs is 0.9; use smooth"),
        ("search.ema=1", "search.ema: 1 is not an index of ema.momenta, which has 1"),
    ],
)  # fmt: skip
def test_a_model_or_a_length_that_cannot_work_is_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        describe(deit("prog", *override.split()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[100, 6], [224, 12]", "growth.schedule.0: 100 px, 6 layers; use a multiple of 16 px up to 224 and at most "
         "12 layers"),
        ("[128, 6], [192, 16], [224, 12]", "growth.schedule.1: 192 px, 16 layers; use a multiple"),
        ("[240, 6], [224, 12]", "growth.schedule.0: 240 px, 6 layers; use a multiple"),
        ("[128, 8], [160, 6], [224, 12]", "growth.schedule.1: depth 6 after 8; it must not shrink"),
        ("[128, 6], [224, 10]", "growth.schedule: the last stage must be the complete model, 224 px, 12 layers"),
        ("[128, 6], [192, 12]", "growth.schedule: the last stage must be the complete model"),
        ("", "growth.schedule: the last stage must be the complete model"),
    ],
)  # fmt: skip
def test_stages_by_hand_that_cannot_be_trained_are_refused(stages: str, message: str) -> None:
    by_hand = [{"resolution": r, "depth": d} for r, d in json.loads(f"[{stages}]")]
    with pytest.raises(RecipeError) as caught:
        describe(deit("prog", f"growth.schedule={json.dumps(by_hand)}"))
    assert message in str(caught.value)


def test_a_search_must_leave_something_of_its_stage() -> None:
    short = deit("autoprog", "train.epochs=0.004", "optimizer.schedule=smooth", "optimizer.warmup_epochs=0")
    with pytest.raises(
        RecipeError, match=r"train\.epochs: a stage of 1 steps has no room for 1 of a search and one more;"
    ):
        outline(short, 1000)
    with pytest.raises(RecipeError, match=r"search\.epochs: 25 epochs do not fit into a stage of 25 epochs$"):
        outline(deit("autoprog_published", "search.epochs=25"), 1000)
    outline(deit("autoprog_published", "search.epochs=24"), 1000)
    outline(deit("prog", "search.epochs=25"), 1000)  # searches nothing
    outline(deit("autoprog_published", "search.epochs=25", "growth.stages=1"), 1000)


# ---- budgets


def test_the_budget_is_what_prog_costs_unless_the_recipe_says() -> None:
    prog = describe(deit("prog"))["speedup"]
    _, schedule = outline(deit("autoprog", "growth.patches=resolution"), 1000)
    assert schedule.budget.limit == pytest.approx(1 / (1 + prog), rel=1e-9)
    assert outline(deit("autoprog", "search.budget=0.7"), 1000)[1].budget.limit == 0.7
    assert outline(deit("autoprog", "search.method=published", "search.candidates=window"), 1000)[1].budget is None
    assert outline(deit("prog"), 1000)[1].budget is None


def test_the_default_budget_also_pays_for_a_cooldown() -> None:
    """As Prog does, whose last stage trains it, too."""
    prog, autoprog = (Recipe.load(CONFIGS / f"imagenet/volo_d1_{name}_100.yaml") for name in ("prog", "autoprog"))
    assert prog.optimizer.cooldown_epochs == 10
    autoprog = autoprog.model_copy(update={"growth": autoprog.growth.model_copy(update={"patches": "resolution"})})
    family, ladder = outline(prog, 1000)
    cost = partial(gmacs_of, prog, family, ladder)
    expected = ladder.cost(ladder.phases(()), cost) / cost(ladder.full) / ladder.steps
    assert outline(autoprog, 1000)[1].budget.limit == pytest.approx(expected, rel=1e-3)
    coarse = describe(deit("autoprog", "growth.patches=resolution", "growth.resolution_multiple=64", "growth.stages=3",
                           "growth.smallest=0.9"))  # fmt: skip
    assert 1 / coarse["budget"] - 1 == pytest.approx(coarse["speedup"]), "or as little as it can, where that is more"


def test_scoring_is_part_of_the_budget() -> None:
    scoring = outline(deit("autoprog"), 1000)[1].scoring
    assert scoring == pytest.approx(40 / 3), "forward passes of a 25th of the images"
    assert outline(deit("autoprog", "search.measurements=3"), 1000)[1].scoring == 3 * scoring
    few, many = (describe(deit("autoprog", f"search.measurements={n}")) for n in (1, 101))
    assert few["speedup"] == pytest.approx(many["speedup"], rel=1e-3)
    assert few["stages"][-1]["epochs"] > many["stages"][-1]["epochs"] + 2, (
        "two complete epochs' worth, paid for by such"
    )


@pytest.mark.parametrize("budget", [0.45, 0.6, 0.9, 1.0])
def test_the_plan_of_a_run_keeps_to_its_budget(budget: float) -> None:
    prediction = describe(deit("autoprog", f"search.budget={budget}"))
    assert prediction["speedup"] >= 1 / budget - 1 - 1e-9
    rows = [row for row in prediction["stages"] if row["phase"] == "train"]
    first = 10 if budget == 1 else 25  # what nobody has asked to save is probed
    assert (rows[0]["resolution"], rows[0]["depth"], rows[0]["epochs"]) == (128, 6, first)
    assert (rows[-1]["resolution"], rows[-1]["depth"]) == (224, 12)
    assert rows[-1]["epochs"] >= 25


def test_budgets_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"search\.budget: 0\.3 of Original's cost; the cheapest run, which trains 128 px, 6 layers"
    ):
        outline(deit("autoprog", "search.budget=0.3"), 1000)
    searching = describe(deit("autoprog", "search.budget=0.45", "search.epochs=5"))
    assert searching["speedup"] >= 1 / 0.45 - 1, "searches are part of the budget"
    with pytest.raises(RecipeError, match=r"costs 0\.4\d+ with its searches"):
        outline(deit("autoprog", "search.budget=0.42", "search.epochs=20"), 1000)
    outline(deit("autoprog", "search.budget=0.42"), 1000)
    with pytest.raises(RecipeError, match=r"search\.budget: 0\.5, but search\.method: published has no budget"):
        outline(deit("autoprog_published", "search.budget=0.5"), 1000)
    with pytest.raises(RecipeError, match=r"search\.budget: 0\.5, but only growth\.schedule: automatic has a budget"):
        outline(deit("prog", "search.budget=0.5"), 1000)
    with pytest.raises(RecipeError, match="0 steps are fewer than the 4 stages"):
        outline(deit("autoprog", "train.epochs=0.0001", "optimizer.schedule=smooth"), 1000)
    with pytest.raises(RecipeError, match=r"search\.candidates: window excludes the present network"):
        outline(deit("autoprog", "search.candidates=window"), 1000)


# ---- describe


def test_deit_small_has_the_published_sizes() -> None:
    prediction = describe(deit("autoprog_published"))
    rows = {(row["resolution"], row["depth"]): row for row in prediction["stages"] if row["phase"] == "train"}
    assert list(rows) == [(128, 6), (160, 8), (192, 10), (224, 12)]
    for (resolution, depth), row in rows.items():
        assert row["parameters"] == deit_small_parameters(depth)
        assert row["gmacs"] == pytest.approx(deit_small_gmacs(resolution, depth), rel=1e-9)
    assert rows[224, 12]["parameters"] == 22_050_664  # the paper's 22.05 M
    assert round(rows[224, 12]["gmacs"], 1) == 4.6
    assert prediction["kind"] == "automatic"


def test_searches_are_shown_before_their_stages_and_cost_what_their_candidates_cost() -> None:
    rows = describe(deit("autoprog_published"))["stages"]
    assert [(row["stage"], row["phase"], row["epochs"]) for row in rows] == [
        (1, "supernet", 2), (1, "train", 23), (2, "supernet", 2), (2, "train", 23), (3, "supernet", 2),
        (3, "train", 23), (4, "train", 25),
    ]  # fmt: skip
    assert (rows[0]["resolution"], rows[0]["depth"], len(rows[0]["candidates"])) == (224, 12, 9)
    assert "128 px, 6 layers" in rows[0]["candidates"]
    mean = sum(deit_small_gmacs(r, d) for r in (128, 192, 224) for d in (6, 10, 12)) / 9
    assert rows[0]["gmacs"] == pytest.approx(mean, rel=1e-9)


def test_the_predicted_speedup_is_the_saved_work() -> None:
    full = deit_small_gmacs(224, 12)
    work = [deit_small_gmacs(*size) for size in ((128, 6), (160, 8), (192, 10), (224, 12))]
    prog = describe(deit("prog"))
    assert prog["speedup"] == pytest.approx(4 * full / sum(work) - 1, rel=1e-9)
    assert 0.8 < describe(deit("autoprog_published"))["speedup"] < prog["speedup"]  # a search costs something
    assert describe(deit("original"))["speedup"] == pytest.approx(0, abs=1e-12)
    repeated = describe(deit("autoprog_published", "growth.recycle=false"))
    assert 0 < repeated["speedup"] < describe(deit("autoprog_published"))["speedup"]
    assert sum(row["epochs"] for row in repeated["stages"]) == 100 + 3 * 2


@pytest.mark.parametrize("schedule", ["original", "prog", "autoprog_published"])
def test_a_cooldown_is_added_to_the_last_stage_alone(schedule: str) -> None:
    plain, cooled = (describe(deit(schedule, f"optimizer.cooldown_epochs={n}"))["stages"] for n in (0, 10))
    assert [row["epochs"] for row in cooled[:-1]] == [row["epochs"] for row in plain[:-1]]
    assert cooled[-1]["epochs"] == plain[-1]["epochs"] + 10


@pytest.mark.parametrize("schedule", ["original", "prog", "autoprog_published", "autoprog"])
def test_the_plan_in_a_run_directory_knows_the_cooldown(schedule: str, tmp_path: Path) -> None:
    recipe = deit(schedule, "optimizer.cooldown_epochs=10")
    _, planned = outline(recipe, 1000)
    write_plan(tmp_path, planned, lambda subnet: 1.0)
    read = read_plan(tmp_path)
    assert read is not None
    assert (read[0].policy, read[0].steps) == (planned.policy, 110_000)


def test_a_budget_that_repeats_its_searches_is_read_as_it_was_written(tmp_path: Path) -> None:
    _, planned = outline(deit("autoprog", "growth.recycle=false", "search.budget=0.6", "search.most_searches=2"), 1000)
    assert planned.budget is not None
    assert planned.budget.most == 2
    write_plan(tmp_path, planned, lambda subnet: 1.0)
    read = read_plan(tmp_path)
    assert read is not None
    assert read[0].policy == planned.policy


def test_memory_is_shared_out_by_sharding_alone() -> None:
    one, four = (describe(deit("prog"), world)["stages"][-1]["bytes_per_rank"] for world in (1, 4))
    assert one == 4 * 5 * 22_050_664  # weights, gradients, two moments, one EMA
    positions = 384 + (1 + 14 * 14) * 384  # their first dimension is 1: FSDP2 leaves them to the first rank
    assert four == 4 * 5 * (positions + (22_050_664 - positions) // 4)
    replicated = describe(deit("prog", "sharding.engine=replicated", "ema.momenta=[0.9, 0.99]"), 4)
    assert replicated["stages"][-1]["bytes_per_rank"] == 4 * 6 * 22_050_664


def test_the_supernet_baseline_is_one_phase_of_the_whole_space() -> None:
    prediction = describe(deit("prog", "growth.schedule=supernet", "growth.recycle=false"))
    (row,) = prediction["stages"]
    assert (row["stage"], row["phase"], row["epochs"], len(row["candidates"])) == (1, "supernet", 100, 16)
    sizes = [(r, d) for r in (128, 160, 192, 224) for d in (6, 8, 10, 12)]
    mean = sum(deit_small_gmacs(*size) for size in sizes) / 16
    assert prediction["speedup"] == pytest.approx(deit_small_gmacs(224, 12) / mean - 1, rel=1e-9)


def test_a_run_may_see_a_part_of_the_patches_throughout(tmp_path: Path) -> None:
    half = "growth.schedule=[{resolution: 160, depth: 12}]"
    recipe = deit("original", half, "growth.patches=subset")
    _, schedule = outline(recipe, 10)
    (phase,) = schedule.phases([])
    assert (phase.network, schedule.full) == (Subnet(160, 12), Subnet(224, 12))
    assert (schedule.view(phase.network).pixels, schedule.view(phase.network).patches) == (224, 100)
    told = describe(recipe)
    (row,) = told["stages"]
    assert told["speedup"] == pytest.approx(deit_small_gmacs(224, 12) / row["gmacs"] - 1)
    write_plan(tmp_path, schedule, lambda subnet: 1.0)
    read = read_plan(tmp_path)
    assert read is not None
    assert read[0].full == schedule.full
    assert read[0].phases([]) == schedule.phases([])
    for wrong in ((half,), ("growth.schedule=[{resolution: 160, depth: 6}]", "growth.patches=subset")):
        with pytest.raises(RecipeError, match="the last stage must be the complete model, 224 px"):
            outline(deit("original", *wrong), 10)


@pytest.mark.parametrize("budget", ["null", "1.0"])
def test_a_budget_of_all_of_originals_cost_is_no_promise_even_where_searches_exceed_it(budget: str) -> None:
    settings = [
        "growth.patches=resolution", "growth.stages=3", "growth.smallest=0.6", "train.epochs=1",
        "search.most_searches=null", "search.most_cost=null", "search.measurements=5", "search.subset=60000",
    ]  # fmt: skip
    recipe = Recipe.load(CONFIGS / "fashion_mnist" / "autoprog.yaml", [*settings, f"search.budget={budget}"])
    _, schedule = outline(recipe, 937)
    assert schedule.budget is not None
    assert (schedule.budget.limit, schedule.budget.promised) == (1.0, False)
