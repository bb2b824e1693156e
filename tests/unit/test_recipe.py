"""Recipes: files over bases under overrides become one checked value, and every mistake is named with what is valid."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.errors import RecipeError
from scaleprog.recipe import FREE, Recipe, reference
from scaleprog.recipe.keys import Operator, SubnetSettings
from scaleprog.recipe.numbers import LocalPath, Location
from scaleprog.recipe.recipe import PATHS
from tests.conftest import CONFIGS, RECIPES

LEAST = {"model": {"name": "vit_tiny_patch16_224"}, "data": {"path": "shards"}, "train": {"epochs": 4, "batch": 64}}

NAMES = [repr(name) for name in get_args(Operator)]


def write(folder: Path, name: str, values: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.fixture
def least(tmp_path: Path) -> Path:
    """A recipe with nothing but what a recipe needs."""
    return write(tmp_path, "least.yaml", LEAST)


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error below the one that names the recipe."""
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path}:"
    return [line.strip() for line in lines]


# ---- files


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_of_the_repository_loads_and_reloads_equal(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.load(write(tmp_path, "dumped.yaml", recipe.dump())) == recipe


def test_a_base_is_found_from_the_file_that_names_it_and_may_have_a_base_itself(tmp_path: Path) -> None:
    write(tmp_path, "all.yaml", LEAST | {"seed": 1, "optimizer": {"lr": 0.1, "clip": 1}})
    write(tmp_path, "family/small.yaml", {"base": "../all.yaml", "seed": 2, "optimizer": {"lr": 0.2}})
    recipe = Recipe.load(write(tmp_path, "runs/mine.yaml", {"base": "../family/small.yaml", "train": {"epochs": 9}}))
    assert (recipe.seed, recipe.optimizer.lr, recipe.optimizer.clip) == (2, 0.2, 1)
    assert (recipe.train.epochs, recipe.train.batch) == (9, 64)


def test_a_base_that_is_not_beside_the_recipe_is_the_shipped_one_of_its_name(tmp_path: Path) -> None:
    mine = write(tmp_path, "mine.yaml", {"base": "digits/original.yaml", "seed": 5})
    shipped = Recipe.load("digits/original")
    assert Recipe.load(mine) == shipped.model_copy(update={"seed": 5})
    write(tmp_path, "digits/original.yaml", LEAST | {"train": {**LEAST["train"], "epochs": 7}})
    assert Recipe.load(mine).train.epochs == 7, "a file beside it comes first"


def test_a_shipped_part_of_recipes_is_a_base_but_no_recipe(tmp_path: Path) -> None:
    mine = write(tmp_path, "mine.yaml", {"base": ["digits/base.yaml", "bases/autoprog.yaml"]})
    shipped = Recipe.load("digits/autoprog")
    assert Recipe.load(mine).optimizer.decay == shipped.optimizer.decay == "takeover"
    with pytest.raises(RecipeError, match="no such recipe"):
        Recipe.load("bases/autoprog")


def test_of_several_bases_each_is_laid_over_those_before_it(tmp_path: Path) -> None:
    write(tmp_path, "all.yaml", LEAST | {"seed": 1, "optimizer": {"lr": 0.1, "clip": 1}})
    write(tmp_path, "long.yaml", {"seed": 2, "optimizer": {"lr": 0.2}, "train": {"epochs": 9}})
    recipe = Recipe.load(write(tmp_path, "mine.yaml", {"base": ["all.yaml", "long.yaml"], "optimizer": {"lr": 0.3}}))
    assert (recipe.seed, recipe.optimizer.lr, recipe.optimizer.clip, recipe.train.epochs) == (2, 0.3, 1, 9)


def test_a_list_replaces_the_list_below_it(tmp_path: Path) -> None:
    write(tmp_path, "below.yaml", LEAST | {"ema": {"momenta": [0.9, 0.99]}, "growth": {"schedule": "linear"}})
    above = {"ema": {"momenta": [0.5]}, "growth": {"schedule": [{"resolution": 224, "depth": 12}]}}
    recipe = Recipe.load(write(tmp_path, "above.yaml", {"base": "below.yaml"} | above))
    assert recipe.ema.momenta == (0.5,)
    assert recipe.growth.schedule == (SubnetSettings(resolution=224, depth=12),)
    assert Recipe.load(tmp_path / "above.yaml", ["growth.schedule=linear"]).growth.schedule == "linear"


@pytest.mark.parametrize("files", [("a",), ("a", "b"), ("a", "b", "c")])
def test_bases_in_a_circle_are_refused_with_the_circle(files: tuple[str, ...], tmp_path: Path) -> None:
    for name, base in zip(files, (*files[1:], files[0])):
        write(tmp_path, f"{name}.yaml", {"base": f"{base}.yaml"})
    with pytest.raises(RecipeError, match="cannot be its own base") as caught:
        Recipe.load(tmp_path / "a.yaml")
    assert all(f"{name}.yaml" in str(caught.value) for name in files)


def test_a_missing_recipe_or_base_is_named_with_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, "linear.yaml", LEAST)
    with pytest.raises(RecipeError, match=r"/liner\.yaml: no such recipe; did you mean linear\.yaml\?"):
        Recipe.load(tmp_path / "liner.yaml")
    child = write(tmp_path, "mine.yaml", {"base": "liner.yaml"})
    with pytest.raises(RecipeError, match=rf"/liner\.yaml: no such recipe, the base of {child}; did you mean linear"):
        Recipe.load(child)
    with pytest.raises(RecipeError, match=r"elsewhere/x\.yaml: no such recipe$"):
        Recipe.load(tmp_path / "elsewhere" / "x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mapping of keys to values"),
        ("- train", "mapping of keys to values"),
        ("train: {epochs: 4", "not readable as YAML"),
        ("model: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, "wrong.yaml", text)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value)


def test_a_folder_or_bytes_in_place_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00seed")
    for path in (tmp_path, tmp_path / "bytes.yaml"):
        with pytest.raises(RecipeError, match="not readable as YAML"):
            Recipe.load(path)


# ---- overrides


def test_overrides_reach_any_depth_and_hold_any_yaml(least: Path) -> None:
    recipe = Recipe.load(
        least,
        ["seed=7", "optimizer.lr=1e-3", "optimizer.betas=[0.8, 0.95]", "data.path=other=place", "optimizer.clip=null",
         "growth.schedule=[{resolution: 112, depth: 6}, {resolution: 224, depth: 12}]", "growth.recycle=false",
         "augment={flip: 0, erase: 0.25}", "augment.erase=0.5", "seed=8"],
    )  # fmt: skip
    assert (recipe.seed, recipe.optimizer.lr, recipe.optimizer.betas) == (8, 1e-3, (0.8, 0.95))
    assert recipe.data.path == "other=place"
    assert recipe.optimizer.clip is None
    assert recipe.growth.schedule == (
        SubnetSettings(resolution=112, depth=6), SubnetSettings(resolution=224, depth=12)
    )  # fmt: skip
    assert not recipe.growth.recycle
    assert (recipe.augment.flip, recipe.augment.erase) == (0, 0.5)
    assert recipe.train.batch == 64


@pytest.mark.parametrize("override", ["train.epochs", "train.epochs:3", "=3"])
def test_an_override_that_is_no_key_and_value(override: str, least: Path) -> None:
    with pytest.raises(RecipeError, match=f"override '{override}' is not of the form key=value"):
        Recipe.load(least, [override])


def test_an_override_whose_value_is_no_yaml(least: Path) -> None:
    with pytest.raises(RecipeError, match=r"override 'ema.momenta=\[0.9': the value is not YAML"):
        Recipe.load(least, ["ema.momenta=[0.9"])


# ---- unknown keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=3", "sede: unknown key; did you mean seed?"),
        ("lr=1e-3", "lr: unknown key; did you mean optimizer.lr?"),
        ("epochs=3", "epochs: unknown key; did you mean train.epochs or search.epochs?"),
        ("data.batch=3", "data.batch: unknown key; did you mean train.batch or evaluate.batch?"),
        ("ema.momenta=0.99", "ema.momenta: Input should be a list, such as [0.99], got 0.99"),
        ("seed=yes", "seed: Input should be a number, got True"),
        ("sharding.stage=yes", "sharding.stage: Input should be a number, got True"),
        ("growht.stages=3", "growht: unknown key; did you mean growth?"),
        ("growth.stagess=3", "growth.stagess: unknown key; did you mean growth.stages?"),
        ("train.maxsteps=3", "train.maxsteps: unknown key; did you mean train.max_steps?"),
        ("checkpoint.every_step=3", "checkpoint.every_step: unknown key; did you mean checkpoint.every_steps?"),
        ("checkpoint.every=3", "checkpoint.every: Input should be 'auto', got 3"),
        (
            "checkpoint.folder=3",
            "checkpoint.folder: unknown key; valid here: every, every_steps, every_minutes, keep, keep_best, "
            "keep_every_epochs",
        ),
        ("train.batch.size=3", "train.batch: Input should be a valid integer, got {'size': 3}"),
        ("base=other.yaml", "base: unknown key; did you mean seed?"),  # a base is for files
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(override: str, message: str, least: Path) -> None:
    assert problems(least, override) == [message]


def test_a_dotted_key_belongs_into_overrides(tmp_path: Path) -> None:
    path = tmp_path / "dotted.yaml"
    path.write_text("train.epochs: 3\n")
    with pytest.raises(RecipeError, match=r"in a file, each group is a mapping of its own: train: \{epochs: \.\.\.\}"):
        Recipe.load(path)


def test_a_run_directory_in_the_place_of_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{tmp_path}: not readable as YAML: a folder$"):
        Recipe.load(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match=f"to resume it, use {tmp_path}/recipe.yaml --run-dir {tmp_path}"):
        Recipe.load(tmp_path)


def test_an_unknown_key_of_a_stage_by_hand(least: Path) -> None:
    schedule = "growth.schedule=[{resolution: 112, depth: 6}, {resolution: 224, depht: 12}]"
    assert problems(least, schedule) == [
        "growth.schedule.1.depth: missing",
        "growth.schedule.1.depht: unknown key; did you mean growth.schedule.1.depth?",
    ]


def keys(values: Any, prefix: str = "") -> list[str]:
    """Every key of nested plain values, groups included."""
    below = [k for key, v in values.items() for k in keys(v, f"{prefix}{key}.")] if isinstance(values, dict) else []
    return [*([prefix[:-1]] if prefix else []), *below]


KEYS = keys(Recipe.of(LEAST, "least").model_dump())


@given(st.sampled_from(KEYS), st.integers(min_value=0), st.characters(codec="ascii", categories=["L"]))
def test_one_stray_letter_in_any_key_is_told_with_the_right_key(key: str, at: int, letter: str) -> None:
    group, _, name = key.rpartition(".")
    at %= len(name) + 1
    stray = name[:at] + letter + name[at:]
    typo: Any = {stray: 1}
    for part in reversed(group.split(".") if group else []):
        typo = {part: typo}
    values = {g: {**LEAST.get(g, {}), **typo.get(g, {})} for g in (*LEAST, *typo) if g != stray}
    with pytest.raises(RecipeError, match=r"unknown key; did you mean ([\w.]+)\?"):
        Recipe.of(values | {g: v for g, v in typo.items() if g == stray}, "typo")


# ---- values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch=many", "train.batch: Input should be a valid integer, unable to parse string as an integer, "
         "got 'many'"),
        ("train.batch=3.5", "train.batch: Input should be a valid integer, got a number with a fractional part, "
         "got 3.5"),
        ("train.batch=0", "train.batch: Input should be greater than or equal to 1, got 0"),
        ("train.batch=", "train.batch: Input should be a valid integer, got None"),
        ("train.epochs=0", "train.epochs: Input should be greater than 0, got 0"),
        ("train.epochs=.nan", "train.epochs: Input should be a finite number, got nan"),
        ("train=[1, 2]", "train: Input should be a valid dictionary or instance of TrainSettings, got [1, 2]"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ("seed=4294967296", "seed: Input should be less than 4294967296, got 4294967296"),
        ("optimizer.lr=-1e-3", "optimizer.lr: Input should be greater than 0, got '-1e-3'"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: missing"),
        ("model.name=3", "model.name: Input should be a valid string, got 3"),
        ("model.drop_path=1", "model.drop_path: Input should be less than 1, got 1"),
        ("data.lanes=0", "data.lanes: Input should be greater than or equal to 1, got 0"),
        ("data.workers=-1", "data.workers: Input should be greater than or equal to 0, or 'auto', got -1"),
        ("data.workers=some", "data.workers: Input should be a valid integer, unable to parse string as an integer, or "
         "'auto', got 'some'"),
        ("growth.smallest=1.5", "growth.smallest: Input should be less than or equal to 1, got 1.5"),
        ("growth.recycle=maybe", "growth.recycle: Input should be a valid boolean, unable to interpret input, "
         "got 'maybe'"),
        ("growth.operator=copy", f"growth.operator: Input should be {', '.join(NAMES[:-1])} or {NAMES[-1]}, "
         "got 'copy'"),
        ("growth.schedule=[{resolution: 112}]", "growth.schedule.0.depth: missing"),
        ("growth.schedule=[{resolution: 0, depth: 2}]",
         "growth.schedule.0.resolution: Input should be greater than or equal to 1, got 0"),
        ("search.measurements=0", "search.measurements: Input should be greater than or equal to 1, got 0"),
        ("search.times=guessed", "search.times: Input should be 'measured' or 'modelled', got 'guessed'"),
        ("ema.momenta=[]", "ema.momenta: Tuple should have at least 1 item after validation, not 0, got []"),
        ("ema.momenta=[0.9, 1]", "ema: momenta must lie in [0, 1), got [0.9, 1.0]"),
        ("ema.grow_from=1", "ema: grow_from must name one of the 1 momenta, got 1"),
        ("augment.scale=[1, 0.5]", "augment: scale must be two positive numbers, the lower first, not (1.0, 0.5)"),
        ("augment.randaugment=strong", "augment: randaugment: timm does not understand 'strong'; use e.g. "
         "rand-m9-mstd0.5-inc1"),
        ("sharding.engine=fspd", "sharding.engine: Input should be 'fsdp', 'hsdp', 'zero' or 'replicated', got 'fspd'"),
        ("evaluate.every=0", "evaluate.every: Input should be greater than 0, got 0"),
        ("checkpoint.keep=0", "checkpoint.keep: Input should be greater than or equal to 1, got 0"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_key(override: str, message: str, least: Path) -> None:
    assert problems(least, override) == [message]


def test_a_schedule_that_is_neither_a_name_nor_a_list_shows_the_names(least: Path) -> None:
    lines = problems(least, "growth.schedule=progressive")
    assert all(line.startswith("growth.schedule: ") and line.endswith("got 'progressive'") for line in lines)
    assert "'original', 'linear', 'automatic' or 'supernet'" in lines[0]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "wrong.yaml", {"model": {"name": "x", "classes": 0}, "train": {"epochs": 1}, "sed": 1})
    assert problems(path, "search.subset=0") == [
        "model.classes: Input should be greater than or equal to 1, got 0",
        "data: missing",
        "train.batch: missing",
        "search.subset: Input should be greater than or equal to 1, got 0",
        "sed: unknown key; did you mean seed?",
    ]


def test_a_recipe_cannot_be_changed(least: Path) -> None:
    recipe = Recipe.load(least)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 3  # type: ignore[misc]


# ---- two recipes


def test_free_keys_exist_and_do_not_count_as_differences(least: Path) -> None:
    assert set(FREE) <= set(KEYS)
    other = Recipe.load(
        least,
        ["train.max_steps=3", "train.log_every=1", "data.path=elsewhere", "data.workers=0", "data.prefetch=1",
         "data.cache=0", "data.trace=true", "sharding.engine=replicated", "checkpoint={every_steps: 5, keep: 9}",
         "evaluate.batch=1", "init.from=weights.safetensors"],
    )  # fmt: skip
    assert other != Recipe.load(least)
    assert other.differences(Recipe.load(least)) == []


def test_differences_name_the_keys_and_both_values(least: Path) -> None:
    here = Recipe.load(least, ["seed=3", "growth.schedule=[{resolution: 224, depth: 12}]", "evaluate.batch=3"])
    there = Recipe.load(least, ["ema.momenta=[0.5]"])
    assert here.differences(there) == [
        "ema.momenta: [0.998] here, [0.5] there",
        "growth.schedule: [{'resolution': 224, 'depth': 12}] here, automatic there",
        "seed: 3 here, 0 there",
    ]


@pytest.mark.parametrize(
    "override",
    ["seed=1", "model.depth=3", "data.lanes=32", "augment.flip=0", "train.epochs=5", "train.batch=32",
     "optimizer.clip=1", "growth.recycle=false", "search.times=modelled", "ema.grow_from=0", "sharding.precision=bf16",
     "evaluate.every=2"],
)  # fmt: skip
def test_what_changes_the_weights_or_their_record_is_a_difference(override: str, least: Path) -> None:
    found = Recipe.load(least, [override]).differences(Recipe.load(least))
    assert [line.partition(":")[0] for line in found] == [override.partition("=")[0]]


@given(
    lr=st.floats(min_value=1e-12, max_value=1e3),
    momenta=st.lists(st.floats(min_value=0, max_value=1, exclude_max=True), min_size=1, max_size=3),
    clip=st.none() | st.floats(min_value=1e-6, max_value=1e6),
    path=st.text(min_size=1).filter(lambda path: path.isprintable() and ":" not in path),
    stages=st.lists(st.tuples(st.integers(1, 999), st.integers(1, 99)), max_size=4),
)
def test_a_dumped_recipe_is_the_recipe(
    lr: float, momenta: list[float], clip: float | None, path: str, stages: list[tuple[int, int]]
) -> None:
    schedule = [{"resolution": resolution, "depth": depth} for resolution, depth in stages]
    values = {"optimizer": {"lr": lr, "clip": clip}, "ema": {"momenta": momenta}, "data": {"path": path}}
    recipe = Recipe.of(LEAST | values | {"growth": {"schedule": schedule}}, "drawn")
    again = Recipe.of(yaml.safe_load(recipe.dump()), "dumped")
    assert again == recipe
    assert recipe.differences(again) == []


# the reference of all keys

ROOT = Path(__file__).parents[2]


def test_the_reference_of_keys_is_the_one_in_the_docs() -> None:
    text = (ROOT / "docs/recipe.md").read_text()
    assert text == reference.markdown(), "run: scaleprog keys --markdown > docs/recipe.md"


def test_every_key_is_explained() -> None:
    keys = [key for _, rows in reference.groups().values() for key in rows]
    assert {key.name.partition(".")[0] for key in keys} == set(Recipe.model_fields)
    assert len(keys) == len({key.name for key in keys}) > 70
    for key in keys:
        assert key.takes, key
        assert key.meaning.endswith((".", ").")), key


def test_a_key_says_what_it_takes() -> None:
    _, rows = reference.group("search")
    by_name = {key.name: key for key in rows}
    assert by_name["search.budget"].takes == "number > 0, <= 1"
    assert by_name["search.budget"].default == "null"
    assert by_name["search.method"].takes == "budget, published"
    _, rows = reference.group("growth")
    assert rows[0].takes == "original, linear, automatic, supernet; or [{resolution, depth}, ...]"
    _, rows = reference.group("train")
    assert rows[0] == reference.Key("train.epochs", "number > 0, <= 100000", None, "Length of the schedule.")


def test_a_group_that_does_not_exist() -> None:
    with pytest.raises(RecipeError, match=r"'serach' is not a group of keys; did you mean search\?"):
        reference.group("serach")
    with pytest.raises(RecipeError, match="the groups are recipe, model, init, data, "):
        reference.group("\x1b")


def test_the_schema_accepts_the_recipes_that_are_here() -> None:
    whole = reference.schema()
    assert whole["additionalProperties"] is False
    assert set(whole["required"]) == {"model", "data", "train"}


def test_every_key_with_a_path_is_located() -> None:
    def is_path(annotation: Any) -> bool:
        return any(annotation in (kind, kind | None) for kind in (LocalPath, Location))

    groups = [(name, get_args(field.annotation) or (field.annotation,)) for name, field in Recipe.model_fields.items()]
    found = {
        (name, key)
        for name, kinds in groups
        for kind in kinds
        for key, annotation in getattr(kind, "__annotations__", {}).items()
        if is_path(annotation)
    }
    assert found - {("parent", "run")} == set(PATHS), "the parent's is where it was when the fork was made"
