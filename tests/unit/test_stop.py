"""Signals, time limit and clock: seen at once, and agreed upon by all ranks after the same step."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scaleprog.errors import Preempted
from scaleprog.launchers.local import launch
from scaleprog.ranks.coordinator import Coordinator, process_group
from scaleprog.ranks.stop import Agreement, Watch, deadline

pytestmark = pytest.mark.process


class Ears:
    """What a Watch said."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.hurried = threading.Event()
        self.heard = threading.Event()

    def tell(self, name: str) -> None:
        self.told.append(name)
        self.heard.set()


@pytest.fixture
def ears() -> Ears:
    return Ears()


def watch(ears: Ears, every_minutes: float | None = None, end: float | None = None) -> Watch:
    return Watch(Coordinator(), ears.tell, ears.hurried.set, every_minutes, end)


def until(something: Watch) -> Agreement:
    """Steps until the ranks agree on something, as a training loop does."""
    for _ in range(100_000):
        if (agreement := something.agree()) != Agreement():
            return agreement
        time.sleep(0.0001)
    raise AssertionError("nothing was ever agreement")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_is_told_at_once_and_due_after_a_step(name: str, ears: Ears, one_rank: None) -> None:
    before = signal.getsignal(signal.Signals[name])
    with watch(ears) as watching:
        assert watching.agree() == Agreement()
        os.kill(os.getpid(), signal.Signals[name])
        assert ears.heard.wait(10)
        assert until(watching) == Agreement(stop=name)
    assert ears.told == [name]
    assert signal.getsignal(signal.Signals[name]) == before, "handlers are put back"


def test_a_signal_is_seen_while_the_main_thread_is_in_c_code(ears: Ears, one_rank: None) -> None:
    matrix = torch.randn(600, 600)
    with watch(ears):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while not ears.told:
            torch.linalg.matrix_power(matrix, 2**12)  # one long call; the thread is told inside one of them
    assert ears.told == ["SIGTERM"]


def test_an_echo_is_no_second_signal_but_a_later_one_hurries(
    ears: Ears, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watch(ears):
        os.kill(os.getpid(), signal.SIGINT)
        assert ears.heard.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ears.hurried.wait(0.3)
        monkeypatch.setattr("scaleprog.ranks.stop.SECOND_SIGNAL_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ears.hurried.wait(10)
    assert ears.told == ["SIGINT"]


def test_once_the_stop_is_agreed_nothing_hurries_the_checkpoint(
    ears: Ears, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaleprog.ranks.stop.SECOND_SIGNAL_SECONDS", 0.0)
    with watch(ears) as watching:
        os.kill(os.getpid(), signal.SIGTERM)
        assert until(watching).stop == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ears.hurried.wait(0.3)


def test_the_time_limit_stops_early_enough_for_a_checkpoint(ears: Ears, one_rank: None) -> None:
    assert watch(ears, end=time.time() + 3600).agree() == Agreement()
    assert until(watch(ears, end=time.time() + 29)) == Agreement(stop="time limit"), "half a minute before the end"
    slow = watch(ears, end=time.time() + 3600)
    slow.saved(seconds=1300)
    assert until(slow) == Agreement(stop="time limit"), "three times what the last checkpoint took"


def test_a_checkpoint_is_due_by_the_clock_and_then_not_again(
    ears: Ears, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("scaleprog.ranks.stop.time", SimpleNamespace(**vars(time) | {"monotonic": lambda: now}))
    watching = watch(ears, every_minutes=1)
    assert watching.agree() == Agreement()
    now = 60.0
    assert until(watching) == Agreement(save=True)
    watching.saved()
    watching.save_every(3600.0)
    assert all(watching.agree() == Agreement() for _ in range(5000))


def test_the_end_of_a_job_is_read_from_slurms_environment() -> None:
    assert deadline({"SLURM_JOB_END_TIME": "1795470000"}) == 1795470000
    assert deadline({}) is None
    assert deadline({"SLURM_JOB_END_TIME": "Unknown"}) is None


@pytest.mark.parametrize("end", [3600.0, None])
def test_a_time_limit_that_has_been_extended_is_not_acted_upon(end: float | None, one_rank: None) -> None:
    asked = threading.Event()

    def deadline_now() -> float | None:
        asked.set()
        return None if end is None else time.time() + end

    watching = Watch(Coordinator(), print, print, deadline=time.time() + 60, deadline_now=deadline_now)
    assert watching.agree() == Agreement()  # there are still 30 s
    assert asked.wait(60)
    while threading.active_count() > 1 and any(thread.name == "deadline" for thread in threading.enumerate()):
        time.sleep(0.01)
    watching.saved(100.0)  # now the first deadline would leave no time
    assert watching.agree() == Agreement()


def test_a_time_limit_that_stays_is_acted_upon(one_rank: None) -> None:
    end = time.time() + 1
    watching = Watch(Coordinator(), print, print, deadline=end, deadline_now=lambda: end)
    assert watching.agree() == Agreement(stop="time limit")


def step_until_stopped(folder: Path, signalled: int, name: str, end_in: float | None) -> None:
    """What a rank of the test below does; only one of them is signalled."""
    with process_group() as (coordinator, _):
        end = None if end_in is None else time.time() + end_in
        watching = Watch(coordinator, lambda _: None, lambda: None, 0.02 / 60, end)
        saves = []
        with watching:
            for step in range(1, 20_000):
                time.sleep(0.001 * (1 + coordinator.rank))
                if step == 50 and coordinator.rank == signalled:
                    os.kill(os.getpid(), signal.Signals[name])
                agreement = watching.agree()
                if agreement.save:
                    saves.append(step)
                    watching.saved()
                if agreement.stop:
                    (folder / f"{coordinator.rank}.json").write_text(json.dumps([step, agreement.stop, saves]))
                    raise Preempted(f"stopped by {agreement.stop}")


@pytest.mark.parametrize(
    ("signalled", "name", "end_in"), [(1, "SIGTERM", None), (0, "SIGUSR2", None), (-1, "time limit", 31.0)]
)
def test_all_ranks_stop_and_save_after_the_same_step(
    signalled: int, name: str, end_in: float | None, tmp_path: Path
) -> None:
    with pytest.raises(Preempted, match=f"stopped by {name}"):
        launch(2, step_until_stopped, tmp_path, signalled, name, end_in)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    step, reason, saves = first
    assert reason == name
    assert saves
    assert signalled < 0 or step >= 50
