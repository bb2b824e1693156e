"""Patience: for how long a rank may do something, and that each part of a run says what it does."""

import os
from pathlib import Path

import pytest
import torch

from scaleprog.errors import RecipeError
from scaleprog.growth.space import Subnet
from scaleprog.ranks import patience
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.ranks.patience import LONG_SECONDS, Track
from scaleprog.rundir import tensorfile
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.training.loop import train
from tests.conftest import MakeRecipe, step_rows
from tests.unit.checkpoints import parts, tensors


def test_a_small_network_tells_nothing_about_the_steps_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    track = Track()
    for network, size, seconds, may in (
        ("small", 1.0, 10.0, LONG_SECONDS),
        ("large", 9.0, 80.0, 270),
        ("large", 9.0, 80.0, 240),
        ("medium", 4.0, 40.0, 120),
        ("small", 1.0, 10.0, 60),
        ("compiled", 0.0, 10.0, LONG_SECONDS),
    ):
        track.at("training", kind=f"a step of {network}", size=size)
        assert track.mark is not None
        assert track.allowed(track.mark, 60) == may
        now += seconds
        track.at("after the step")


def test_what_is_paused_begins_where_it_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    track = Track()
    track.at("growing", 5, "a growth")
    now = 1.0
    with track.paused():
        assert track.mark is None
        now = 9.0
    assert track.mark is not None
    assert track.mark[:4] == ("growing", 5, "a growth", 9.0)
    assert track.allowed(track.mark, 60) == LONG_SECONDS, "it is still the first growth"
    now = 11.0
    track.rest()
    assert track.least == {"a growth": 2.0}


class Noting(Track):
    """Keeps what it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str | None] = []

    def at(self, doing: str, step: int | None = None, kind: str | None = None, size: float = 0.0) -> None:
        super().at(doing, step, kind, size)
        self.kinds.append(kind)


@pytest.mark.process
def test_everything_between_saves_has_a_kind_and_each_network_its_own(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    heard = patience.Patience(steps=Noting())
    with process_group(False, heard.limit) as (coordinator, device):
        train(make_recipe(), tmp_path, coordinator, device, patience=heard)
    assert isinstance(heard.steps, Noting)
    steps = heard.steps.kinds
    assert None not in steps
    networks = {Subnet(row["resolution"], row["depth"]) for row in step_rows(tmp_path).values()}
    assert {kind for kind in steps if "a step of" in str(kind)} == {f"a step of {network}" for network in networks}
    assert {"a batch", "the end"} < set(steps)
    assert len({kind for kind in steps if "a measurement of" in str(kind)}) > 1


def test_a_slow_disk_takes_a_large_file_in_parts_each_of_which_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened, sync = list[str](), os.fsync

    def fsync(descriptor: int) -> None:
        happened.append("sync")
        sync(descriptor)

    monkeypatch.setattr(tensorfile.os, "fsync", fsync)
    monkeypatch.setattr(tensorfile, "BLOCK", 2**10)
    monkeypatch.setattr(tensorfile, "MOST_UNSYNCED", 2**12)
    tensorfile.write(tmp_path / "a", {"a": torch.zeros(5 * 2**10)}, lambda: happened.append("progress"))
    rounds = " ".join(happened).split("sync")
    assert len(rounds) == 7, "20 KiB in parts of 4, and the end"
    assert all("progress" in between for between in rounds[:-1])


def test_a_save_waits_for_other_ranks_with_a_kind_of_its_own(one_rank: None, tmp_path: Path) -> None:
    heard = patience.Patience(saves=Noting())
    heard.at("growing", 1, "a growth")
    checkpoints = Checkpoints(tmp_path / "checkpoints", Coordinator(), keep=1, patience=heard)
    checkpoints.save(1, {}, parts(tensors()))
    checkpoints.wait()
    assert "the wait for the other ranks' files" in heard.saves.least
    assert heard.steps.least == {}, "the growth lasts"


def test_a_patience_that_ends_every_run_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"train\.patience"):
        make_recipe(train={"patience": 1e-6})


def test_a_short_patience_does_not_keep_a_core_busy() -> None:
    rank, looks = patience.Patience(1e-5), list[float | None]()
    rank._ended.wait = lambda timeout=None: looks.append(timeout) or True  # type: ignore[method-assign]
    rank._watch()
    assert looks == [patience.LEAST_LOOK]


def test_slow_saves_are_named_too(capfd: pytest.CaptureFixture[str]) -> None:
    rank = patience.Patience(60.0)
    rank.saves.least, rank.saves.often = {"a save": 30.0}, {"a save"}
    rank._warn()
    assert "is 60 s, but a save takes 30 s" in capfd.readouterr().err
