"""What the unit tests share."""

import os
from pathlib import Path

import pytest

from tests.unit.checkpoints import Save, commit, tensors
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
