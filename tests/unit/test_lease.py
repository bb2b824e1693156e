"""Run directories: one start at a time, the latest one, and only of their own recipe."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaleprog.errors import CheckpointError, Superseded, Unavailable
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.recipe import Recipe
from scaleprog.rundir import lease as leases
from scaleprog.rundir.lease import OWNER, Lease, job_of, read_owner, take_lease
from tests.unit.fake_slurm import FakeSlurm

pytestmark = pytest.mark.process

Take = Callable[..., Lease]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def take(folder: Path, make_recipe: Callable[..., Recipe], one_rank: None, monkeypatch: pytest.MonkeyPatch) -> Take:
    """Claims the folder, in the job that is given."""

    def lease(job: str | None = None, restart: int = 0, **groups: Any) -> Lease:
        for name, value in {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": job and str(restart)}.items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
        return take_lease(folder, make_recipe(**groups), Coordinator())

    return lease


def owned_by(folder: Path, **changes: Any) -> None:
    owner = {"generation": 4, "nonce": "x", "job": None, "restart": 0, "host": socket.gethostname(), "pid": 1,
             "started": "0", **changes}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNER).write_text(json.dumps(owner))


def test_each_start_takes_over_with_a_higher_number(take: Take, folder: Path) -> None:
    first, second = take(), take()
    assert (first.generation, second.generation) == (1, 2)
    with second.fence():
        pass
    second.beat()
    for act in (first.beat, lambda: first.fence().__enter__()):
        with pytest.raises(Superseded, match=r"generation 1 was superseded by generation 2 \(process \d+ on "):
            act()


def test_the_recipe_is_kept_and_another_is_refused_with_what_differs(take: Take, folder: Path) -> None:
    take()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"another recipe:\n  seed: 3 here, 0 there\nuse another --run-dir"):
        take(seed=3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "nothing overwritten"
    assert take(checkpoint={"keep": 9}).generation == 2


def test_a_directory_in_use_on_this_machine_is_refused(take: Take, folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        owned_by(folder, pid=process.pid, started=started)
        with pytest.raises(CheckpointError, match=rf"in use by process {process.pid} on .*; wait for it, cancel it"):
            take()
        assert read_owner(folder).generation == 4  # type: ignore[union-attr]
        owned_by(folder, pid=process.pid, started="1")  # that process ended, and its number is another's now
        assert take().generation == 5
        process.kill()


def test_an_owner_on_another_host_is_alive_while_its_heart_beats(take: Take, folder: Path) -> None:
    owned_by(folder, host="elsewhere")
    with pytest.raises(CheckpointError, match="in use by process 1 on elsewhere"):
        take()
    os.utime(folder / OWNER, (time.time() - 200,) * 2)
    assert take().generation == 5


@pytest.mark.parametrize("ahead", [200.0, 1e6, 2e9])
def test_a_heartbeat_in_the_future_locks_nothing(ahead: float, take: Take, folder: Path) -> None:
    owned_by(folder, host="elsewhere")
    os.utime(folder / OWNER, (time.time() + ahead,) * 2)
    assert take().generation == 5


def test_clocks_that_differ_a_little_do_not_end_an_owner(take: Take, folder: Path) -> None:
    owned_by(folder, host="elsewhere")
    os.utime(folder / OWNER, (time.time() + 60,) * 2)
    with pytest.raises(CheckpointError, match="in use by process 1 on elsewhere"):
        take()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"{}", b"[]", b"7", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
        b" " * 2**17, b"9" * 5000,
    ],
)  # fmt: skip
def test_an_owner_file_that_is_none_is_named(content: bytes, take: Take, folder: Path) -> None:
    folder.mkdir()
    (folder / OWNER).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"owner\.json: not readable \(.*\); delete it if nothing trains there"):
        read_owner(folder)
    with pytest.raises(CheckpointError, match=r"owner\.json: not readable"):
        take()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation", 0), ("generation", True), ("generation", 1.5), ("generation", "1"), ("generation", 10**30),
        ("nonce", None), ("nonce", "\x1b[2J"), ("job", 7), ("job", "-o"), ("job", "7 8"), ("job", "7\n"),
        ("job", ""), ("job", "٧"), ("restart", -1), ("restart", None), ("host", 5), ("host", ""),
        ("host", "\x1b]0;x\x07"), ("host", "x" * 300), ("pid", -1), ("pid", 0),
        ("pid", 2**40), ("pid", True), ("pid", "1"), ("pid", [1]),
        ("pid", 1e300), ("pid", float("nan")), ("started", 5), ("started", ""), ("started", "-1"), ("started", "Z"),
        ("step", 4), ("step", ""), ("step", "extern"), ("step", "4 5"),
    ],
)  # fmt: skip
def test_an_owner_that_cannot_be_is_named(field: str, value: Any, folder: Path) -> None:
    owned_by(folder, **{field: value})
    with pytest.raises(CheckpointError, match=rf"owner\.json: not readable \({field} is ") as caught:
        read_owner(folder)
    assert str(caught.value).isprintable()


def test_a_last_generation_is_refused(take: Take, folder: Path) -> None:
    owned_by(folder, generation=2**53)
    with pytest.raises(CheckpointError, match=r"owner\.json: the generation is at its maximum"):
        take()


def test_what_a_job_calls_itself_is_written_down_if_it_can_be_a_job(take: Take, folder: Path) -> None:
    take(job="--help")
    owner = read_owner(folder)
    assert owner is not None
    assert owner.job is None


@pytest.mark.parametrize("name", [OWNER, ".lock"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device", "link"])
def test_what_lies_in_the_place_of_a_file_is_not_waited_for(name: str, kind: str, take: Take, folder: Path) -> None:
    folder.mkdir()
    other = folder.parent / "other"
    other.write_text("not to be touched")
    if kind == "FIFO":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else other)
    with pytest.raises(CheckpointError, match="not readable" if name == OWNER else "cannot be a run directory"):
        take()
    assert other.read_text() == "not to be touched"


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(take: Take, folder: Path) -> None:
    folder.mkdir()
    other = folder.parent / "other"
    other.write_text("not to be touched")
    (folder / f".{OWNER}.{os.getpid()}").symlink_to(other)
    take()
    assert other.read_text() == "not to be touched"
    assert not (folder / OWNER).is_symlink()


@pytest.mark.parametrize(
    ("state", "refused"),
    [("RUNNING", True), ("PENDING", True), ("COMPLETED", False), ("PREEMPTED", False), (None, False)],
)
def test_slurm_knows_whether_another_job_is_alive(
    state: str | None, refused: bool, take: Take, folder: Path, fake: FakeSlurm
) -> None:
    if state is not None:
        fake.show(state=state)
    else:
        fake.command("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    owned_by(folder, job="17", restart=2, host="elsewhere")
    if refused:
        with pytest.raises(CheckpointError, match="in use by job 17 restart 2, process 1 on elsewhere"):
            take(job="18")
    else:
        assert take(job="18").generation == 5


def test_a_restart_of_the_same_job_takes_over_from_its_orphans_but_not_from_later_ones(
    take: Take, folder: Path
) -> None:
    owned_by(folder, job="17", restart=2, host="elsewhere")
    assert take(job="17", restart=3).generation == 5
    with pytest.raises(Superseded, match=r"job 17 restart 3, .* has already taken over from restart 2"):
        take(job="17", restart=2)


ALLOCATION = {"SLURM_JOB_ID": "17"}  # what a shell of salloc has
STEP = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4"}
LIVES = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.recipe import Recipe
from scaleprog.rundir.lease import take_lease
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
lease = take_lease(Path(sys.argv[1]), Recipe.load(sys.argv[2]), Coordinator())
print("taken", flush=True)
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (None, 0, None)),
        (ALLOCATION, (None, 0, None)),
        (STEP, ("17", 0, "4")),
        ({"SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}, ("17", 0, "batch")),
        ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "3"}, ("17", 3, "batch")),
        ({**STEP, "SLURM_RESTART_COUNT": "3", "SLURM_STEP_ID": "x"}, ("17", 3, "batch")),
        ({**STEP, "SLURM_JOB_ID": "-o"}, (None, 0, None)),
    ],
)
def test_the_job_of_a_process_is_the_one_that_started_it(variables: dict[str, str], expected: tuple) -> None:
    assert job_of(variables) == expected


@pytest.mark.parametrize("variables", [ALLOCATION, STEP, {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0"}])
@pytest.mark.parametrize("over", [False, True])
def test_a_second_process_of_one_job_is_refused_while_the_first_lives(
    variables: dict[str, str], over: bool, folder: Path, make_recipe: Callable[..., Recipe], one_rank: None,
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    fake.show(state="COMPLETED" if over else "RUNNING", batch=0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    recipe = make_recipe()
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    command = [sys.executable, "-c", LIVES, folder, tmp_path / "recipe.yaml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "taken\n"
            with pytest.raises(CheckpointError, match=rf"in use by .*process {first.pid} on"):
                take_lease(folder, recipe, Coordinator())
        finally:
            first.kill()
    assert take_lease(folder, recipe, Coordinator()).generation == 2


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ESTALE, Unavailable), (errno.EIO, Unavailable), (errno.EACCES, CheckpointError)]
)
def test_a_file_system_that_does_not_answer_is_no_mistake(
    number: int, kind: type[Exception], take: Take, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take()

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for function in ("read_text", "open_regular"):
        with monkeypatch.context() as patch:
            patch.setattr(leases, function, fail)
            with pytest.raises(kind):
                take()
    with monkeypatch.context() as patch:
        patch.setattr(leases, "read_text", fail)
        held.beat()  # commits ask again


STEP_RUNS = "StepId=17.4 State=RUNNING"


@pytest.mark.parametrize(
    ("owner", "step", "silent", "refused"),
    [
        ({"job": None}, STEP_RUNS, False, True),
        ({"job": None}, "not found", False, True),  # Slurm knows nothing of a plain process
        ({"job": None}, STEP_RUNS, True, False),
        ({"job": "17", "step": "4"}, STEP_RUNS, False, True),
        ({"job": "17", "step": "4"}, "not found", False, False),  # an earlier srun in this allocation
        ({"job": "17", "step": "4"}, "Socket timed out", False, True),
        ({"job": "17", "step": "4"}, "Socket timed out", True, False),
        ({"job": "17", "step": "batch"}, STEP_RUNS, False, True),
        ({"job": "17", "step": "4294967290"}, "not found", False, True),  # an interactive step has no record
        ({"job": "17"}, STEP_RUNS, False, True),  # written by an earlier version
    ],
)
def test_another_start_in_the_same_allocation_on_another_host(
    owner: dict[str, str], step: str, silent: bool, refused: bool, take: Take, folder: Path, fake: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fake.show(batch=0)
    fails = step != STEP_RUNS
    answer = f"echo 'Job step 17.4: {step}' >&2; exit 1" if fails else f"echo '{step}'"
    fake.command("scontrol", f'if [ "$3" = step ]; then {answer}; else cat {fake.folder}/shown; fi')
    owned_by(folder, host="elsewhere", **owner)
    if silent:
        os.utime(folder / OWNER, (time.time() - 200,) * 2)
    monkeypatch.setenv("SLURM_PROCID", "0")
    if refused:
        with pytest.raises(CheckpointError, match=r"in use by .*process 1 on elsewhere"):
            take(job="17")
    else:
        assert take(job="17").generation == 5


@pytest.mark.parametrize(("batch", "refused"), [(1, True), (0, False)])
def test_a_job_that_may_start_a_run_again_keeps_it_but_an_allocation_does_not(
    batch: int, refused: bool, take: Take, folder: Path, fake: FakeSlurm
) -> None:
    fake.show(batch=batch)
    owned_by(folder, job="17", step="4", pid=1, started="1")  # on this host, and gone
    if refused:
        with pytest.raises(CheckpointError, match="in use by job 17"):
            take()
    else:
        assert take().generation == 5


def test_a_heart_beats_while_the_lease_is_held_whatever_the_rank_does(
    take: Take, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.02)
    lease = take()
    beating = f"{lease.generation}"
    old = time.time() - 1000

    def beats(seconds: float) -> bool:
        os.utime(folder / OWNER, (old, old))
        give_up = time.monotonic() + seconds
        while (silent := (folder / OWNER).stat().st_mtime < old + 1) and time.monotonic() < give_up:
            time.sleep(0.01)
        return not silent

    assert beats(10), beating
    del lease
    time.sleep(0.2)
    assert not beats(0.5), "the heart of a run that has ended"


def test_what_cannot_be_claimed_is_named(take: Take, folder: Path) -> None:
    owned_by(folder)
    (folder / OWNER).write_text("{")
    with pytest.raises(CheckpointError, match=r"owner\.json: not readable .*delete it if nothing trains there"):
        take()
    (folder / OWNER).unlink()
    folder.rmdir() if not any(folder.iterdir()) else None
    for path in folder.glob(".*"):
        path.unlink()
    folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(CheckpointError, match="run: cannot be a run directory"):
        take()


def test_ranks_that_do_not_see_the_directory_are_named(
    take: Take, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaleprog.rundir.lease.SHARED_SECONDS", 0.2)
    monkeypatch.setattr("scaleprog.rundir.lease._sees", lambda *_: False)
    with pytest.raises(CheckpointError, match=r"rank 0 on .* cannot see what rank 0 on .* wrote there; .*nodes share"):
        take()


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "rank_1"])
def test_a_folder_that_lies_elsewhere_is_refused(name: str, take: Take, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=f"{name}: a symbolic link; .* use another --run-dir"):
        take()
    assert list((tmp_path / "theirs").iterdir()) == []
