"""Profiles: what `scaleprog profile` refuses, asks, and prints; requests; what happens where a profiler fails."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError

from scaleprog.cli import observing
from scaleprog.errors import ScaleprogError
from scaleprog.launchers import status
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.ranks.stop import Agreement, Watch
from scaleprog.recipe.keys import ProfileSettings
from scaleprog.rundir import lease, profiles
from scaleprog.rundir.profiles import Inbox, answer, ask, folder_of, memory_name, trace_name, withdraw
from scaleprog.rundir.recorder import Recorder
from scaleprog.training import profiling
from scaleprog.training.profiling import Profiling, keep_snapshot
from tests.conftest import MakeRecipe, write_lines
from tests.unit.command import Command, is_mistake


@pytest.fixture
def run(tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    """A run directory of two ranks on the CPU."""
    (tmp_path / "recipe.yaml").write_text(make_recipe().dump())
    start = {"time": 1.0, "event": "start", "generation": 1, "step": 0, "world": 2, "device": "cpu"}
    write_lines(tmp_path / "events.jsonl", [start])
    return tmp_path


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The states of a run as they follow each other; the last one stays."""
    states = ["running"]
    monkeypatch.setattr(status, "standing", lambda run: (states.pop(0) if states[1:] else states[0], "", None))
    return states


# ---- the command


def test_only_a_running_run_is_profiled(run: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert is_mistake(command("profile", run), f"{run} is stopped (never started), not running: a profile is of a run")
    (run / "results.json").write_text("{}")
    assert is_mistake(command("profile", run), f"{run} is finished, not running")
    nowhere = tmp_path_factory.mktemp("nowhere")
    assert is_mistake(command("profile", nowhere), str(nowhere), "not a run directory")
    assert not (run / "profiles").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "0,2"], "has the ranks 0 to 1"),
        (["--ranks", "all"], "--ranks 'all' is not a list of ranks, such as 0,7"),
        (["--memory"], "trains on the CPU, and only CUDA's allocator keeps a history; leave out --memory"),
    ],
)  # fmt: skip
def test_what_the_run_cannot_give_is_refused(
    arguments: list[str], message: str, run: Path, running: list[str], command: Command
) -> None:
    assert is_mistake(command("profile", run, *arguments), message)
    assert not (run / "profiles").exists()


def test_the_command_waits_for_all_traces(run: Path, running: list[str], command: Command) -> None:
    requests: list[Any] = []

    def train() -> None:
        inbox = Inbox(run)
        while not inbox.holds_one():
            time.sleep(0.05)
        requests.append(inbox.take(8))
        for rank in (0, 1):
            time.sleep(0.2)
            (folder_of(run, 8) / trace_name(rank)).write_text("")

    rank = threading.Thread(target=train, daemon=True)
    rank.start()
    told = command("profile", run, "--steps=5", "--ranks=1,0,1")
    rank.join(60)
    (taken,) = requests
    assert (taken["steps"], taken["ranks"], taken["memory"]) == (5, [0, 1], False)
    assert told.code == 0
    assert told.out.splitlines() == [str(run / "profiles/step_8" / trace_name(rank)) for rank in (0, 1)]


def test_a_run_that_ends_leaves_no_request(
    run: Path, running: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "ASK_SECONDS", 0.0)
    running.append("finished")
    assert is_mistake(command("profile", run), "is finished, not running: it ended before its profile was written")
    assert not (run / "profiles/request.json").exists()


def test_a_run_that_starts_again_with_a_request_writes_no_trace_for_it(
    run: Path, running: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = iter([SimpleNamespace(generation=generation) for generation in (1, 1, 1, 2)])
    looks: list[int] = []

    def owner(_: Path) -> SimpleNamespace:
        looks.append(1)
        if len(looks) == 2:
            Inbox(run).take(4)
        return next(owners)

    monkeypatch.setattr(lease, "read_owner", owner)
    monkeypatch.setattr(observing, "LOOK_SECONDS", 0.0)
    assert is_mistake(command("profile", run), "has started again before its profile was written; ask again")
    assert len(looks) == 4


def test_a_run_that_cannot_take_a_request_is_not_awaited(
    run: Path, running: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, looks = Inbox(run), []

    def look(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            (run / "profiles/step_8").write_text("in the way")
            assert inbox.take(8) is None
        assert len(looks) < 10

    monkeypatch.setattr(observing, "time", SimpleNamespace(monotonic=time.monotonic, sleep=look))
    told = command("profile", run)
    assert is_mistake(told, f"{run}: the run could not take the request: see its log")
    assert "the request for a profile could not be taken: [Errno 17] File exists" in told.err
    assert len(looks) == 4, "the second look without it"


# ---- requests


def test_one_request_at_a_time(run: Path) -> None:
    first = ask(run, 3, [0], False)
    with pytest.raises(ScaleprogError, match="another profile has been asked for"):
        ask(run, 3, [0], False)
    assert answer(run, first) is None
    withdraw(run, first)
    second = ask(run, 1, [1], False)
    withdraw(run, first)  # which is not this one
    taken = Inbox(run).take(4)
    assert taken == second
    assert answer(run, second) == {}
    assert answer(run, first) is None
    (folder_of(run, 4) / profiles.error_name(1)).write_text("no memory")
    with pytest.raises(ScaleprogError, match="rank 1 could not be profiled: no memory"):
        answer(run, second)


def test_what_an_older_profile_of_the_same_step_left_answers_no_request(run: Path) -> None:
    first = ask(run, 1, [0, 1], memory=True)
    Inbox(run).take(4)
    for name in (trace_name(0), memory_name(0), profiles.error_name(1)):
        (folder_of(run, 4) / name).write_text("old")
    request = ask(run, 1, [0, 1], memory=True)
    Inbox(run).take(4)
    assert answer(run, request) == {}
    assert [path.name for path in folder_of(run, 4).iterdir()] == ["request.json"]
    assert answer(run, first) is None


@pytest.mark.parametrize("text", ["", "[]", '{"id": "x"}', '{"id": "0123456789abcdef", "steps": 0}'])
def test_a_request_that_is_none_is_dropped(text: str, run: Path) -> None:
    path = run / "profiles/request.json"
    path.parent.mkdir()
    path.write_text(text)
    assert Inbox(run).holds_one()
    assert Inbox(run).take(4) is None
    assert not path.exists()


def test_a_request_is_agreed_on_like_a_signal(one_rank: None) -> None:
    asked = iter([False, True, False])
    watch = Watch(Coordinator(), print, print, requested=lambda: next(asked))
    assert [watch.agree() for _ in range(3)] == [Agreement(), Agreement(requested=True), Agreement()]


# ---- one rank


class Told:
    """A recorder of one rank's events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def own_event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


@pytest.fixture
def make(run: Path, one_rank: None) -> Callable[[str], tuple[Profiling, Told]]:
    def made(device: str) -> tuple[Profiling, Told]:
        told = Told()
        return Profiling(run, Coordinator(), cast(Recorder, told), torch.device(device), None), told

    return made


def test_ranks_that_a_later_start_has_not_are_refused(run: Path, make: Callable[[str], tuple[Profiling, Told]]) -> None:
    request = ask(run, 1, [0, 7], False)
    profiler, _ = make("cpu")
    profiler.after(6, profiler.requested())
    with pytest.raises(ScaleprogError, match=r"rank 7 could not be profiled: this start has 1 rank$"):
        answer(run, request)


def test_a_profiler_that_fails_ends_no_run(
    run: Path, make: Callable[[str], tuple[Profiling, Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Kineto is busy")

    monkeypatch.setattr(profiling, "profile", fail)
    request = ask(run, 1, [0], False)
    profiler, told = make("cpu")
    profiler.after(6, profiler.requested())
    profiler.before(7)
    profiler.after(7, False)
    assert told.events == [("profile_failed", {"step": 7, "message": "RuntimeError: Kineto is busy"})]
    with pytest.raises(ScaleprogError, match="Kineto is busy"):
        answer(run, request)


def test_a_planned_profile_that_is_due_during_another_one_fails(run: Path, one_rank: None) -> None:
    told = Told()
    settings = ProfileSettings(at=(8, 12), steps=2)
    profiler = Profiling(run, Coordinator(), cast(Recorder, told), torch.device("cpu"), settings)
    ask(run, 3, [0], False)
    profiler.after(6, profiler.requested())
    for step in range(7, 15):
        profiler.before(step)
        profiler.after(step, False)
    profiled = [(kind, fields["step"], fields.get("message")) for kind, fields in told.events]
    assert profiled == [
        ("profile_failed", 8, "another profile was running"), ("profile", 7, None), ("profile", 12, None)
    ]  # fmt: skip


def test_planned_profiles_that_overlap_are_refused() -> None:
    ProfileSettings(at=(103, 100), steps=3)
    with pytest.raises(ValidationError, match="profile of step 102 would begin before that of step 100, of 3 steps"):
        ProfileSettings(at=(102, 100), steps=3)


class Memory:
    """torch.cuda.memory of a device that this machine does not have."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def _record_memory_history(self, **settings: Any) -> None:
        self.calls.append(settings)

    def _dump_snapshot(self, path: str) -> None:
        Path(path).write_text("snapshot")


def test_memory_is_followed_during_the_profile_only(
    run: Path, make: Callable[[str], tuple[Profiling, Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    monkeypatch.setattr(torch.cuda, "memory", memory)
    ask(run, 2, [0], memory=True)
    profiler, told = make("cuda")
    profiler.after(6, profiler.requested())
    for step in (7, 8, 9):
        profiler.before(step)
        profiler.after(step, False)
    assert memory.calls == [{"max_entries": profiling.MOST_ENTRIES}, {"enabled": None}]
    assert {path.name for path in folder_of(run, 7).iterdir()} == {"request.json", trace_name(0), memory_name(0)}
    assert [kind for kind, _ in told.events] == ["profile"]


@pytest.mark.parametrize("where", ["start", "snapshot"])
def test_no_memory_is_followed_after_a_profile_that_failed(
    where: str, run: Path, make: Callable[[str], tuple[Profiling, Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory()
    monkeypatch.setattr(torch.cuda, "memory", memory)
    if where == "start":
        monkeypatch.setattr(profiling, "profile", lambda **_: 1 / 0)
    else:
        monkeypatch.setattr(Memory, "_dump_snapshot", lambda *_: 1 / 0)
    ask(run, 1, [0], memory=True)
    profiler, told = make("cuda")
    profiler.after(6, profiler.requested())
    profiler.before(7)
    profiler.after(7, False)
    assert memory.calls[-1] == {"enabled": None}
    assert [kind for kind, _ in told.events] == ["profile_failed"]


def test_out_of_device_memory_leaves_a_snapshot(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory", Memory())
    path = keep_snapshot(run, 3, torch.device("cuda"))
    assert path == run / "profiles/out_of_memory/memory_rank_3.pickle"
    assert path.read_text() == "snapshot"
    assert keep_snapshot(run, 3, torch.device("cpu")) is None
    monkeypatch.setattr(Memory, "_dump_snapshot", lambda *_: 1 / 0)
    assert keep_snapshot(run, 3, torch.device("cuda")) is None
