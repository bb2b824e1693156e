"""Trackers: what a sender sends of a run's records, to stubs, to MLflow's own server, and to wandb offline."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scaleprog.errors import InUse, RecipeError, Unavailable
from scaleprog.files.display import LINE
from scaleprog.recipe import extras
from scaleprog.rundir import sending
from scaleprog.rundir.drawn import points
from scaleprog.rundir.recorder import read_rows
from scaleprog.rundir.sending import Sender, alone, keep_sending, send_now
from scaleprog.rundir.trackers import MOST_PARAMETERS, TRACKERS, MLflow, Point, Shown
from tests.conftest import MakeRecipe, write_lines
from tests.tracked import Curves, MLflowServer, mlflow_server, wandb_curves  # noqa: F401
from tests.unit.command import Command, is_mistake

STEP = {"phase": "train", "stage": 1, "images": 8, "lr": 0.1, "data_wait_seconds": 0.0}


def test_an_error_tells_no_password() -> None:
    error = RuntimeError("API request to https://me:secret@host/api failed\nmore")
    assert sending._reason(error) == "RuntimeError: API request to https://***@host/api failed"
    cut_off = sending._reason(RuntimeError(f"{'x' * (LINE - 20)} https://me:secret@a.host"))
    assert "https://***@" in cut_off, "also where the line is cut within the URL"


class Stub:
    """A tracker that keeps what it is sent; `broken` makes its next calls fail."""

    keeps = True
    session: str | None = None
    got: list[Point]
    opened: list[Any]
    texts: list[str]
    broken = 0
    closed: list[bool]

    def open(self, run: Shown, known: str | None, unclosed: str | None) -> tuple[str, int]:
        self.fail()
        self.opened.append((run.id, known, unclosed))
        return "its number", -1

    def scalars(self, points: Sequence[Point]) -> None:
        self.fail()
        self.got.extend(points)

    def describe(self, text: str) -> None:
        self.texts.append(text)

    def close(self, finished: bool) -> None:
        self.fail()
        self.closed.append(finished)

    def fail(self) -> None:
        if type(self).broken:
            type(self).broken -= 1
            raise ConnectionError("nobody there")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    kind = type("Kind", (Stub,), {"got": [], "opened": [], "texts": [], "closed": []})
    monkeypatch.setitem(TRACKERS, "mlflow", kind)
    return kind


@pytest.fixture
def run(tmp_path: Path, make_recipe: MakeRecipe) -> Path:
    """A run directory with a recipe only."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(make_recipe().dump())
    return folder


def trained(run: Path, last: int, checkpoint: int, offset: float = 0.0, evaluated: Sequence[int] = ()) -> None:
    """Makes the run one that has trained so many steps; `offset` is added to each loss."""
    rows: list[dict[str, Any]] = []
    for step in range(1, last + 1):
        rows.append({"step": step, **STEP, "loss": 1 / step + offset, "time": 1e9 + step})
        rows += [{"step": step, "top1": 50.0 + step, "top1_ema": 50.0}] if step in evaluated else []
    write_lines(run / ".new", rows)
    (run / ".new").rename(run / "metrics.jsonl")  # as a start does: a new file
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / f"checkpoints/step-{checkpoint:08d}").mkdir(parents=True)


def of_records(run: Path, log_every: int, last: float = 1e9) -> Curves:
    """The curves that a tracker should have."""
    curves: Curves = {}
    for row in read_rows(run / "metrics.jsonl"):
        if row["step"] <= last and ("phase" not in row or row["step"] % log_every == 0):
            for tag, value in points(row).items():
                curves.setdefault(tag, []).append((row["step"], value))
    return curves


def as_curves(got: Sequence[Point]) -> Curves:
    curves: Curves = {}
    for point in got:
        for tag, value in point.values.items():
            curves.setdefault(tag, []).append((point.step, value))
    return curves


def test_only_what_no_restart_takes_back_is_sent_and_each_step_once(run: Path, stub: type[Stub]) -> None:
    trained(run, last=11, checkpoint=6, evaluated=(4, 6))
    assert send_now(run, "mlflow", 2) == 5
    assert as_curves(stub.got) == of_records(run, 2, last=5)
    assert ("validation/top1", [(4, 54.0)]) in as_curves(stub.got).items(), "that of step 6 may be measured again"
    trained(run, last=12, checkpoint=9, offset=1e-9, evaluated=(4, 6, 12))  # after the checkpoint, others than before
    assert send_now(run, "mlflow", 2) == 8
    (run / "results.json").write_text("{}")
    assert send_now(run, "mlflow", 2) == 12
    steps = {tag: [step for step, _ in curve] for tag, curve in as_curves(stub.got).items()}
    assert steps["train/loss"] == [2, 4, 6, 8, 10, 12]
    assert steps["validation/top1"] == [4, 6, 12]
    assert len({number for number, _, _ in stub.opened}) == 1, "the same run"
    assert [known for _, known, _ in stub.opened] == [None, "its number", "its number"]
    assert stub.closed == [False, False, True]


def test_an_evaluation_has_the_time_of_its_step(run: Path, stub: type[Stub]) -> None:
    trained(run, last=8, checkpoint=8, evaluated=(4, 6))
    (run / "results.json").write_text("{}")
    send_now(run, "mlflow", 3)
    assert [(point.step, point.moment) for point in stub.got] == [(step, 1e9 + step) for step in (3, 4, 6, 6)]


def test_what_a_tracker_refuses_is_sent_again(run: Path, stub: type[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "MOST_STEPS", 4)
    trained(run, last=30, checkpoint=30)
    stub.broken = 1
    with pytest.raises(Unavailable, match="mlflow: ConnectionError: nobody there; nothing is lost"):
        send_now(run, "mlflow", 1)
    sender = Sender(run, "mlflow", 1)
    sender.send()
    (run / "results.json").write_text("{}")
    stub.broken = 1
    with pytest.raises(ConnectionError):
        sender.send()
    sender.send()
    assert as_curves(stub.got) == of_records(run, 1)


def test_a_tracker_that_is_down_stops_nothing_and_gets_all(run: Path, stub: type[Stub], capfd: Any) -> None:
    trained(run, last=20, checkpoint=10)
    stub.broken = 3
    pauses: list[float] = []

    def ends(seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 5

    assert keep_sending(run, "mlflow", 1, 1, ends)
    assert as_curves(stub.got) == of_records(run, 1, last=9)
    assert pauses[:4] == [4, 8, 16, 2]
    assert capfd.readouterr().err.count("nobody there; training continues") == 1


def test_a_tracker_that_is_still_down_at_the_end_is_left(run: Path, stub: type[Stub]) -> None:
    trained(run, last=20, checkpoint=10)
    stub.broken = 100
    assert not keep_sending(run, "mlflow", 1, 1, lambda seconds: True)
    assert stub.broken == 98, "one attempt before the end, and one at the end"
    stub.broken = 0
    assert send_now(run, "mlflow", 1) == 9


def test_a_killed_session_that_keeps_nothing_is_sent_again(run: Path, stub: type[Stub]) -> None:
    stub.keeps, stub.session = False, "offline-run-1"
    trained(run, last=20, checkpoint=10)
    killed = Sender(run, "mlflow", 1)
    killed.send()
    stub.got.clear()
    trained(run, last=20, checkpoint=15)
    again = Sender(run, "mlflow", 1)
    again.send()
    again.close()
    assert as_curves(stub.got) == of_records(run, 1, last=14)
    assert [unclosed for _, _, unclosed in stub.opened] == [None, "offline-run-1"]
    assert send_now(run, "mlflow", 1) == 14
    assert len(stub.opened) == 2, "there was nothing to send"
    trained(run, last=20, checkpoint=17)
    Sender(run, "mlflow", 1).send()
    assert stub.opened[-1][2] is None, "it was closed"
    stub.got[:] = [point for point in stub.got if point.step < 15]
    assert as_curves(stub.got) == of_records(run, 1, last=14)


def test_one_process_at_a_time_sends(run: Path, stub: type[Stub]) -> None:
    with alone(run, "mlflow", 0), pytest.raises(InUse, match="is being sent to mlflow by another process"):
        send_now(run, "mlflow", 1)


def test_a_later_start_ends_the_sender_of_an_earlier_one(run: Path, stub: type[Stub]) -> None:
    owner = {"generation": 2, "nonce": "a", "job": None, "restart": 0, "host": "h", "pid": 1, "started": None}
    (run / "owner.json").write_text(json.dumps(owner))
    assert not keep_sending(run, "mlflow", 1, 1, lambda seconds: False)


def test_a_torn_or_foreign_line_is_passed_over(run: Path, stub: type[Stub]) -> None:
    trained(run, last=4, checkpoint=9)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('no row\n{"step": 5, "phase": "train", "loss": 1.0}\n{"step": 6, "lo')
    assert send_now(run, "mlflow", 1) == 5


def test_a_tracker_that_is_not_installed_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, make_recipe: MakeRecipe
) -> None:
    monkeypatch.setattr(extras, "is_installed", lambda module: False)
    with pytest.raises(RecipeError, match=r"tracking: wandb is not installed: pip install 'scaleprog\[wandb\]'"):
        extras.check_extras(make_recipe(tracking=["wandb"]))
    extras.check_extras(make_recipe())


def test_a_folder_of_its_name_is_no_installed_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the folder `wandb` that a run without scaleprog has left in the working directory."""
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not extras.is_installed("a_tracker")
    (tmp_path / "a_tracker" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert extras.is_installed("a_tracker")


def test_a_tracker_that_nobody_knows_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"tracking.0: Input should be 'mlflow' or 'wandb', got 'neptune'"):
        make_recipe(tracking=["neptune"])


def test_a_sender_imports_no_torch() -> None:
    check = "import sys, scaleprog.rundir.sending; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# ---- the services themselves


@pytest.mark.process
def test_mlflow_has_the_curves_of_the_records_after_an_outage(run: Path, mlflow_server: MLflowServer) -> None:  # noqa: F811
    trained(run, last=8, checkpoint=5, evaluated=(4,))
    send_now(run, "mlflow", 1)
    mlflow_server.stop()
    trained(run, last=12, checkpoint=10, evaluated=(4,))
    with pytest.raises(Unavailable, match="nothing is lost"):
        send_now(run, "mlflow", 1)
    mlflow_server.start()
    position = (run / "tracking/mlflow.json").read_text()
    send_now(run, "mlflow", 1)
    (run / "tracking/mlflow.json").write_text(position)  # as if the answer had been lost
    send_now(run, "mlflow", 1)
    (run / "results.json").write_text("{}")
    send_now(run, "mlflow", 1)
    assert mlflow_server.curves("run") == {tag: sorted(curve) for tag, curve in of_records(run, 1).items()}


class Client:
    """MLflow's client of a server with one run, of which no parameter can change."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def update_run(self, run: str, status: str) -> None:
        assert (run, status) == ("one", "RUNNING")

    def get_run(self, run: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.params)))

    def log_batch(self, run: str, params: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        assert max(len(params), len(tags)) <= MOST_PARAMETERS
        assert not self.params.keys() & {param.key for param in params}
        self.params |= {param.key: param.value for param in params}
        self.tags |= {tag.key: tag.value for tag in tags}


def test_mlflow_shows_what_a_longer_recipe_changes_as_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")  # not one in the working directory
    client, tracker = Client(), MLflow()
    monkeypatch.setattr(tracker, "_client", client)
    settings = {f"data.{number}": number for number in range(150)}
    for epochs in (1, 1, 2):
        shown = Shown(tmp_path, "0" * 16, "run", settings | {"train.epochs": epochs})
        assert tracker.open(shown, "one", None) == ("one", -1)
        assert len(client.params) == 151
        assert client.params["train.epochs"] == "1"
        assert client.tags == ({} if epochs == 1 else {"train.epochs": "2"})


@pytest.mark.process
def test_wandb_offline_has_the_curves_of_the_records(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [sys.executable, "-c", "import sys, time; from pathlib import Path\n"
             "from scaleprog.rundir.sending import Sender, send_now\n"
             "run, kill = Path(sys.argv[1]), len(sys.argv) > 2\n"
             "if kill: Sender(run, 'wandb', 1).send(); import os; os.kill(os.getpid(), 9)\n"
             "send_now(run, 'wandb', 1)"]  # fmt: skip
    trained(run, last=8, checkpoint=5, evaluated=(4,))
    subprocess.run([*words, str(run)], check=True)
    trained(run, last=12, checkpoint=9, evaluated=(4,))
    assert subprocess.run([*words, str(run), "kill"]).returncode == -9
    trained(run, last=12, checkpoint=12, evaluated=(4,))
    (run / "results.json").write_text("{}")
    subprocess.run([*words, str(run)], check=True)
    ids, curves = wandb_curves(run)
    assert curves == of_records(run, 1)
    assert len(ids) == 1


# ---- the command


def test_track_sends_a_run_that_was_trained_without_trackers(run: Path, stub: type[Stub], command: Command) -> None:
    trained(run, last=20, checkpoint=20)
    (run / "results.json").write_text("{}")
    told = command("track", run, "mlflow")
    assert (told.code, told.out) == (0, f"{run}: mlflow has everything up to step 20\n")
    assert as_curves(stub.got) == of_records(run, 5)
    assert stub.closed == [True]
    assert command("track", run, "mlflow").code == 0
    assert len(stub.opened) == 1


def test_a_run_is_not_said_to_be_where_it_was_never_sent(
    run: Path, stub: type[Stub], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(run, last=20, checkpoint=20)
    stub.place = ("MLFLOW_TRACKING_URI",)  # type: ignore[attr-defined]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@first")
    assert command("track", run, "mlflow").code == 0
    assert "secret" not in (run / "tracking/mlflow.json").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@second")
    told = command("track", run, "mlflow")
    assert is_mistake(told, "mlflow has this run elsewhere: MLFLOW_TRACKING_URI", f"delete {run}/tracking/mlflow.json")
    (run / "tracking/mlflow.json").unlink()
    stub.got.clear()
    assert command("track", run, "mlflow").code == 0
    assert as_curves(stub.got) == of_records(run, 5, 19)


def test_track_sends_what_the_latest_start_would(run: Path, stub: type[Stub], command: Command) -> None:
    """recipe.yaml is that of the first start, which had no tracker and other points."""
    trained(run, last=20, checkpoint=20)
    starts = [{"time": 1.0, "event": "start", "step": 0}]
    starts.append({**starts[0], "time": 2.0, "tracking": ["mlflow"], "log_every": 2})
    write_lines(run / "events.jsonl", starts)
    (run / "results.json").write_text("{}")
    assert command("track", run).out == f"{run}: mlflow has everything up to step 20\n"
    assert as_curves(stub.got) == of_records(run, 2)


def test_what_cannot_be_tracked_is_refused(
    run: Path, stub: type[Stub], command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert is_mistake(command("track", run), f"{run}: its recipe names no tracker; name one: mlflow, wandb")
    assert is_mistake(command("track", run, "neptune"), "'neptune' is not a tracker; scaleprog knows mlflow, wandb")
    assert is_mistake(command("track", tmp_path / "nowhere", "mlflow"), "nowhere: not a run directory")
    (run / "tracking").symlink_to(tmp_path)
    assert is_mistake(command("track", run, "mlflow"), f"{run}/tracking: a symbolic link")
    monkeypatch.setattr(extras, "is_installed", lambda module: False)
    assert is_mistake(command("track", run, "mlflow"), "mlflow is not installed: pip install 'scaleprog[mlflow]'")
    assert stub.opened == []
