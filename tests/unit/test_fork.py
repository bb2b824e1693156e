"""Forks and runs made longer: what is refused, and that a run directory is complete or not there."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.launchers.status import status
from scaleprog.recipe import Recipe
from scaleprog.rundir import forked
from scaleprog.rundir.checkpoint import run_of
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.storage import MANIFEST, committed, read_manifest, step_of
from scaleprog.training.fork import fork
from scaleprog.training.longer import begin
from tests.compare import texts
from tests.conftest import WITHIN_A_BUDGET, MakeRecipe, draw_patterns, run, short_recipe, step_rows
from tests.unit.command import Command, is_mistake
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

SAVED = {"every_steps": 5, "keep": 3}


@pytest.fixture(scope="module")
def parents(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Path]]:
    """Runs that nobody changes. `searching`, `rewinding`, and `saving` have stopped in a search, and keep the step
    before it."""
    folder = tmp_path_factory.mktemp("parents dir")
    found = {}
    for name, stop, groups in (
        ("done", None, {"growth": {"schedule": "original"}, "train": {"epochs": 1}, "checkpoint": SAVED}),
        ("searching", 30, {}),
        ("rewinding", 40, {"growth": {"recycle": False}}),
        ("saving", 30, WITHIN_A_BUDGET),
    ):
        recipe = short_recipe(patterns, **groups)
        run(recipe, folder / name, max_steps=stop)
        found[name] = recipe, folder / name
    return found


@pytest.fixture
def done(parents: dict[str, tuple[Recipe, Path]], tmp_path: Path) -> tuple[Recipe, Path]:
    """A copy of a finished run that may be changed, with checkpoints of steps 10, 15 and 20, and a longer recipe."""
    recipe, folder = parents["done"]
    shutil.copytree(folder, tmp_path / "done")
    return longer(recipe, 2), tmp_path / "done"


def longer(recipe: Recipe, epochs: float, **groups: dict[str, Any]) -> Recipe:
    """`recipe` with more epochs, and other changes by group."""
    values = recipe.model_dump(mode="json")
    for group, settings in {"train": {"epochs": epochs}, **groups}.items():
        values[group] = {**values[group], **settings}
    return Recipe.of(values, "changed")


def test_a_fork_stands_where_its_parent_stood(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, parent = done
    made = fork(recipe, f"{parent}@15", tmp_path / "new")
    assert made.parent is not None
    assert (made.parent.run, made.parent.step, made.parent.id) == (str(parent), 15, run_of(parent))
    assert Recipe.of_run(tmp_path / "new") == made
    assert run_of(tmp_path / "new") not in (None, run_of(parent))
    assert max(step_rows(tmp_path / "new")) == 15
    (kept,) = committed(tmp_path / "new/checkpoints")
    (data,) = kept.glob("*.safetensors")
    assert os.path.samefile(data, parent / "checkpoints" / kept.name / data.name)
    found = status(tmp_path / "new")
    assert (found.state, found.step, found.commit_step, found.parent) == ("stopped", 15, 15, f"{parent}, step 15")
    growth, begun = read_rows(tmp_path / "new/events.jsonl")
    assert (growth["event"], begun["event"]) == ("growth", "forked")
    assert begun["wall_seconds"] == read_manifest(kept).state["wall_seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "new"]


def test_the_same_command_resumes_though_the_parent_is_gone(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, parent = done
    made = fork(recipe, str(parent), tmp_path / "new")
    assert made.parent is not None
    assert made.parent.step == 20
    shutil.rmtree(parent)
    assert begin(recipe, tmp_path / "new", str(parent)) == made
    assert begin(recipe, tmp_path / "new") == made
    with pytest.raises(CheckpointError, match=r"continues .*done@20 .*, not .*done@15; use another --run-dir"):
        begin(recipe, tmp_path / "new", f"{parent}@15")
    with pytest.raises(CheckpointError, match=r"not .*other; use another"):
        begin(recipe, tmp_path / "new", str(tmp_path / "other"))


def test_a_fork_of_a_fork_in_another_place_by_its_recipe(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, parent = done
    made = fork(recipe, f"{parent}@15", tmp_path / "new")
    assert begin(made, tmp_path / "again") == made
    parent.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"done: not there, .*--from RUN@15"):
        begin(made, tmp_path / "third")
    grandchild = fork(recipe, str(tmp_path / "new"), tmp_path / "fourth")
    assert grandchild.parent is not None
    assert (grandchild.parent.run, grandchild.parent.step) == (str(tmp_path / "new"), 15)


def test_a_fork_without_its_checkpoint_does_not_start_over(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, parent = done
    made = fork(recipe, f"{parent}@15", tmp_path / "new")
    shutil.rmtree(tmp_path / "new/checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 15, from which this fork continues"):
        run(made, tmp_path / "new")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a step that is not kept": ("done@12", {}, r"step 12 is not kept; kept are 10, 15, 20 \(best\)"),
    "no run": ("nowhere", {}, "nowhere: not a run directory"),
    "another network": ("done", {"model": {"depth": 3}}, "model.depth: 3 here, 4 there\n.*init.from="),
    "other classes": ("done", {"model": {"classes": 5}}, "model.classes: 5 here, 4 there"),
    "another number of EMAs": ("done", {"ema": {"momenta": [0.9, 0.99]}}, r"ema.momenta: \[0.9, 0.99\] here, \[0.9\]"),
    "nothing left": ("done", {"train": {"epochs": 1}}, "nothing is left to train: .* raise train.epochs"),
    "a step beyond the end": ("done", {"train": {"epochs": 0.5}}, "nothing is left to train"),
    "a search under another schedule": ("searching", {"train": {"epochs": 8}}, "a supernet of several; .*26, 30"),
    "a search with other settings": ("searching", {"search": {"subset": 8}}, "a supernet of several"),
    "a search of which steps would be taken back": (
        "saving",
        {"growth": {"recycle": False}, "search": {"budget": 0.9}},
        "a supernet of several",
    ),
    "a search among other layers": ("searching", {"growth": {"operator": "stacking"}}, "a supernet of several"),
    "a search whose steps are taken back": ("rewinding", {}, "checkpoint of step 36, which a fork .* take that step"),
    "lanes that do not fit": ("done", {"data": {"lanes": 3}}, "data.lanes: 8 images in 3 lanes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_state_cannot_carry_is_refused(
    case: str, parents: dict[str, tuple[Recipe, Path]], tmp_path: Path
) -> None:
    source, changes, message = REFUSED[case]
    recipe, folder = parents.get(source.partition("@")[0], parents["done"])
    changed = longer(recipe, **{"epochs": 4, **changes.pop("train", {})}, **changes)
    with pytest.raises(ScaleprogError, match=re.compile(message, re.DOTALL)):
        fork(changed, str(folder.parent / source), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_other_data_are_refused(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, parent = done
    others = draw_patterns(tmp_path / "others", seed=1)
    with pytest.raises(ScaleprogError, match=r"began with other data .*`scaleprog finetune`"):
        fork(longer(recipe, 2, data={"path": str(others)}), str(parent), tmp_path / "new")


@pytest.mark.parametrize("there", ["a file", "a folder with a file", "a run"])
def test_a_place_that_is_taken_stays_as_it_is(there: str, done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, parent = done
    new = parent if there == "a run" else tmp_path / "new"
    if there == "a file":
        new.write_text("mine")
    elif there != "a run":
        new.mkdir()
        (new / "notes").write_text("mine")
    before = sorted(new.rglob("*"))
    with pytest.raises(CheckpointError, match="use another --run-dir"):
        fork(recipe, f"{parent}@15", new)
    assert sorted(new.rglob("*")) == before


def test_a_damaged_checkpoint_is_told(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, parent = done
    (data,) = (parent / "checkpoints/step-00000020").glob("*.safetensors")
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"done/checkpoints/step-00000020/rank-00000.*\n.*kept.*: 10, 15, 20"):
        fork(recipe, str(parent), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert fork(recipe, f"{parent}@15", tmp_path / "new").parent is not None


def test_a_checkpoint_that_the_parent_deletes_meanwhile(
    done: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, parent = done
    link: Callable[..., None] = os.link

    def deleting(source: Path, target: Path, **options: Any) -> None:
        if step_of(source.parent) == 20:
            shutil.rmtree(source.parent)
        link(source, target, **options)

    shutil.copytree(parent, tmp_path / "twin")
    monkeypatch.setattr(forked.os, "link", deleting)
    with pytest.raises(CheckpointError, match="step 20 is not kept; kept are 10, 15"):
        fork(recipe, f"{tmp_path / 'twin'}@20", tmp_path / "new")
    made = fork(recipe, str(parent), tmp_path / "new")
    assert made.parent is not None
    assert made.parent.step == 15


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_fork_leaves_nothing(
    error: BaseException, done: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(forked, "_copy_metrics", fail)
    with pytest.raises((KeyboardInterrupt, ScaleprogError)):
        fork(done[0], str(done[1]), tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


# ---- in place


def test_a_decayed_run_is_not_made_longer(done: tuple[Recipe, Path]) -> None:
    recipe, folder = done
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match=r"at step 20 the learning rate was .* would have been .* --from .*done@10 "
    ):
        begin(recipe, folder)  # the warm-up ends at step 10
    shutil.rmtree(folder / "checkpoints/step-00000010")
    with pytest.raises(CheckpointError, match=r"--from .*done trains on in a new run"):
        begin(recipe, folder)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == {
        path for path in before if path.parent.name == "step-00000010"
    }


def test_tensorboard_shows_the_recipe_of_a_run_made_longer(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(growth={"schedule": "original"}, optimizer={"lr": 1e-3, "min_lr": 1e-3, "warmup_epochs": 0})
    run(recipe, tmp_path, max_steps=2)
    more = longer(recipe, 9)
    assert begin(more, tmp_path) == more
    assert "epochs: 9" in texts(tmp_path)["run/recipe/text_summary"]


def test_a_run_whose_stages_would_move_is_not_made_longer(
    parents: dict[str, tuple[Recipe, Path]], tmp_path: Path
) -> None:
    recipe, folder = parents["searching"]
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(CheckpointError, match="its stages depend on the length"):
        begin(longer(recipe, 8), tmp_path / "run")


def test_only_the_length_changes_in_place(done: tuple[Recipe, Path]) -> None:
    recipe, folder = done
    for other in (longer(recipe, 0.5), longer(recipe, 2, optimizer={"lr": 1.0})):
        assert begin(other, folder) == other  # the start refuses it
        with pytest.raises(CheckpointError, match="is the run directory of another recipe"):
            run(other, folder)


# ---- commands


def test_submit_from(
    done: tuple[Recipe, Path], command: Command, fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(done[0].dump())
    told = command("submit", "r.yaml", "--from", "done@15", "--dry-run")
    assert (told.code, "runs/r-from-done@15-seed0" in told.out) == (0, True)
    assert not Path("runs").exists()
    assert command("submit", "r.yaml", "--from", "done@15").code == 0
    assert len(fake.calls("sbatch")) == 1
    parent = Recipe.of_run(Path("runs/r-from-done@15-seed0")).parent
    assert parent is not None
    assert parent.step == 15
    assert is_mistake(command("train", "r.yaml", "--from", "done@99"), "step 99 is not kept")


def test_a_manifest_is_not_shared(done: tuple[Recipe, Path], tmp_path: Path) -> None:
    """The fork writes its own: the parent's must stay the parent's."""
    recipe, parent = done
    before = (parent / "checkpoints/step-00000015" / MANIFEST).read_bytes()
    fork(recipe, f"{parent}@15", tmp_path / "new")
    assert (parent / "checkpoints/step-00000015" / MANIFEST).read_bytes() == before
    mine = json.loads((tmp_path / "new/checkpoints/step-00000015" / MANIFEST).read_text())
    assert mine["recipe"]["train"]["epochs"] == 2
