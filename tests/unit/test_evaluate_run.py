"""`scaleprog evaluate`: from any directory, on any split, by any number of ranks; and where a run finds its shards."""

import json
import shutil
from pathlib import Path

import pytest

from scaleprog.recipe import Recipe, directories
from scaleprog.recipe.directories import DIRECTORIES
from tests.conftest import CLASSES, MakeRecipe, run, short_recipe
from tests.forked import fork_ranks
from tests.unit.command import Command, is_mistake

RECIPE = {"growth": {"schedule": "original"}, "train": {"epochs": 1}, "sharding": {"engine": "replicated"}}


@pytest.fixture(scope="module")
def home(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with shards and a run that was started in it, with a relative path."""
    folder = tmp_path_factory.mktemp("home of a run")
    shutil.copytree(patterns, folder / "shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(short_recipe(Path("shards"), **RECIPE), Path("runs/first"))
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.process
def test_a_run_is_evaluated_from_another_directory(command: Command, home: Path, elsewhere: Path) -> None:
    folder = home / "runs/first"
    results = json.loads((folder / "results.json").read_text())
    told = command("evaluate", folder, "--json", "--weights", "online")
    assert told.code == 0, told
    assert json.loads(told.out) == {
        "run": str(folder), "top1": results["top1"], "top5": results["top5"], "loss": results["val_loss"],
        "weights": "online", "step": 20, "resolution": 32, "split": "val", "images": 24, "data": str(home / "shards"),
    }  # fmt: skip
    assert Recipe.of_run(folder).data.path == "shards", "the run directory keeps what was typed"


@pytest.mark.process
def test_ranks_share_the_images_and_every_class_is_counted(
    command: Command, home: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_ranks(monkeypatch)
    asked = ("evaluate", home / "runs/first", "--split", "train", "--per-class", "--json")
    one, two = (command(*asked, "--nproc", ranks).out for ranks in (1, 2))
    two = two[two.index("{") :]  # DeepSpeed, which only tests import here, greets on the same stream
    one, two = json.loads(one), json.loads(two)
    assert two == {**one, "loss": pytest.approx(one["loss"], abs=2e-6)}
    assert [(each["name"], each["images"]) for each in one["classes"]] == [(str(i), 40) for i in range(CLASSES)]
    assert sum(each["top1"] * each["images"] for each in one["classes"]) == pytest.approx(one["top1"] * one["images"])
    assert (one["images"], one["split"]) == (160, "train")


@pytest.mark.process
def test_only_an_ordinary_evaluation_is_noted_for_the_report(command: Command, home: Path, elsewhere: Path) -> None:
    shutil.copytree(home / "runs/first", elsewhere / "run", ignore=shutil.ignore_patterns("evaluations.jsonl"))
    shutil.copytree(home / "shards", elsewhere / "other")
    for more in (
        ["--data", "other"], ["--split", "train"], ["augment.eval_crop=0.5", "data.workers=0", "evaluate.batch=5"]
    ):  # fmt: skip
        told = command("evaluate", "run", *more)
        assert told.code == 0, told
    assert not (elsewhere / "run/evaluations.jsonl").exists()
    told = command("evaluate", "run", "--resolution", 16, "--per-class", "evaluate.batch=5")
    assert told.out.splitlines()[0].split() == ["class", "images", "top-1"]
    assert f"24 images of val in {home}/shards, 16 px, step 20: loss " in told.out
    (noted,) = (elsewhere / "run/evaluations.jsonl").read_text().splitlines()
    assert json.loads(noted)["resolution"] == 16


@pytest.mark.process
def test_what_cannot_be_evaluated_is_said(command: Command, home: Path, elsewhere: Path) -> None:
    folder = home / "runs/first"
    for more, parts in (
        (["--split", "tset"], ["no split 'tset' (it has: train, val)"]),
        (["--data", "nowhere"], [f"there are no shards in {elsewhere}/nowhere", "--data SHARDS"]),
        (["optimizer.lr=1"], ["override optimizer.lr=1: an evaluation trains nothing", "augment.eval_crop"]),
        (["evaluate.resolution=full"], ["use --resolution"]),
        (["data.wrokers=1"], ["data.wrokers: unknown key; did you mean data.workers?"]),
    ):
        assert is_mistake(command("evaluate", folder, *more), *parts)


@pytest.mark.process
def test_a_run_resumes_in_another_directory(command: Command, home: Path, elsewhere: Path) -> None:
    """The recipe is typed there with the same relative path, which leads nowhere."""
    shutil.copytree(home / "runs/first", elsewhere / "run")
    shutil.rmtree(elsewhere / "run/checkpoints")
    (elsewhere / "run/results.json").unlink()
    told = command("train", elsewhere / "run/recipe.yaml", "train.max_steps=2", "--run-dir", "run")
    assert told.code == 0, told
    noted = json.loads((elsewhere / "run" / DIRECTORIES).read_text())
    assert noted == {"run": str((elsewhere / "run").resolve()), "directories": [str(elsewhere), str(home)]}
    assert is_mistake(
        command("train", elsewhere / "run/recipe.yaml", "--run-dir", "new"), f"{elsewhere}/shards: the folder of shards"
    )


def test_a_relative_path_leads_to_what_exists(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (second / "labels").mkdir(parents=True)
    recipe = make_recipe(
        data={"path": "hf://a/b", "token_labels": "labels", "manifest": str(first), "store": "none"},
        init={"from": "timm"},
    )
    located = recipe.located([first, second])
    assert (located.data.path, located.data.manifest, located.init.source) == ("hf://a/b", str(first), "timm")
    assert (located.data.token_labels, located.data.store) == (str(second / "labels"), str(first / "none"))
    assert located.located([second]) == located
    assert recipe.located([]) == recipe


def test_directories_are_noted_the_last_one_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = [tmp_path / name for name in ("one", "two", "one")]
    for folder in here:
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        directories.note(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert directories.to_read(tmp_path) == [tmp_path / "one", tmp_path / "two", tmp_path]
    assert directories.to_train(tmp_path) == [tmp_path, tmp_path / "one", tmp_path / "two"]
    for damaged in ('{"directories": ["relative", 3, null]}', '["/x"]', "{}", "[", "[" * 10**5):
        (tmp_path / DIRECTORIES).write_text(damaged)
        assert directories.to_read(tmp_path) == [tmp_path]


def test_a_copied_run_leads_from_the_current_directory_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, copy = tmp_path / "home", tmp_path / "copy"
    for folder in (home, copy):
        folder.mkdir()
    monkeypatch.chdir(home)
    (home / "run").mkdir()
    directories.note(home / "run")
    shutil.copytree(home / "run", copy / "run")
    monkeypatch.chdir(copy)
    assert directories.to_read(home / "run") == [home, copy]
    assert directories.to_read(copy / "run") == [copy, home]
