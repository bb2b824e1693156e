"""One of two ranks hangs: the run names it, writes down where all stand, and ends as the undisturbed one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scaleprog.launchers.local import RankFailed
from scaleprog.launchers.status import status
from scaleprog.recipe import Recipe
from scaleprog.rundir.recorder import read_rows
from tests.compare import differences
from tests.conftest import run, short_recipe
from tests.distributed import hanging

MINUTES = 0.1


@pytest.fixture(scope="module")
def recipe(patterns: Path) -> Recipe:
    return short_recipe(
        patterns,
        train={"epochs": 2, "patience": MINUTES},
        data={"trace": True, "workers": 1},
        checkpoint={"every_steps": 5},
        growth={"stages": 2},
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs") / "undisturbed"
    run(recipe, folder, ranks=2)
    return folder


def stacks(folder: Path) -> dict[int, str]:
    """What each rank left of the first start."""
    files = (folder / "stacks").glob("stack-generation-1-rank-*.txt")
    return {int(re.findall(r"\d+", path.name)[-1]): path.read_text() for path in files}


@pytest.mark.parametrize(
    ("kind", "culprit", "known"),
    [
        ("stopped", r"rank 1 .* did not come: state T \(stopped\), last seen in step \d+ \(", "state: T"),
        ("decoder", r"rank 1 .* did not come: waiting for data, at scaleprog/data/stream.py:\d+ in take", "hanging.py"),
        ("save", r"rank 1 .* did not come: (saving|writing)", "hanging.py"),
    ],
)
def test_a_rank_hangs(
    kind: str, culprit: str, known: str, recipe: Recipe, undisturbed: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hanging.train(recipe, tmp_path, kind)
    assert differences(recipe, tmp_path, undisturbed) == []
    (hang,) = (event for event in read_rows(tmp_path / "events.jsonl") if event["event"] == "hang")
    assert re.search(culprit, hang["message"])
    assert "rank 0 waited for the others" in hang["message"]
    assert (hang["culprits"], hang["generation"]) == ([1], 1)
    (restart,) = status(tmp_path).restarts
    assert re.search(culprit, restart.cause)
    written = stacks(tmp_path)
    assert written.keys() == {0, 1}
    assert known in written[1]
    assert re.search(culprit, capfd.readouterr().err)


def test_a_rank_raises_in_a_collective(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """The launcher ends the other rank before its patience does."""
    hanging.train(recipe, tmp_path, "raises")
    assert differences(recipe, tmp_path, undisturbed) == []
    (restart,) = status(tmp_path).restarts
    assert restart.cause == "RuntimeError: the network card is gone"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network of its own")
def test_no_packet_arrives(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    folder = tmp_path / "run"
    command = f"ip link set lo up; exec {sys.executable} -m tests.distributed.hanging $0 $1 partition"
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", command, tmp_path / "recipe.yaml", folder],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert differences(recipe, folder, undisturbed) == []
    (hang,) = (event for event in read_rows(folder / "events.jsonl") if event["event"] == "hang")
    assert hang["culprits"] == []
    assert "ranks 0, 1 waited for the others in step 12 (training)" in hang["message"]
    assert "no rank stands apart" in hang["message"]
    assert stacks(folder).keys() == {0, 1}


def test_a_run_that_hangs_every_time_ends(recipe: Recipe, tmp_path: Path) -> None:
    culprit = r"rank 1 .* did not come: training, at scaleprog/training/loop.py:\d+ in train_step"
    with pytest.raises(
        RankFailed, match=rf"{culprit}; rank 0 waited .* raise train.patience \(now 0.1 min\)"
    ) as caught:
        hanging.train(recipe, tmp_path, "asleep", restarts=0)
    assert not caught.value.mistake
    assert caught.value.exit_code == 1
