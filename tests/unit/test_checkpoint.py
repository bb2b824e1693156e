"""Checkpoints of a run: whole or absent; which is the newest, and which ones stay."""

import errno
import os
import re
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

import scaleprog.rundir.tensorfile
from scaleprog.errors import CheckpointError, Superseded, Unavailable
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.storage import (
    MANIFEST,
    committed,
    load_tensors,
    read_manifest,
    step_of,
    tidy,
    verify,
    write_tensors,
)
from tests.unit.checkpoints import Save, blank, commit, data_file, flip, names, newest, parts, tensors

# ---- writing and reading


def test_what_was_saved_is_loaded_bit_for_bit(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    path = save_checkpoint(40)
    loaded = blank()
    load_tensors(path, parts(loaded))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(40).items())
    assert {name: t.dtype for name, t in loaded.items()} == {name: t.dtype for name, t in tensors().items()}
    assert read_manifest(path).state == {"step": 40}
    verify(path)


def test_a_commit_tells_what_it_wrote(one_rank: None, checkpoint_folder: Path) -> None:
    ended = commit(checkpoint_folder, 3, {"x": [1.5, None]}, tensors())
    assert (ended.path, ended.step, ended.error) == (checkpoint_folder / "step-00000003", 3, None)
    assert ended.bytes == sum(p.stat().st_size for p in ended.path.iterdir() if p.name != MANIFEST)
    assert ended.seconds > 0
    assert read_manifest(ended.path).state == {"x": [1.5, None]}


def test_a_step_that_is_saved_again_replaces_the_checkpoint(one_rank: None, checkpoint_folder: Path) -> None:
    path = commit(checkpoint_folder, 5, {"try": 1}, tensors(1), permanent=True).path
    commit(checkpoint_folder, 5, {"try": 2}, tensors(2))
    assert names(checkpoint_folder) == ["step-00000005"]
    assert read_manifest(path).state == {"try": 2}
    verify(path)
    for step in (6, 7):
        commit(checkpoint_folder, step, {}, tensors(), keep=1)
    assert names(checkpoint_folder) == ["step-00000005", "step-00000007"], "it stays permanent"


def test_a_checkpoint_whose_replacement_was_cut_off_comes_back(one_rank: None, checkpoint_folder: Path) -> None:
    path = commit(checkpoint_folder, 5, {"try": 1}, tensors(1)).path
    path.rename(path.with_name(".step-00000005.old"))  # where a kill between the two renames leaves it
    half_deleted = commit(checkpoint_folder, 4, {}, tensors()).path
    data_file(half_deleted).unlink()
    half_deleted.rename(half_deleted.with_name(".step-00000004.old"))
    tidy(checkpoint_folder)
    assert names(checkpoint_folder) == ["step-00000005"]
    verify(path)


def test_the_state_is_saved_as_it_was_then(
    one_rank: None, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()
    monkeypatch.setattr("scaleprog.rundir.checkpoint.write_tensors", lambda *a: going_on.wait(10) and write_tensors(*a))
    checkpoints, live = Checkpoints(checkpoint_folder, Coordinator(), keep=1), {"times": [[16, 2, [1.0]]]}
    checkpoints.save(1, live, parts(tensors()))
    live["times"][0][2].append(2.0)
    going_on.set()
    checkpoints.wait()
    assert read_manifest(checkpoint_folder / "step-00000001").state == {"times": [[16, 2, [1.0]]]}


def test_what_is_saved_is_what_the_tensors_were_then(one_rank: None, checkpoint_folder: Path) -> None:
    checkpoints, live = Checkpoints(checkpoint_folder, Coordinator(), keep=1), tensors(1)
    checkpoints.save(1, {}, parts(live))
    for tensor in live.values():
        tensor.fill_(7)
    checkpoints.wait()
    loaded = blank()
    load_tensors(checkpoint_folder / "step-00000001", parts(loaded))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1).items())


# ---- which one is the newest


def test_a_damaged_checkpoint_is_taken_out_of_the_way_by_whoever_may_write(
    one_rank: None, checkpoint_folder: Path
) -> None:
    commit(checkpoint_folder, 1, {}, tensors())
    flip(data_file(commit(checkpoint_folder, 2, {}, tensors()).path))
    assert newest(checkpoint_folder)[0] == "step-00000001"
    assert names(checkpoint_folder) == ["step-00000001", "step-00000002"], "a reader changes nothing"
    checkpoints = Checkpoints(checkpoint_folder, Coordinator(), keep=1, generation=1)
    assert checkpoints.newest(print) is not None
    assert names(checkpoint_folder) == ["step-00000001", "step-00000002.damaged"]
    assert checkpoints.newest_step == 1


def test_a_file_system_that_does_not_answer_is_no_damage(
    one_rank: None, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(checkpoint_folder, 1, {}, tensors())
    commit(checkpoint_folder, 2, {}, tensors())

    def failing(*steps: int) -> None:
        def check_file(file: BinaryIO, *expected: Any) -> None:
            if any(Path(file.name).parent.name.endswith(str(step)) for step in steps):
                raise OSError(errno.EIO, "Input/output error")
            check(file, *expected)

        monkeypatch.setattr("scaleprog.rundir.tensorfile.check", check_file)

    check = scaleprog.rundir.tensorfile.check
    failing(2)
    found, told = newest(checkpoint_folder)
    assert found == "step-00000001"
    assert "cannot be read" in told[0]
    assert names(checkpoint_folder) == ["step-00000001", "step-00000002"], "a reader changes nothing"
    failing(1, 2)
    start = Checkpoints(checkpoint_folder, Coordinator(), keep=1, generation=1)
    for read in (lambda: newest(checkpoint_folder), lambda: start.newest(print)):
        with pytest.raises(Unavailable, match="Input/output error"):  # rather than to begin anew
            read()
    failing(2)
    assert start.newest(print) == checkpoint_folder / "step-00000001"
    failing()
    assert start.newest(print) == checkpoint_folder / "step-00000001", "it would not continue what has trained since"
    assert names(checkpoint_folder) == ["step-00000001", "step-00000002.unreadable"]
    commit(checkpoint_folder, 2, {}, tensors())
    failing(2)
    assert start.newest(print) == checkpoint_folder / "step-00000001", "the same again"
    assert names(checkpoint_folder)[1:] == ["step-00000002.unreadable", "step-00000002.unreadable.2"]


def test_a_start_does_not_go_on_from_an_older_one_while_the_newest_may_come_back(
    one_rank: None, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(checkpoint_folder, 1, {}, tensors())
    commit(checkpoint_folder, 2, {}, tensors())
    check = scaleprog.rundir.tensorfile.check

    def check_file(file: BinaryIO, *expected: Any) -> None:
        if Path(file.name).parent.name.endswith("2"):
            raise OSError(errno.ESTALE, "stale file handle")
        check(file, *expected)

    def rename(path: Path, target: Path) -> None:
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr("scaleprog.rundir.tensorfile.check", check_file)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Unavailable, match=r"step-00000002.*stale file handle"):
        Checkpoints(checkpoint_folder, Coordinator(), keep=1, generation=1).newest(print)


def test_a_reader_of_a_run_that_trains_on_finds_what_replaces_what_it_read(
    one_rank: None, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(checkpoint_folder, 10, {}, tensors())
    check, kept = scaleprog.rundir.tensorfile.check, Checkpoints(checkpoint_folder, Coordinator(), keep=1)

    def check_file(file: BinaryIO, *expected: Any) -> None:
        monkeypatch.setattr("scaleprog.rundir.tensorfile.check", check)
        kept.save(20, {}, parts(tensors()))
        kept.wait()
        raise CheckpointError("missing")

    monkeypatch.setattr("scaleprog.rundir.tensorfile.check", check_file)
    assert newest(checkpoint_folder)[0] == "step-00000020"


def test_there_is_no_newest_where_nothing_was_saved(one_rank: None, checkpoint_folder: Path) -> None:
    assert newest(checkpoint_folder) == (None, [])
    checkpoint_folder.mkdir(parents=True)
    assert newest(checkpoint_folder) == (None, [])


def test_the_newest_is_the_last_step(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    for step in (20, 100, 3):
        save_checkpoint(step)
    assert [step_of(path) for path in committed(checkpoint_folder)] == [3, 20, 100]
    assert newest(checkpoint_folder) == ("step-00000100", [])


def test_what_is_no_published_checkpoint_is_ignored(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    path = save_checkpoint(20)
    shutil.copytree(path, checkpoint_folder / ".step-00000040.writing")  # interrupted before its rename
    shutil.copytree(path, checkpoint_folder / "step-00000060.bak")  # a user's copy
    (checkpoint_folder / "step-00000080").write_text("not a folder")
    assert newest(checkpoint_folder) == ("step-00000020", [])
    save_checkpoint(40)
    assert newest(checkpoint_folder) == ("step-00000040", [])


def test_if_all_are_damaged_the_run_does_not_start_over(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    for step in (1, 2):
        flip(data_file(save_checkpoint(step)))
    told: list[str] = []
    checkpoints = Checkpoints(checkpoint_folder, Coordinator(), keep=9, generation=1)
    with pytest.raises(CheckpointError, match=rf"^{checkpoint_folder}: all checkpoints are damaged \(2\)"):
        checkpoints.newest(told.append)
    assert ["step-00000002" in told[0], "step-00000001" in told[1]] == [True, True]
    assert names(checkpoint_folder) == ["step-00000001", "step-00000002"], "nobody renamed them"


# ---- which ones stay


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep: int, save_checkpoint: Save, checkpoint_folder: Path) -> None:
    for step in range(10, 60, 10):
        save_checkpoint(step, keep)
    assert [step_of(path) for path in committed(checkpoint_folder)] == list(range(10, 60, 10))[-keep:]


def test_the_protected_one_stays_beyond_those(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    for step in (10, 20):
        save_checkpoint(step, keep=2)
    for step in (30, 40, 50):
        save_checkpoint(step, keep=2, protect=(10,))
    assert [step_of(path) for path in committed(checkpoint_folder)] == [10, 40, 50]
    save_checkpoint(60, keep=2)
    assert [step_of(path) for path in committed(checkpoint_folder)] == [50, 60]


def test_the_best_stays_until_a_better_one_is_saved(one_rank: None, checkpoint_folder: Path) -> None:
    def save(step: int, best: int) -> list[int]:
        commit(checkpoint_folder, step, {"best_step": best}, tensors(), keep=1, best=best)
        return [step_of(path) for path in committed(checkpoint_folder)]

    assert save(10, best=10) == [10]
    assert save(15, best=10) == [10, 15]
    for step in (30, 40):  # step 20 was better, but could not be saved
        assert save(step, best=20) == [10, step]
    assert save(50, best=50) == [50]


def test_a_permanent_one_stays(one_rank: None, checkpoint_folder: Path) -> None:
    for step in (10, 20, 30, 40):
        commit(checkpoint_folder, step, {}, tensors(), keep=1, permanent=step == 20)
    assert [step_of(path) for path in committed(checkpoint_folder)] == [20, 40]


def test_permanent_ones_are_read_once(one_rank: None, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    manifest_of = scaleprog.rundir.storage.read_manifest
    monkeypatch.setattr(
        "scaleprog.rundir.storage.read_manifest", lambda path: read.append(path.name) or manifest_of(path)
    )
    checkpoints = Checkpoints(checkpoint_folder, Coordinator(), keep=1)
    for step in range(1, 6):
        checkpoints.save(step, {}, parts(tensors()), permanent=step <= 3)
    checkpoints.wait()
    assert names(checkpoint_folder) == [f"step-{step:08d}" for step in (1, 2, 3, 5)]
    assert read == [f"step-{step:08d}" for step in (1, 2, 3, 4)]


def test_older_ones_that_cannot_be_deleted_do_not_make_a_save_fail(
    one_rank: None, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    checkpoints = Checkpoints(checkpoint_folder, Coordinator(), keep=1)
    checkpoints.save(1, {}, parts(tensors()))
    checkpoints.wait()
    monkeypatch.setattr("scaleprog.rundir.checkpoint.retire", fails)
    checkpoints.save(2, {}, parts(tensors()))
    checkpoints.wait()
    (_, ended) = checkpoints.finished()
    assert ended.error is None
    assert "older checkpoints are not deleted" in ended.left
    assert newest(checkpoint_folder)[0] == "step-00000002"


def test_what_an_interruption_left_is_tidied_away(save_checkpoint: Save, checkpoint_folder: Path) -> None:
    save_checkpoint(10)
    for name in (".step-00000020.3.writing", ".step-00000005.old"):
        (checkpoint_folder / name).mkdir()
        (checkpoint_folder / name / "rank-00000.safetensors").write_bytes(b"half")
    assert newest(checkpoint_folder) == ("step-00000010", [])
    tidy(checkpoint_folder)
    assert names(checkpoint_folder) == ["step-00000010"]


def test_a_checkpoint_that_cannot_be_read_now_is_not_tidied_away(
    save_checkpoint: Save, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(10)
    path.rename(path.with_name(".step-00000010.old"))  # where a kill between the two renames leaves it
    monkeypatch.setattr("scaleprog.rundir.storage.open_regular", refuse_to_read)
    tidy(checkpoint_folder)
    monkeypatch.undo()
    assert names(checkpoint_folder) == ["step-00000010"]
    verify(path)


def refuse_to_read(path: Path, **_: Any) -> BinaryIO:
    raise OSError(errno.EIO, "input/output error", str(path))


def test_a_start_that_was_superseded_neither_commits_nor_deletes(
    one_rank: None, checkpoint_folder: Path, save_checkpoint: Save
) -> None:
    save_checkpoint(10)

    @contextmanager
    def fence() -> Iterator[None]:
        raise Superseded("generation 1 was superseded by generation 2")
        yield

    orphan = Checkpoints(checkpoint_folder, Coordinator(), keep=1, fence=fence)
    orphan.save(20, {}, parts(tensors()))
    with pytest.raises(Superseded, match="generation 1 was superseded"):
        orphan.wait()
    assert names(checkpoint_folder) == ["step-00000010"]


# ---- writing that fails


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: what a full disk does, but to this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_breaks_off_leaves_the_older_ones(
    save_checkpoint: Save, checkpoint_folder: Path, small_files: None
) -> None:
    save_checkpoint(20)
    large = {"online/net.weight": torch.zeros(2**16)}
    ended = commit(checkpoint_folder, 40, {}, large, keep=1)
    assert re.search(r"step-00000040\.0\.writing: not written \(rank 0: .*\); is the disk full", str(ended.error))
    assert newest(checkpoint_folder) == ("step-00000020", [])
    assert names(checkpoint_folder) == ["step-00000020"], "what was written would keep the disk full"


def test_a_disk_that_is_full_only_for_the_manifest_leaves_the_older_ones(
    save_checkpoint: Save, checkpoint_folder: Path, small_files: None
) -> None:
    save_checkpoint(20)
    ended = commit(checkpoint_folder, 40, {"x": "x" * 2**17}, tensors(), keep=1)
    assert re.search(r"not written \(.*large\); is the disk full", str(ended.error))
    assert newest(checkpoint_folder) == ("step-00000020", [])
    assert names(checkpoint_folder) == ["step-00000020"], "what was written would keep the disk full"


def test_a_checkpoint_that_cannot_be_replaced_stays(
    save_checkpoint: Save, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(20)
    rename = os.rename

    def refuse(old: Path, new: Path) -> None:
        if str(old).endswith(".writing"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(old, new)

    monkeypatch.setattr("os.rename", refuse)
    ended = commit(checkpoint_folder, 20, {}, tensors(21), keep=1)
    assert ended.error is not None
    assert names(checkpoint_folder) == ["step-00000020"]


def test_a_folder_that_cannot_be_made_is_named(one_rank: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = commit(tmp_path / "file" / "checkpoints", 1, {}, tensors())
    assert re.search(r"file/checkpoints/\.step-00000001\.0\.writing: not written \(.*Not a di", str(ended.error))
