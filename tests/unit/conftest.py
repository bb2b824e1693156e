"""What the unit tests share."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from scaleprog import cli
from tests.conftest import MakeRecipe
from tests.unit.checkpoints import Save, commit, tensors
from tests.unit.command import Command, Told, WriteRecipe
from tests.unit.fake_slurm import FakeSlurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's commands, as a test wants them to answer; the job has no variables of a real one."""
    folder = tmp_path / "slurm-commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return FakeSlurm(folder)


@pytest.fixture
def checkpoint_folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def save_checkpoint(checkpoint_folder: Path, one_rank: None) -> Save:
    """Saves a checkpoint whose tensors are drawn from its step."""

    def write(step: int, keep: int = 9, protect: tuple[int, ...] = ()) -> Path:
        return commit(checkpoint_folder, step, {"step": step}, tensors(step), keep, protect).path

    return write


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `scaleprog ARGUMENTS` in this process, as the console script does."""

    def call(*arguments: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["scaleprog", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert isinstance(code, int | None)
        return Told(code or 0, *capfd.readouterr())

    return call


@pytest.fixture
def write_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> WriteRecipe:
    """A recipe file over the patterns; by default one network throughout, without shards."""

    original = {"growth": {"schedule": "original"}, "sharding": {"engine": "replicated"}}

    def write(**groups: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(make_recipe(**(original | groups)).dump())
        return path

    return write
