"""The batch script does not wait for an srun that does not hear that its tasks have ended."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scaleprog.launchers import srun
from scaleprog.launchers.attempt import Attempt, report
from scaleprog.launchers.exits import UNHEARD
from tests.unit.fake_slurm import FakeSlurm

START = Attempt("7", 0, 1)
RUNS, GONE = "echo 'StepId=7.3 State=RUNNING'", "echo 'slurm_load_job_steps error: Job step 7.3 not found' >&2; exit 1"


def own(run: Path, repeat: int = START.repeat, step: str | None = "3") -> None:
    """The start that trains there."""
    owner = {"generation": 1, "job": START.job, "restart": START.restart, "repeat": repeat, "step": step}
    (run / "owner.json").write_text(json.dumps(owner))


def looks(run: Path, seconds: int, most: float = 1800.0, **events: Callable[[], object]) -> str:
    """What is found within so many seconds, which pass at once, and when; at `at_N` something happens."""
    outliving, clock = (
        srun.Outliving(run, START, srun.Patience(most=most)),
        1e6,
    )  # as of a machine that has run for days
    for second in range(0, seconds + 1, int(srun.LOOK_SECONDS)):
        if event := events.get(f"at_{second}"):
            event()
        if why := outliving.look(clock + second):
            return f"{second} s: {why}"
    return "nothing"


def test_the_tasks_have_ended_and_srun_has_not(fake: FakeSlurm, tmp_path: Path) -> None:
    own(tmp_path)
    fake.command("scontrol", RUNS)
    found = looks(
        tmp_path,
        300,
        at_30=lambda: report(tmp_path, START, 1, 1, "it"),
        at_200=lambda: fake.command("scontrol", GONE),
    )
    assert found == "210 s: Slurm has ended step 3, and srun has not heard so for 10 s"
    asked = fake.calls("scontrol")
    assert set(asked) == {"scontrol -o show step 7.3"}
    assert len(asked) == (210 - 30 - 10) / srun.LOOK_SECONDS + 1, "only after the report"


def test_without_a_report_it_is_asked_for_now_and_then(fake: FakeSlurm, tmp_path: Path) -> None:
    """Tasks that a signal ends leave none, nor do those that have finished."""
    own(tmp_path)
    report(tmp_path, Attempt("7", 0, 0), 0, 1, "the start before")
    fake.command("scontrol", RUNS)
    assert looks(tmp_path, 3600) == "nothing"
    assert len(fake.calls("scontrol")) == 60
    assert looks(tmp_path, 3600, at_1000=lambda: fake.command("scontrol", GONE)).startswith("1030 s: Slurm has ended")


def test_srun_may_take_a_moment_to_hear_it(fake: FakeSlurm, tmp_path: Path) -> None:
    own(tmp_path)
    report(tmp_path, START, 1, 1, "it")
    fake.command("scontrol", RUNS)
    gone, back = (lambda script=script: fake.command("scontrol", script) for script in (GONE, RUNS))
    assert looks(tmp_path, 100, at_20=gone, at_28=back, at_40=gone, at_48=back) == "nothing"


@pytest.mark.parametrize("answer", [RUNS, "echo 'Unable to contact slurm controller' >&2; exit 1"])
def test_a_step_that_does_not_end_is_given_up_in_the_end(fake: FakeSlurm, tmp_path: Path, answer: str) -> None:
    own(tmp_path)
    report(tmp_path, START, 0, 76, "hangs")
    fake.command("scontrol", answer)
    assert looks(tmp_path, 300, most=100) == "100 s: srun has not ended 100 s after a task failed"


@pytest.mark.parametrize("owned", [{"repeat": 0}, {"step": None}])
def test_the_step_of_another_start_is_not_asked_for(
    fake: FakeSlurm, tmp_path: Path, owned: dict[str, int | None]
) -> None:
    own(tmp_path, **owned)  # type: ignore[arg-type]
    report(tmp_path, START, 0, 1, "it")
    fake.command("scontrol", GONE)
    assert looks(tmp_path, 300) == "nothing"
    assert fake.calls("scontrol") == []


def test_a_file_system_that_does_not_answer_for_a_while(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(tmp_path)
    report(tmp_path, START, 0, 1, "it")
    fake.command("scontrol", GONE)

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "stale file handle")

    found, there = srun.reports_of, [True]
    monkeypatch.setattr(srun, "reports_of", lambda *arguments: stale() if there[0] else found(*arguments))
    assert looks(tmp_path, 100, at_50=lambda: there.clear() or there.append(False)).startswith("70 s: Slurm has ended")


def test_what_srun_is_told_where_tasks_start_again() -> None:
    assert srun.again_options({}) == srun.again_options({"SCALEPROG_REPEAT": "0", "SCALEPROG_LOST": ""}) == []
    assert srun.again_options({"SCALEPROG_REPEAT": "2"}) == ["--immediate=300"]
    lost = {"SCALEPROG_REPEAT": "1", "SCALEPROG_LOST": "node1,node2"}
    assert srun.again_options(lost) == ["--exclude=node1,node2", "--overlap", "--immediate=300"]


@pytest.mark.parametrize(("does", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143)])
def test_the_exit_code_is_that_of_srun(fake: FakeSlurm, tmp_path: Path, does: str, code: int) -> None:
    fake.command("srun", does)
    assert attended(tmp_path, "srun", "-n2", "a b").wait() == code
    assert fake.calls("srun") == ["srun -n2 a b"]


@pytest.mark.parametrize("finished", [False, True])
def test_an_srun_that_is_ended_has_a_code_of_its_own_unless_the_run_has_finished(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], finished: bool
) -> None:
    own(tmp_path)
    fake.command("scontrol", GONE)
    for name, value in {"SLURM_JOB_ID": "7", "SCALEPROG_REPEAT": "1"}.items():
        monkeypatch.setenv(name, value)
    if finished:
        monkeypatch.setattr(srun, "read_results", lambda run: {"top1": 80.0})
    patience = srun.Patience(between=0.1, sure=0.1)
    assert srun.attend(tmp_path, ["sleep", "600"], patience, look=0.01) == (0 if finished else UNHEARD)
    assert "and srun has not heard so for 0 s; ended srun\n" in capfd.readouterr().err


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
