"""The batch script does not wait for an srun that does not hear that its tasks have ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaleprog.launchers import srun
from scaleprog.launchers.exits import UNHEARD
from scaleprog.launchers.requeue import Attempt, report
from tests.unit.fake_slurm import FakeSlurm

START = Attempt("7", 0, 1)
RUNS, GONE = "echo 'StepId=7.3 State=RUNNING'", "echo 'slurm_load_job_steps error: Job step 7.3 not found' >&2; exit 1"


@pytest.fixture
def waiting() -> Iterator[subprocess.Popen[bytes]]:
    """What waits longer than any test."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def own(run: Path, repeat: int = START.repeat, step: str | None = "3") -> None:
    """The start that trains there."""
    owner = {"generation": 1, "job": START.job, "restart": START.restart, "repeat": repeat, "step": step}
    (run / "owner.json").write_text(json.dumps(owner))


class Pauses:
    """Seconds that pass at once; at `event`, something happens."""

    def __init__(self, **events: object) -> None:
        self.seconds, self.events = 0.0, events

    def __call__(self, seconds: float) -> None:
        self.seconds += seconds
        if callable(event := self.events.get(f"at_{self.seconds:.0f}")):
            event()


def test_the_tasks_have_ended_and_srun_has_not(
    fake: FakeSlurm, waiting: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    own(tmp_path)
    fake.command("scontrol", RUNS)
    pauses = Pauses(at_100=lambda: report(tmp_path, START, 1, 1, "it"), at_200=lambda: fake.command("scontrol", GONE))
    why = srun.outlived(tmp_path, START, waiting, pauses)
    assert why == "Slurm has ended step 3, and srun has not heard so 102 s after a task failed"
    asked = fake.calls("scontrol")
    assert set(asked) == {"scontrol -o show step 7.3"}
    assert len(asked) == (200 - 100 - srun.ASK_AFTER) / srun.LOOK_SECONDS + 2, "only after the report"


@pytest.mark.parametrize("answer", [RUNS, "echo 'Unable to contact slurm controller' >&2; exit 1"])
def test_a_step_that_does_not_end_is_given_up_in_the_end(
    fake: FakeSlurm, waiting: subprocess.Popen[bytes], tmp_path: Path, answer: str
) -> None:
    own(tmp_path)
    report(tmp_path, START, 0, 76, "hangs")
    fake.command("scontrol", answer)
    pauses = Pauses()
    assert srun.outlived(tmp_path, START, waiting, pauses) == "srun has not ended 600 s after a task failed"
    assert pauses.seconds == 600


@pytest.mark.parametrize("owned", [{"repeat": 0}, {"step": None}])
def test_the_step_of_another_start_is_not_asked_for(
    fake: FakeSlurm, waiting: subprocess.Popen[bytes], tmp_path: Path, owned: dict[str, int | None]
) -> None:
    own(tmp_path, **owned)  # type: ignore[arg-type]
    report(tmp_path, START, 0, 1, "it")
    fake.command("scontrol", GONE)
    assert "600 s" in (srun.outlived(tmp_path, START, waiting, Pauses()) or "")
    assert fake.calls("scontrol") == []


def test_without_a_report_srun_may_take_as_long_as_it_likes(
    fake: FakeSlurm, waiting: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    own(tmp_path)
    report(tmp_path, Attempt("7", 0, 0), 0, 1, "the start before")
    assert srun.outlived(tmp_path, START, waiting, Pauses(at_100000=lambda: end(waiting))) is None
    assert fake.calls("scontrol") == []


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize(("does", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143)])
def test_the_exit_code_is_that_of_srun(fake: FakeSlurm, tmp_path: Path, does: str, code: int) -> None:
    fake.command("srun", does)
    assert attended(tmp_path, "srun", "-n2", "a b").wait() == code
    assert fake.calls("srun") == ["srun -n2 a b"]


def test_an_srun_that_is_ended_has_a_code_of_its_own(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own(tmp_path)
    report(tmp_path, START, 0, 1, "it")
    fake.command("scontrol", GONE)
    for name, value in {"SLURM_JOB_ID": "7", "SCALEPROG_REPEAT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert srun.attend(tmp_path, ["sleep", "600"], pause=lambda seconds: time.sleep(0.01)) == UNHEARD
    assert "has not heard so 10 s after a task failed; ended srun\n" in capfd.readouterr().err


@pytest.mark.process
def test_signals_are_for_the_tasks(fake: FakeSlurm, tmp_path: Path) -> None:
    """The one that attends to srun survives them, and srun, which hands them on, does not ignore them."""
    begun = tmp_path / "begun"
    fake.command("srun", f"trap 'exit 5' TERM; touch {begun}; while :; do sleep 0.1; done")
    process = attended(tmp_path, "srun")
    while not begun.exists():
        time.sleep(0.05)
    for number in (signal.SIGUSR2, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    subprocess.run(["pkill", "-TERM", "-P", str(process.pid)], check=True)
    assert process.wait() == 5


def attended(run: Path, *command: str) -> subprocess.Popen[bytes]:
    """As the batch script starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "scaleprog.launchers.srun", run, *command], env={**os.environ, "SLURM_JOB_ID": "7"}
    )
