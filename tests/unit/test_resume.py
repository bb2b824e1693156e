"""What of a checkpoint is believed: nothing that a run of its recipe could not have left there."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaleprog.data.manifest import Manifest
from scaleprog.errors import CheckpointError, DataError, OtherRun
from scaleprog.planning.plan import Plan
from scaleprog.recipe import Recipe
from scaleprog.rundir.checkpoint import RUN_ID
from scaleprog.rundir.state import RunState
from scaleprog.rundir.storage import MANIFEST, committed, read_manifest, verify
from scaleprog.rundir.tensorfile import Layout
from scaleprog.shards.check import write_manifest
from scaleprog.training.evaluate_run import Request, evaluate_run
from scaleprog.training.export import export_run
from scaleprog.training.resume import CHANGES, owner_of, state_of
from scaleprog.version import ARITHMETIC
from tests.conftest import WITHIN_A_BUDGET, MakeRecipe, run, short_recipe, step_rows
from tests.unit.checkpoints import reseal, seal

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recipe, Path]]:
    """Runs that nobody changes, by where they were stopped.

    Steps 0-10 supernet, 10-26 stage 1, 26-36 supernet, 36-53 stage 2, 53-80 the complete model; within a budget 0-26
    the smallest network, 26-36 a supernet.
    """
    folder = tmp_path_factory.mktemp("trained")
    runs = {}
    for name, groups, stop in (
        ("search", {"growth": {"optimizer": "inherit"}}, 29),
        ("choice", {}, 36),
        ("evaluated", {}, 44),
        ("budget", WITHIN_A_BUDGET, 38),
        ("end", {"train": {"epochs": 1}, "growth": {"schedule": "original"}}, None),
        ("mixed", {"train": {"epochs": 1}, "growth": {"schedule": "original"}, "augment": {"mixup": 0.8}}, 9),
    ):
        recipe = short_recipe(patterns, **groups)
        run(recipe, folder / name, max_steps=stop)
        runs[name] = recipe, folder / name
    return runs


@pytest.fixture
def copy(trained: dict[str, tuple[Recipe, Path]], tmp_path: Path) -> Callable[[str], tuple[Recipe, Path]]:
    """A copy of one of them that may be changed, and its newest checkpoint."""

    def copied(name: str) -> tuple[Recipe, Path]:
        recipe, folder = trained[name]
        shutil.copytree(folder, tmp_path / name)
        return recipe, committed(tmp_path / name / "checkpoints")[-1]

    return copied


def state(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["state"].update(changes)


def decision(number: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["state"]["decisions"][number].update(changes)


def twice(manifest: dict[str, Any]) -> None:
    manifest["state"]["decisions"] *= 2


def measured(*rows: list[Any]) -> Callable[[dict[str, Any]], None]:
    return state(measured=[list(rows)])


IMPOSSIBLE: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "another step": ("search", state(step=30), "it is at step 30, but its checkpoint is of step 29"),
    "before all phases": ("search", state(phase=-1), "its phase is -1"),
    "a phase too early": ("search", state(phase=1, growths=2), "step 29 is outside phase 1"),
    "a phase too late": ("search", state(phase=3, growths=4), "it is in phase 3, but there are 3 phases"),
    "a phase far beyond": ("search", state(phase=10**6), "phase 1000000, but there are 3 phases"),
    "no networks": ("search", state(growths=0), "built 0 networks"),
    "more networks than phases": ("search", state(growths=9), "built 9 networks by phase 2"),
    "no layers": ("search", state(gated=[[]]), r"its layer groups have \(0,\) layers"),
    "no groups": ("search", state(gated=[]), r"its layer groups have \(\) layers"),
    "two groups": ("search", state(gated=[[False] * 2, [False] * 2]), r"its layer groups have \(2, 2\) layers"),
    "more layers than there are": ("search", state(gated=[[False] * 16_000]), r"layer groups have \(16000,\) layers"),
    "fewer layers": ("search", state(gated=[[False] * 2]), "2 layers in phase 2, which has 4"),
    "gates that nobody saved": ("search", state(gated=[[True] * 4]), "gate is not in the checkpoint"),
    "a choice forgotten": ("search", state(decisions=[]), "phase 2, but there are 1 phases"),
    "a choice too many": ("search", twice, "made 2 choices by step 29"),
    "a choice of another stage": ("search", decision(0, stage=2), "searched .* for stage 2"),
    "a choice among others": ("search", decision(0, candidates=[[16, 2]] * 9), "searched 16 px, 2 layers, 16 px"),
    "a choice of none of them": ("search", decision(0, chosen=[64, 4]), "it chose 64 px, 4 layers, which is not"),
    "a choice with a takeover": ("search", decision(0, complete_from=12), "take over at step 12"),
    "none within a budget": ("budget", decision(0, complete_from=None), "take over at step None"),
    "one before the search": ("budget", decision(0, complete_from=0), "take over at step 0"),
    "one after the end": ("budget", decision(0, complete_from=10**9), "take over at step 1000000000"),
    "a measurement of strangers": ("search", measured([16, 2, 1.0]), "its measurements do not fit phase 2"),
    "a measurement too many": ("search", state(measured=[[]] * 9), "its measurements do not fit phase 2"),
    "a measurement outside a search": ("end", measured([32, 4, 1.0]), "its measurements do not fit phase 0"),
    "step times of strangers": ("search", state(step_seconds=[[64, 9, [1.0]]]), "step times of Subnets outside"),
    "step times of a network that does not train": (
        "end",
        state(step_seconds=[[16, 2, [1.0]]]),
        "it has step times of Subnets outside phase",
    ),
    "unknown things pending": ("search", state(pending=["rm -rf \x1b"]), r"'rm -rf \\x1b' cannot be pending in"),
    "an evaluation pending in a search": ("search", state(pending=["evaluation"]), "'evaluation' cannot be pending"),
    "a choice pending elsewhere": ("search", state(pending=["choice"]), "search of stage 2 cannot be in this state"),
    "a choice pending outside a search": ("end", state(pending=["choice"]), "'choice' cannot be pending in phase 0"),
    "things pending in another order": (
        "search",
        state(pending=["choice", "measurement"]),
        "'choice, measurement' cannot be pending",
    ),
    "a search left open": ("choice", lambda m: m["state"]["decisions"].pop(), "search of stage 2 cannot be in this"),
    "accuracies of others": ("end", state(accuracies={"\x1b": 3.0}), r"its accuracies are \['\\x1b'\]"),
    "only one accuracy": ("end", state(accuracies={"top1": 3.0}), "its accuracies are"),
    "an end without accuracies": ("end", state(accuracies={}), "reached its end without an evaluation"),
    "a best step to come": ("end", state(best_step=21), "its best step is 21, after step 20"),
    "a search that ends before it begins": ("search", state(last_search=[9, 3]), "its last search lasts from step 9 "),
    "a search to come": ("end", state(last_search=[21, 23]), "its last search lasts from step 21 until step 23"),
    "a damaged sample counted twice": ("end", state(damaged=["a", "a"]), r"its damaged samples are \['a', 'a'\]"),
    "no number": ("end", state(train_seconds="soon"), "state: 'train_seconds': Input should be a valid number"),
    "a key more": ("end", state(moment=1), "state: 'moment' is unknown"),
}


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_a_state_that_no_run_of_the_recipe_leaves_is_refused_at_a_start(
    fault: str, copy: Callable[[str], tuple[Recipe, Path]]
) -> None:
    name, change, message = IMPOSSIBLE[fault]
    recipe, newest = copy(name)
    state_of(newest, Plan.of(recipe))
    reseal(newest, change)
    with pytest.raises(CheckpointError, match=rf"{newest}: .*{message}"):
        run(recipe, newest.parent.parent)


def test_every_state_that_runs_leave_is_one(trained: dict[str, tuple[Recipe, Path]]) -> None:
    for recipe, folder in trained.values():
        for path in committed(folder / "checkpoints"):
            assert verify(path, owner_of(recipe).most).step == state_of(path, Plan.of(recipe)).step


def test_an_export_and_an_evaluation_refuse_what_cannot_be_without_the_training_shards(
    copy: Callable[[str], tuple[Recipe, Path]], tmp_path: Path
) -> None:
    _, newest = copy("end")
    for change, message in (
        (state(gated=[[False] * 16_000]), r"its layer groups have \(16000,\) layers"),
        (state(gated=[[False] * 2]), "is not in the network"),
        (state(accuracies={"top1": 3.0}), "its accuracies are"),
        (state(step="20"), "'step': Input should be a valid integer"),
    ):
        intact = (newest / MANIFEST).read_text()
        reseal(newest, change)
        with pytest.raises(CheckpointError, match=rf"{newest}: .*{message}"):
            export_run(newest.parent.parent, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{newest}: "):
            evaluate_run(newest.parent.parent, Request())
        (newest / MANIFEST).write_text(intact)
    assert not (tmp_path / "model.safetensors").exists()


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 90) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def plans(trained: dict[str, tuple[Recipe, Path]]) -> dict[str, Plan]:
    return {name: Plan.of(recipe) for name, (recipe, _) in trained.items()}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(["search", "choice", "evaluated", "budget", "end"]))
def test_whatever_stands_in_a_sealed_state_a_run_can_stand_there_or_says_why_not(
    data: st.DataObject,
    name: str,
    trained: dict[str, tuple[Recipe, Path]],
    plans: dict[str, Plan],
    tmp_path: Path,
) -> None:
    _, folder = trained[name]
    newest, plan = committed(folder / "checkpoints")[-1], plans[name]
    path = tmp_path / newest.name
    path.mkdir(exist_ok=True)
    manifest = json.loads((newest / MANIFEST).read_text())
    place, inner = manifest["state"], data.draw(st.sampled_from(sorted(manifest["state"])))
    while isinstance(place[inner], list | dict) and place[inner] and data.draw(st.booleans()):
        place = place[inner]
        inner = data.draw(st.sampled_from(range(len(place)) if isinstance(place, list) else sorted(place)))
    place[inner] = data.draw(anything)
    seal(path, manifest)
    try:
        found = state_of(path, plan)
    except CheckpointError:
        return
    assert sum(map(len, found.gated)) == plan.schedule.phases(found.choices)[found.phase].network.depth
    assert found.step == manifest["step"]


# ---- the arithmetic


def begun_with(newest: Path, arithmetic: int | None) -> None:
    """Makes the checkpoint one of a version with this arithmetic; None: of the first, which did not say."""
    reseal(newest, state(arithmetic=arithmetic) if arithmetic else lambda manifest: manifest["state"].pop("arithmetic"))


@pytest.mark.parametrize("arithmetic", [1, None])
def test_a_run_that_began_with_other_arithmetic_is_refused_unless_its_recipe_accepts_that(
    arithmetic: int | None, copy: Callable[[str], tuple[Recipe, Path]]
) -> None:
    recipe, newest = copy("mixed")
    folder, before = newest.parent.parent, (newest.parent.parent / "metrics.jsonl").read_bytes()
    begun_with(newest, arithmetic)
    refusal = (
        rf"{newest}: this run began with arithmetic 1, and this scaleprog has {ARITHMETIC}: Mixup and CutMix .*"
        rf"Resume it with commit {CHANGES[0].last}, or accept .* train\.accept_arithmetic={ARITHMETIC}$"
    )
    for accepted in (None, 1, ARITHMETIC + 1):
        with pytest.raises(CheckpointError, match=refusal):
            run(recipe, folder, accept_arithmetic=accepted)
    assert (folder / "metrics.jsonl").read_bytes() == before
    run(recipe, folder, accept_arithmetic=ARITHMETIC, max_steps=10)
    newest = committed(newest.parent)[-1]
    assert RunState.from_json(read_manifest(newest).state).arithmetic == ARITHMETIC, "accepted once and for all"
    run(recipe, folder, max_steps=11)
    assert max(step_rows(folder)) == 11


def test_a_recipe_that_computes_what_it_did_resumes_under_other_arithmetic(
    copy: Callable[[str], tuple[Recipe, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, newest = copy("search")  # nothing is mixed
    mixing = tuple(change for change in CHANGES if "Mixup" in change.what)
    assert len(mixing) == 1
    monkeypatch.setattr("scaleprog.training.resume.CHANGES", mixing)
    begun_with(newest, 1)
    run(recipe, newest.parent.parent, max_steps=30)
    assert max(step_rows(newest.parent.parent)) == 30


@pytest.mark.parametrize("name", ["mixed", "search"])
def test_a_run_of_a_newer_scaleprog_is_refused(name: str, copy: Callable[[str], tuple[Recipe, Path]]) -> None:
    recipe, newest = copy(name)
    begun_with(newest, ARITHMETIC + 1)
    for accepted in (None, ARITHMETIC):
        with pytest.raises(
            CheckpointError, match=rf"{newest}: a newer scaleprog wrote it, with arithmetic {ARITHMETIC + 1}"
        ):
            run(recipe, newest.parent.parent, accept_arithmetic=accepted)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no history here")
def test_every_change_of_the_arithmetic_is_listed_with_a_commit_of_ours() -> None:
    assert sorted({change.version for change in CHANGES}) == list(range(2, ARITHMETIC + 1))
    for change in CHANGES:
        known = subprocess.run(["git", "cat-file", "-t", change.last], cwd=ROOT, capture_output=True)
        assert known.stdout == b"commit\n", change


# ---- the data


def at(recipe: Recipe, shards: Path) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(shards)})})


def permuted(shards: Path) -> None:
    manifest = Manifest.load(shards)
    replace(manifest, classes=manifest.classes[::-1]).save()


def with_more(shards: Path) -> None:
    shutil.copy(shards / "train-000004.tar", shards / "train-000005.tar")
    write_manifest(shards, workers=1)


def with_other_held_out(shards: Path) -> None:
    (shards / "val-000001.tar").unlink()
    write_manifest(shards, workers=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (permuted, r"classes: 4 classes, \w+ then, 4 classes, \w+ now\."),
        (with_more, r"train: 160 samples, \w+ then, 176 samples, \w+ now\."),
        (with_other_held_out, r"val: 24 samples, \w+ then, 13 samples, \w+ now\."),
    ],
)
def test_a_run_resumes_on_the_data_that_it_began_with_only(
    change: Callable[[Path], None],
    told: str,
    copy: Callable[[str], tuple[Recipe, Path]],
    patterns: Path,
    tmp_path: Path,
) -> None:
    recipe, newest = copy("end")
    folder, moved = newest.parent.parent, tmp_path / "moved"
    before = (folder / "metrics.jsonl").read_bytes()
    shutil.copytree(patterns, moved)
    (folder / "results.json").unlink()
    change(moved)
    with pytest.raises(
        CheckpointError, match=rf"{newest}: the run began with other data than there are in {moved}: {told}"
    ):
        run(at(recipe, moved), folder)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_resumes_where_its_data_have_moved(
    copy: Callable[[str], tuple[Recipe, Path]], patterns: Path, tmp_path: Path
) -> None:
    recipe, newest = copy("search")
    shutil.copytree(patterns, tmp_path / "moved")
    run(at(recipe, tmp_path / "moved"), newest.parent.parent, max_steps=30)
    assert max(step_rows(newest.parent.parent)) == 30


def test_a_run_is_not_evaluated_on_other_classes(
    copy: Callable[[str], tuple[Recipe, Path]], patterns: Path, tmp_path: Path
) -> None:
    recipe, newest = copy("end")
    folder, moved = newest.parent.parent, tmp_path / "moved"
    shutil.copytree(patterns, moved)
    with_other_held_out(moved)
    (folder / "recipe.yaml").write_text(at(recipe, moved).dump())
    assert 0 <= evaluate_run(folder, Request(weights="online")).top1 <= 100, "other images of the same classes are fine"
    permuted(moved)
    with pytest.raises(DataError, match=rf"{moved}: the classes are not those that {folder} learned \(4 classes, "):
        evaluate_run(folder, Request(weights="online"))


# ---- weights


def poke(newest: Path, name: str, value: float) -> None:
    """Sets the first element of a tensor in the files, and seals the manifest again."""
    manifest = json.loads((newest / MANIFEST).read_text())
    [(rank, _)] = manifest["tensors"][name][2]
    held = {n: (t[0], t[1]) for n, t in manifest["tensors"].items()}
    file = newest / f"rank-{rank:05d}.safetensors"
    content, start = bytearray(file.read_bytes()), Layout.of(held).starts[name]
    content[start : start + 4] = torch.tensor([value]).numpy().tobytes()
    file.write_bytes(content)
    reseal(newest)


@pytest.mark.parametrize("count", [-1.0, 0.5, 1e30, float("nan"), float("inf"), 30.0])
def test_a_parameter_has_no_more_steps_behind_it_than_the_run(
    count: float, copy: Callable[[str], tuple[Recipe, Path]]
) -> None:
    recipe, newest = copy("search")
    poke(newest, "step/net.cls_token", count)
    with pytest.raises(CheckpointError, match=rf"{newest}: step/net.cls_token is .*, which is not a possible number"):
        run(recipe, newest.parent.parent)


# ---- whose it is


def test_a_checkpoint_of_another_recipe_is_refused_with_what_differs(
    make_recipe: MakeRecipe, copy: Callable[[str], tuple[Recipe, Path]], tmp_path: Path
) -> None:
    _, newest = copy("search")
    other = make_recipe(growth={"optimizer": "inherit"}, seed=3, optimizer={"lr": 1e-3})
    run(other, tmp_path / "other", max_steps=29)
    place = tmp_path / "other" / "checkpoints" / newest.name
    shutil.rmtree(place)
    shutil.copytree(newest, place)
    for act in (lambda: run(other, tmp_path / "other"), lambda: evaluate_run(tmp_path / "other", Request())):
        with pytest.raises(OtherRun, match=rf"{place}: a checkpoint of another recipe:\n") as told:
            act()
        assert "  optimizer.lr: 0.001 here, 0.0005 there\n  seed: 3 here, 0 there\nmove it to its" in str(told.value)
    assert place.exists(), "it is nobody's damage"


def test_a_checkpoint_of_another_run_of_the_recipe_is_refused(
    copy: Callable[[str], tuple[Recipe, Path]], tmp_path: Path
) -> None:
    recipe, newest = copy("search")
    run(recipe, tmp_path / "other", max_steps=26)
    shutil.copytree(newest, tmp_path / "other" / "checkpoints" / newest.name)
    with pytest.raises(OtherRun, match=rf"{newest.name}: a checkpoint of another run of the same recipe; move it"):
        run(recipe, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / newest.name)
    run(recipe, tmp_path / "other", max_steps=30)
    assert max(step_rows(tmp_path / "other")) == 30


def test_a_run_directory_may_be_moved_and_copied_and_may_lose_its_name(
    copy: Callable[[str], tuple[Recipe, Path]], tmp_path: Path
) -> None:
    recipe, newest = copy("search")
    folder = newest.parent.parent
    name = (folder / RUN_ID).read_text()
    shutil.copytree(folder, tmp_path / "elsewhere")
    run(recipe, tmp_path / "elsewhere", max_steps=31)
    assert json.loads((committed(tmp_path / "elsewhere/checkpoints")[-1] / MANIFEST).read_text())["run"] == name
    (folder / RUN_ID).unlink()
    run(recipe, folder, max_steps=31)
    assert (folder / RUN_ID).read_text() == name
    for strange in (b"", b"\xff", b"x" * 10**6, name.upper().encode() + b"\n"):
        (folder / RUN_ID).write_bytes(strange)
        with pytest.raises(CheckpointError, match=r"run\.id: does not name a run; delete it if the checkpoints"):
            run(recipe, folder)
    assert len(committed(folder / "checkpoints")) == 2, "none was taken for damaged"


@pytest.mark.parametrize("kept", [{}, {"seed": "no"}, {"x\x1b": 1}, {"model": {"name": "a" * 2**21}}])
def test_a_recipe_in_a_checkpoint_may_be_anything(
    kept: dict[str, Any], copy: Callable[[str], tuple[Recipe, Path]]
) -> None:
    recipe, newest = copy("end")
    reseal(newest, lambda manifest: manifest.update(recipe=kept))
    with pytest.raises(OtherRun, match="a checkpoint of another recipe:\n") as told:
        run(recipe, newest.parent.parent)
    assert "\x1b" not in str(told.value)
    assert len(str(told.value)) < 2500


def test_keys_that_do_not_change_the_weights_may_differ(copy: Callable[[str], tuple[Recipe, Path]]) -> None:
    recipe, newest = copy("search")
    changed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 1})})
    run(changed, newest.parent.parent, max_steps=31, log_every=7)
    assert RunState.from_json(read_manifest(committed(newest.parent)[-1]).state).step == 31
