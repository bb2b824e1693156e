"""Run directories of anybody: every command says plainly what it cannot read, and none fails or hangs on it."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.figures import draw_cloud
from scaleprog.cli.training import write_speedup
from scaleprog.data.augment import BatchRequest
from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.files.display import as_text
from scaleprog.growth.space import Subnet, View
from scaleprog.launchers import attempt, requeue, status
from scaleprog.reporting import history, report
from scaleprog.reporting.figures import draw_accuracy, draw_schedules, draw_searches
from scaleprog.reporting.timeline import describe, read_timeline, table_row
from scaleprog.rundir.reading import read_object, read_results, read_rows, to_line
from scaleprog.rundir.records import Results
from scaleprog.training.between_steps import _half_measured
from tests.conftest import MakeRecipe, write_lines
from tests.unit import hostile
from tests.unit.command import Command
from tests.unit.fake_slurm import FakeSlurm
from tests.unit.test_recorder import recorder, train

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
again = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=50
)
few = settings(again, max_examples=8)
Files = dict[str, bytes]
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u200b]")


@pytest.fixture
def recipe_text(make_recipe: MakeRecipe) -> str:
    return make_recipe(growth={"schedule": "automatic", "stages": 3}).dump()


@pytest.fixture
def new_run(tmp_path_factory: pytest.TempPathFactory, recipe_text: str) -> Any:
    """Makes a run directory of a recipe that is in order."""

    def make(files: Files) -> Path:
        files = {"plan.json": json.dumps(hostile.PLAN).encode(), **files}
        run = hostile.lay_down(tmp_path_factory.mktemp("run"), files)
        (run / "recipe.yaml").write_text(recipe_text)
        return run

    return make


# ---- status


@again
@given(hostile.run_directories)
def test_status_of_any_run_directory(new_run: Any, fake: FakeSlurm, files: Files) -> None:
    found = status.status(new_run({name: content for name, content in files.items() if name != "owner.json"}))
    lines = found.text().splitlines()
    assert all(re.match(r"  [a-z0-9- ]{10} ", line) for line in lines[1:]), "no line that a file has made up"
    assert not CONTROL.search(found.text())
    told = json.loads(json.dumps(vars(found) | {"restarts": list(map(vars, found.restarts))}, allow_nan=False))
    assert told["step"] == found.step
    json.dumps(found.text()).encode()


def test_status_says_what_was_left_out(new_run: Any, command: Command, fake: FakeSlurm) -> None:
    rows = b"".join(to_line(row) for row in (hostile.STEP, hostile.STEP | {"step": -1}))
    run = new_run({"metrics.jsonl": rows, "events.jsonl": b"{}\n[]\n", "job.json": b'{"job": "--help"}'})
    told = command("status", run)
    assert told.code == 0
    assert "left out   metrics.jsonl: 1 line of 2 is not a record" in told.out
    assert "left out   events.jsonl: 2 lines of 2 are not records" in told.out
    assert "job.json: not readable" in told.out
    assert len(json.loads(command("status", run, "--json").out)["troubles"]) == 3


@pytest.mark.parametrize("kind", hostile.IN_THE_WAY)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "requeues.jsonl", "job.json", "results.json", "plan.json"]
)
def test_status_where_something_else_lies(kind: str, name: str, new_run: Any, fake: FakeSlurm) -> None:
    run = new_run({})
    hostile.put_in_the_way(run / name, kind)
    status.status(run).text()


def test_of_a_long_record_only_the_end_is_read(new_run: Any, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LAST_BYTES", 2**16)
    run = new_run({})
    rows = b"".join(to_line(hostile.STEP | {"step": i}) for i in range(2000))
    assert len(rows) > 2**16
    (run / "metrics.jsonl").write_bytes(b"no record\n" + rows)
    found = status.status(run)
    assert (found.step, list(found.troubles)) == (1999, [])


def test_choices_that_no_search_makes_are_not_believed(new_run: Any) -> None:
    small = {"candidates": [[16, 2], [32, 4]], "chosen": [16, 2], "alpha": None, "step": 1, "time": 1e9}
    for takeover in (0, 1, -5, 10**15):
        choices = [hostile.CHOICE | small | {"stage": stage, "complete_from": takeover} for stage in range(9)]
        run = new_run({"events.jsonl": b"".join(map(to_line, choices)), "metrics.jsonl": to_line(hostile.STEP)})
        assert status.status(run).steps == 80


@pytest.mark.parametrize("seconds", [0.0, 5e-324])
def test_steps_that_took_no_time(seconds: float, new_run: Any) -> None:
    row = hostile.STEP | {"step_seconds": seconds, "data_wait_seconds": 0.0, "images": 2**53}
    found = status.status(new_run({"metrics.jsonl": to_line(row)}))
    assert found.images_per_second is None
    json.dumps(found.seconds_left, allow_nan=False)


# ---- report


@again
@given(hostile.run_directories, hostile.run_directories)
def test_report_of_any_run_directory(
    new_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: Files, second: Files
) -> None:
    monkeypatch.setattr(report, "_draw", lambda told, *_: [run.timeline for run in told if run.timeline])
    runs = [new_run(files) for files in (first, second)]
    with suppress(CheckpointError):
        told = report.write_report(runs, tmp_path / "out")
        written = (tmp_path / "out" / "report.md").read_text()
        assert not CONTROL.search(told + written)
        assert "<" not in written
        assert "nan" not in written.replace("NaN", "")


@few
@given(hostile.run_directories)
def test_pictures_of_any_run_directory(new_run: Any, tmp_path: Path, files: Files) -> None:
    with suppress(CheckpointError):
        report.write_report([new_run(files)], tmp_path / "out")


NAMES = ["$\\frac{1$", "_x", "$_{", "<b>|`[", "\x1b[31m", "日本", "x" * 200, os.fsdecode(b"\xff")]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_drawn_and_is_shown(name: str, new_run: Any, tmp_path: Path) -> None:
    run = new_run({"metrics.jsonl": to_line(hostile.STEP) + to_line(hostile.METRICS[1]), "events.jsonl": b""})
    write_lines(run / "events.jsonl", [{"time": 1e9, "step": 0} | event for event in hostile.EVENTS])
    folder = run.rename(run.with_name(name))
    told = report.write_report([folder], tmp_path / "out")
    assert as_text(name) in told
    assert not CONTROL.search((tmp_path / "out" / "report.md").read_text())


def test_long_histories_are_drawn_in_part(new_run: Any, tmp_path: Path) -> None:
    rows = [
        hostile.STEP | {"step": i, "stage": i % 2, "resolution": 1 + i % 5000, "time": 1e9 + i, "loss": 1.0}
        for i in range(8000)
    ]
    events = []
    for i in range(1000):
        events.append(hostile.EVENTS[0] | {"time": 1e9 + i, "step": i, "generation": i})
        events.append(hostile.CHOICE | {"time": 1e9 + i, "step": i, "generation": i, "stage": i})
        events.append({"event": "error", "message": "x: y", "time": 1e9 + i, "generation": i})
    run = new_run({})
    write_lines(run / "metrics.jsonl", rows)
    write_lines(run / "events.jsonl", events)
    report.write_report([run], tmp_path / "out")
    assert "900 more" in (tmp_path / "out" / "report.md").read_text()


def test_many_runs_and_no_runs_fit_into_pictures(tmp_path: Path) -> None:
    draw_schedules(tmp_path / "a.png", [(f"_run {i}", []) for i in range(700)])
    draw_schedules(tmp_path / "b.png", [])
    draw_accuracy(tmp_path / "c.png", [])
    draw_searches(tmp_path / "d.png", {"a": [history.Search(1, (), {}, None)]})
    draw_cloud(tmp_path / "e.png", [("$x", 1.0, 2.0)])


@again
@given(st.lists(st.sampled_from([0.0, 5.0, 1e9, 1e9 + 50, 2.0**33]), min_size=8, max_size=8), st.integers(0, 3))
def test_a_clock_that_was_set_back_makes_nothing_negative(tmp_path: Path, times: list[float], twice: int) -> None:
    events = [
        {"time": time, "event": kind, "step": step, "generation": i // 2 + (i > 3) * twice, "message": "x", "rank": 0}
        | ({"startup_seconds": 3.0, "repeated_steps": 4, "repeated_until": times[0]} if kind == "start" else {})
        for i, (time, kind, step) in enumerate(zip(times, ["start", "error"] * 4, [0, 9, 5, 9, 3, 4, 7, 8]))
    ]
    rows = [hostile.STEP | {"step": 1 + i, "time": time} for i, time in enumerate(times)]
    write_lines(tmp_path / "requeues.jsonl", [hostile.LEFT | {"time": time} for time in times])
    timeline = read_timeline(tmp_path, "run", rows, events)
    assert timeline is not None
    for before, start in zip([None, *timeline.starts], timeline.starts):
        assert (before.end if before else 0.0) <= start.began <= start.ready <= start.end
        assert all(seconds >= 0 for seconds, _ in start.points)
        assert all(0 <= stretch.begin <= stretch.end for stretch in start.stretches)
    assert all(mark.seconds >= 0 for mark in timeline.marks)
    assert all(cost is None or 0 <= cost < 1e11 for cost in timeline.costs.values())
    table_row(timeline)
    describe(timeline, events)


# ---- requeue


@again
@given(hostile.run_directories, st.sampled_from(["1", "2", "75", "137", "143"]))
def test_requeue_decides_whatever_lies_there(
    new_run: Any, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, files: Files, code: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(requeue, "PAUSES", ())
    monkeypatch.setattr(requeue.slurm_queue, "find", lambda job: requeue.slurm_queue.Job(job, "n", "RUNNING"))
    monkeypatch.setattr(requeue.slurm_queue, "requeue", lambda job: None)
    monkeypatch.setattr(requeue, "_say", lambda text: said.append(text))
    said: list[str] = []
    run = new_run(files)
    assert requeue._main(str(run), code, "20") in (1, 2, 75, 137, 143)
    assert said[-1].startswith("job 7 ")
    assert "cannot decide" not in "".join(said)


@pytest.mark.parametrize("kind", hostile.IN_THE_WAY)
@pytest.mark.parametrize(
    "name",
    ["requeues.jsonl", "events.jsonl", "job.json", "owner.json", "measuring.json", "jobs", "jobs/reports",
     "jobs/reports/7-0-0.json", "checkpoints"],
)  # fmt: skip
def test_requeue_where_something_else_lies(
    kind: str, name: str, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    hostile.put_in_the_way(tmp_path / "run" / name, kind)
    attempt.report(tmp_path / "run", attempt.Attempt("7", 0), 0, 75, "stopped", "SIGTERM")
    assert requeue._main(str(tmp_path / "run"), "75", "20") == 75
    assert "job 7 starts again" in capsys.readouterr().err
    assert fake.calls("scontrol")[-1] == "scontrol requeue 7"


@pytest.mark.parametrize(
    ("variables", "limit", "code", "told"),
    [
        ({}, "20", 137, "SLURM_JOB_ID is '', so this is not a Slurm job; scaleprog restarts nothing"),
        ({"SLURM_JOB_ID": "--all"}, "20", 137, "SLURM_JOB_ID is '--all'"),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "many"}, "20", 137, "job 7 starts again"),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "²"}, "20", 137, "job 7 starts again"),
        ({"SLURM_JOB_ID": "7"}, "many", 137, "MAX_RESTARTS 'many' is not a number; using 20\nscaleprog: a task was"),
    ],
)
def test_requeue_by_any_variables(variables: dict[str, str], limit: str, code: int, told: str, fake: FakeSlurm,
                                  tmp_path: Path) -> None:  # fmt: skip
    command = [sys.executable, "-m", "scaleprog.launchers.requeue", str(tmp_path), "137", limit]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


# ---- train


@again
@given(hostile.run_directories, st.integers(0, 20), st.booleans())
def test_a_start_on_any_record(new_run: Any, files: Files, step: int, two: bool) -> None:
    run = new_run(files)
    honest = [row for row in read_rows(run / "metrics.jsonl") if type(row.get("step")) is int and row["step"] <= step]
    record = recorder(run, world=1 + two, step=step)
    assert record.lost["repeated_steps"] >= 0
    assert all(cost >= 0 for cost in record.lost.values())
    kept = read_rows(run / "metrics.jsonl")
    train(record, step + 1, step + 2)
    record.close()
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows[-2:]] == [step + 1, step + 2]
    known = {json.dumps(row) for row in honest}
    assert all(json.dumps(row) in known for row in kept)
    assert all(row["step"] <= step for row in kept)
    read_results(run)


@again
@given(
    st.integers(-1, 9) | hostile.values, st.lists(st.lists(hostile.values, max_size=2), max_size=3) | hostile.values,
    st.sampled_from([1, 2]),
)  # fmt: skip
def test_half_a_measurement_is_taken_up_only_as_it_was_left(tmp_path: Path, done: Any, losses: Any, world: int) -> None:
    """Five batches of `world` images, one on each rank."""
    targets, requests = [Subnet(16, 2)], [BatchRequest(0, i, 16) for i in range(5)]
    ranks = SimpleNamespace(world=world, rank=world - 1, decide=lambda _, what: what())
    run: Any = SimpleNamespace(
        folder=tmp_path, state=SimpleNamespace(step=7), coordinator=ranks,
        recipe=SimpleNamespace(train=SimpleNamespace(batch=world)),
        plan=SimpleNamespace(schedule=SimpleNamespace(view=lambda subnet: View(subnet.resolution))),
    )  # fmt: skip
    where = {"step": 7, "networks": [[16, 2]], "ranks": world}
    (tmp_path / "measuring.json").write_bytes(hostile.dumps({"where": where, "done": done, "losses": losses}))
    begun, found = _half_measured(run, targets, requests)
    assert 0 <= begun < 5
    assert list(found) == targets
    assert len(found[targets[0]]) == begun
    assert all(map(math.isfinite, found[targets[0]]))
    kept = {"where": where, "done": 3, "losses": [[[2.5, 1.0, 0.5]]] * world}
    (tmp_path / "measuring.json").write_bytes(hostile.dumps(kept))
    assert _half_measured(run, targets, requests) == (3, {targets[0]: [2.5, 1.0, 0.5]})
    assert _half_measured(run, targets, requests[:3]) == (0, {targets[0]: []})
    (tmp_path / "measuring.json").write_bytes(hostile.dumps(kept | {"done": 2}))
    assert _half_measured(run, targets, requests) == (0, {targets[0]: []})


def test_other_rows_stay_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = (
        b'{"step":1,   "loss": 1.50, "new": {"a": [1]}}\n',
        b'{"step": 2, "top1": "x"}\n',
        b'{"step": 3, "loss": NaN}\n',
    )
    gone = b"\xff\xfe\n", b'{"step": -1}\n', b"[1]\n", b'{"step": 4, "loss": 1}'
    path.write_bytes(b"".join([gone[0], kept[0], gone[1], kept[1], gone[2], kept[2], gone[3]]))
    recorder(tmp_path, step=3).close()
    assert path.read_bytes() == b"".join(kept)


@pytest.mark.parametrize(
    ("kind", "name"),
    sorted({*product(
        ["fifo", "directory", "loop", "endless", "sparse"],
        ["metrics.jsonl", "events.jsonl", "samples-0.jsonl", "rank_0"],
    )} - {("directory", "rank_0"), ("sparse", "events.jsonl"), ("sparse", "samples-0.jsonl")}),  # nothing in the way
)  # fmt: skip
def test_a_start_where_something_else_lies(kind: str, name: str, tmp_path: Path) -> None:
    hostile.put_in_the_way(tmp_path / name, kind)
    with pytest.raises(ScaleprogError, match=f"{name}.*: cannot record there: .*; (move|fix)"):
        recorder(tmp_path, world=2).samples(1, [1])


def test_a_record_that_links_elsewhere_is_not_written_to(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("of somebody else\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").symlink_to(theirs)
    (tmp_path / "run" / f".metrics.jsonl.{os.getpid()}").symlink_to(theirs)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CheckpointError, match="move it away"):
        recorder(tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").unlink()
    recorder(tmp_path / "run", step=1).close()
    assert theirs.read_text() == "of somebody else\n"


# ---- the command line


@pytest.mark.parametrize("name", [hostile.ESCAPES[:30].replace("/", ""), os.fsdecode(b"\xff\xfe"), "[bold]x[bold]"])
@pytest.mark.parametrize("what", ["status", "report", "cancel", "evaluate"])
def test_names_in_messages_are_text(what: str, name: str, command: Command, tmp_path: Path) -> None:
    more = ("--out", tmp_path / "out") if what == "report" else ()
    (tmp_path / name).mkdir()
    told = command(what, tmp_path / name, *more)
    assert told.code == 2
    assert as_text(name) in told.err
    assert not CONTROL.search(told.err)
    assert "Traceback" not in told.err


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"[" * 99_999, b'{"train_seconds": 0}', b'{"train_seconds": -1}'])
def test_a_baseline_may_be_anything(content: bytes, command: Command, write_recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    told = command("train", write_recipe(), "--baseline", tmp_path, "--run-dir", tmp_path / "run")
    assert told.code == 2
    assert "not a run's results.json" in told.err
    assert not (tmp_path / "run").exists()


def test_a_run_that_trained_in_no_time_has_no_speedup(tmp_path: Path) -> None:
    results: Any = hostile.RESULTS | {"train_seconds": 0.0, "new": [1]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    told = read_object(tmp_path / "results.json", Results)
    assert told is not None
    write_speedup(tmp_path / "results.json", told, 3.0)
    assert json.loads((tmp_path / "results.json").read_text()) == results
