"""`--sweep`: which runs it means, and how they train on this machine."""

import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprog.cli.sweep import repeated
from scaleprog.errors import DataError, Preempted, RecipeError, ScaleprogError
from scaleprog.launchers import sweep as local_sweep
from scaleprog.launchers.sweep import Ended, Task, slots, train_all
from scaleprog.launchers.world import Count
from scaleprog.recipe import Recipe
from scaleprog.recipe.sweep import Swept, members, run_name, split
from tests.conftest import MakeRecipe, step_rows
from tests.forked import fork_ranks
from tests.unit.command import Command, WriteRecipe, is_mistake

KEYS = ("optimizer.lr", "optimizer.min_lr", "model.depth", "seed")
VALUE = st.text(st.characters(codec="utf-8", exclude_characters=",[]{}'\"", exclude_categories=["Cc"]), min_size=1)
QUOTED = st.sampled_from(["[1, 2]", "{a: 1, b: [2, 3]}", "'a,b'", '"x, y"'])


# ---- what is swept


@given(st.lists((VALUE | QUOTED).map(str.strip).filter(lambda value: value and ":" not in value), min_size=1))
def test_values_are_what_is_between_commas(values: list[str]) -> None:
    assert split(",".join(values)) == values
    assert Swept.parse(f"seed={','.join(values)}").values == values


@given(st.integers(-500, 500), st.integers(1, 400))
def test_a_range_is_as_in_python(first: int, number: int) -> None:
    assert Swept.parse(f"seed=7,{first}:{first + number},x").values == [
        "7",
        *map(str, range(first, first + number)),
        "x",
    ]


@settings(max_examples=30)
@given(st.lists(st.tuples(*(VALUE for _ in KEYS)), min_size=2, max_size=9, unique=True))
def test_names_differ_and_fit_a_file_system(rows: list[tuple[str, ...]]) -> None:
    names = [run_name(KEYS, row) for row in rows]
    assert len(set(names)) == len(rows)
    for name in names:
        assert re.fullmatch(r"lr=[A-Za-z0-9.+=_-]+", name)
        assert len(name) < 256


@given(st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_the_product_with_the_last_key_fastest(counts: list[int]) -> None:
    swept = [f"{key}={','.join(map(str, range(1, count + 1)))}" for key, count in zip(KEYS[1:], counts)]
    taken: list[tuple[str, ...]] = []

    def load(overrides: list[str]) -> Recipe:
        taken.append(tuple(overrides))
        return Recipe.model_construct(seed=len(taken))

    found = members(swept, ["optimizer.lr=3"], load)
    assert len(found) == len({member.name for member in found}) == math.prod(counts)
    assert taken == sorted(taken)
    assert all(overrides[0] == "optimizer.lr=3" for overrides in taken)


def test_names_say_the_overrides() -> None:
    assert run_name(["seed", "optimizer.lr"], ["0", "1e-3"]) == "lr=1e-3_seed0"
    assert run_name(["seed"], ["12"]) == "seed12"
    assert run_name(["optimizer.lr", "search.lr"], ["1", "2"]) == "optimizer.lr=1_search.lr=2"
    assert run_name(["data.path"], ["/a/b c"]).startswith("path=a-b-c-")


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        (["optimizer.lr"], "--sweep optimizer.lr: write KEY=V1,V2"),
        (["=1,2"], "write KEY=V1,V2"),
        (["seed="], "a value is empty"),
        (["seed=1,,2"], "a value is empty"),
        (["seed=3:3"], "the range 3:3 is empty"),
        (["seed=0:2", "seed=3"], "seed is swept twice"),
        (["train.batch=8,4"], "train.batch=8 sets a key that is swept"),
        (["seed=0:99999999999"], "more than 1000 runs"),
        (["seed=0:101", "model.depth=1:11"], "more than 1000 runs"),
        (["seed=1,1"], "seed1 and seed1 are the same run"),
        (["optimizer.lr=1e-3,0.001"], "lr=1e-3 and lr=0.001 are the same run"),
        (["optimizer.lrr=1,2"], "optimizer.lrr: unknown key; did you mean optimizer.lr"),
        (["optimizer.lr=1,x,y"], "got 'x'(.|\n)*got 'y'"),
    ],
)
def test_what_is_refused(swept: list[str], message: str, make_recipe: MakeRecipe) -> None:
    values = make_recipe().model_dump(mode="json")
    with pytest.raises(RecipeError, match=message):
        members(swept, ["train.batch=8"], lambda overrides: Recipe.overridden(values, overrides, "recipe"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("r --sweep a=1,2 b.c=0:3 --nproc 2 d=4", "r --sweep a=1,2 --sweep b.c=0:3 --nproc 2 d=4"),
        ("--sweep=a=1,2 b=3 r", "--sweep=a=1,2 --sweep b=3 r"),
        ("--sweep a=1,2 --run-dir=b --jobs 2", "--sweep a=1,2 --run-dir=b --jobs 2"),
        ("--sweep a=1 --sweep b=2 c=3", "--sweep a=1 --sweep b=2 --sweep c=3"),
        ("r a=1 b=2", "r a=1 b=2"),
        ("--sweep a=1 ./b=c.yaml d=2", "--sweep a=1 ./b=c.yaml d=2"),
        ("--sweep a=1 -- b=2", "--sweep a=1 -- b=2"),
        ("r --sweep", "r --sweep"),
    ],
)
def test_words_after_the_option(typed: str, meant: str) -> None:
    assert repeated(typed.split()) == meant.split()


# ---- on this machine


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)


def act(folder: Path, name: str, what: str) -> None:
    """What a run does here: a file says that it was there, and with which devices."""
    (folder / name).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if what == "mistake":
        raise DataError("shard 3 is damaged")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stopped":
        raise Preempted("stopped after step 7", "time limit")
    if what == "bug":
        raise ValueError("a\nb")


def tasks(folder: Path, *whats: str) -> list[Task]:
    return [Task(folder / f"run{i}", partial(act, folder, f"file{i}", what)) for i, what in enumerate(whats)]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("file*"))


@pytest.mark.process
def test_a_run_that_fails_holds_up_no_other(forked: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended = train_all(
        tasks(tmp_path, "mistake", "killed", "", "bug"), [{"CUDA_VISIBLE_DEVICES": name} for name in "45"]
    )
    assert {run.name: end for run, end in ended.items()} == {
        "run0": Ended(2, "shard 3 is damaged"),
        "run1": Ended(1, "was killed by SIGKILL"),
        "run2": Ended(0),
        "run3": Ended(1, "ValueError: a"),
    }
    assert "ValueError: a\nb" in (tmp_path / "run3" / "log.txt").read_text()
    assert {(tmp_path / name).read_text() for name in files(tmp_path)} == {"4", "5"}
    assert "run0: shard 3 is damaged" in capfd.readouterr().err


@pytest.mark.process
def test_after_a_stop_no_run_starts(forked: None, tmp_path: Path) -> None:
    ended = train_all(tasks(tmp_path, "", "stopped", ""), [{}])
    assert [end.code for end in ended.values()] == [0, 75]
    assert files(tmp_path) == ["file0", "file1"]


def test_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_sweep.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert slots(2, Count(2, 2)) == [{"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    assert slots(1, Count(1, 4)) == [{}]
    with pytest.raises(ScaleprogError, match=r"each of 6 ranks needs a CUDA device .* available: 4; lower --jobs"):
        slots(3, Count(2, 2))
    with pytest.raises(ScaleprogError, match="give --nproc one number"):
        slots(2, Count(1, 2))


def soon(condition: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    """Waits in a thread for a condition, then acts."""

    def wait() -> None:
        end = time.monotonic() + 120
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)
        if condition():
            then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.process
def test_a_sweep_is_stopped_and_resumes(
    forked: None, command: Command, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, folder = write_recipe(train={"epochs": 10}, evaluate={"every": 10}), tmp_path / "two of them"
    sweep = ("train", recipe, "--run-dir", folder, "--sweep", "optimizer.lr=1e-3,2e-3,3e-3", "seed=3", "--jobs")
    runs = [folder / f"lr={number}e-3_seed3" for number in (1, 2, 3)]
    terminator = soon(lambda: all(map(step_rows, runs[:2])), partial(os.kill, os.getpid(), signal.SIGTERM))
    told = command(*sweep, 2)
    terminator.join()
    assert (told.code, "3 of 3 runs are not finished; the same command resumes" in told.err) == (75, True), told
    stopped = [max(step_rows(run)) for run in runs[:2]]
    assert all(0 < step < 200 for step in stopped), stopped
    told = command("status", folder)
    assert (told.code, f"the runs are in {folder}" in told.err) == (0, True), told
    assert told.out.splitlines()[-1].split()[:3] == ["lr=3e-3_seed3", "stopped", "0"], "it has not begun"

    told = command(*sweep, 1)
    assert told.code == 0, told
    assert [sorted(step_rows(run)) == list(range(1, 201)) for run in runs] == 3 * [True]
    assert [line.split()[:3] for line in told.out.splitlines()[-3:]] == [
        [run.name, "finished", "200/200"] for run in runs
    ]
    told = command("status", folder)
    assert (told.code, told.out.count("finished")) == (0, 3), told
    told = command(*sweep, 1)
    assert (told.code, f"finished, so left out: {', '.join(run.name for run in runs)}" in told.err) == (0, True), told
    told = command("report", folder, "--out", tmp_path / "report")
    assert (told.code, "lr=2e-3_seed3" in told.out) == (0, True), told


@pytest.mark.process
def test_mistakes_are_told_before_a_run_starts(command: Command, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, folder = write_recipe(), tmp_path / "runs"
    for arguments, *parts in (
        (("--sweep", "optimizer.lr=1,x"), "optimizer.lr", "got 'x'"),
        (("--sweep", "data.lanes=4,3"), "data.lanes"),
        (("--jobs", "2"), "--jobs 2: only a sweep"),
        (("--sweep", "seed=0:2", "--jobs", "2", "--nproc", "1:2"), "give --nproc one number"),
        (("--sweep", "seed=0:2", "--baseline", tmp_path), "--baseline", "has that run finished"),
        (("--sweep", "seed=0:2", "seed=4"), "seed is swept twice"),
    ):
        assert is_mistake(command("train", recipe, "--run-dir", folder, *arguments), *parts)
    assert not folder.exists()
    told = command("train", recipe, "--run-dir", tmp_path, "--sweep", "seed=0:2")
    assert is_mistake(told, "is the directory of one run", "use another --run-dir")
