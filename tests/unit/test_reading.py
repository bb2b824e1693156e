"""The one reader of records: what gets through is what it should be; the rest is counted, whatever it is."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from scaleprog.errors import CheckpointError
from scaleprog.rundir.reading import read, read_object, read_rows, to_line
from scaleprog.rundir.records import EVENT, LEFT, METRIC, Baseline, Job, Report, Results
from tests.unit import hostile

HONEST: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "metrics.jsonl": (METRIC, hostile.METRICS),
    "events.jsonl": (EVENT, [{"time": 1e9, "step": 7, "generation": 1} | event for event in hostile.EVENTS]),
    "requeues.jsonl": (LEFT, [hostile.LEFT]),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_records_get_through(name: str, tmp_path: Path) -> None:
    kind, rows = HONEST[name]
    (tmp_path / name).write_bytes(b"".join(map(to_line, rows)) + b'{"step": 9, "lo')
    told = read(tmp_path / name, kind)
    assert (len(told.rows), told.trouble) == (len(rows), "")
    for row, honest in zip(told.rows, rows, strict=True):
        assert json.dumps(row) == json.dumps({key: honest[key] for key in row})
    assert read(tmp_path / "not there", kind).rows == []


@pytest.mark.parametrize(
    "change",
    [
        {"step": True}, {"step": 7.0}, {"step": "7"}, {"step": -1}, {"step": 2**53 + 1}, {"step": None},
        {"step_seconds": -1}, {"step_seconds": 1e10}, {"step_seconds": float("nan")}, {"step_seconds": "1"},
        {"time": -1.0}, {"time": 1e11}, {"time": float("inf")}, {"phase": "other"}, {"resolution": 0},
        {"depth": 10**9}, {"epoch": []}, {"loss": None},
    ],
)  # fmt: skip
def test_what_is_no_record_is_left_out_and_counted(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(to_line(row) for row in (hostile.STEP, hostile.STEP | change, hostile.STEP)))
    told = read(path, METRIC)
    assert len(told.rows) == 2
    assert told.trouble == "metrics.jsonl: 1 line of 3 is not a record and left out (the first is line 2)"


@given(hostile.run_directories)
def test_whatever_stands_there_is_read(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    run = hostile.lay_down(tmp_path_factory.mktemp("run"), files)
    for name, (kind, _) in HONEST.items():
        told = read(run / name, kind)
        json.dumps(told.rows).encode()
        assert all(isinstance(row, dict) for row in (*told.rows, *read_rows(run / name)))
    for name, file_kind in (("results.json", Results), ("job.json", Job), ("jobs/reports/7-0-0.json", Report)):
        with suppress(CheckpointError):
            read_object(run / name, file_kind)


@pytest.mark.parametrize("kind", hostile.IN_THE_WAY)
def test_what_lies_in_the_place_of_a_file_holds_nobody_up(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    hostile.put_in_the_way(path, kind)
    told = read(path, METRIC)
    assert told.rows == []
    assert bool(told.trouble) == (kind != "one line")
    assert read(path, METRIC, last=2**20).rows == []
    with pytest.raises(CheckpointError, match="not readable"):
        read_object(path, Results)


def test_a_line_that_is_too_long_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long = b'{"step": 1, "x": "' + b"a" * (9 * 2**20) + b'"}\n'
    path.write_bytes(to_line(hostile.STEP) + long + to_line(hostile.STEP) + long)
    told = read(path, METRIC)
    assert len(told.rows) == 2
    assert "2 lines of 4 are not records" in told.trouble


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = to_line(hostile.STEP)
    path.write_bytes(line * 1000)
    assert len(read(path, METRIC, last=10 * len(line)).rows) == 10
    assert len(read(path, METRIC, last=10 * len(line) - 1).rows) == 9
    assert len(read(path, METRIC, last=2**20).rows) == 1000


def test_a_file_of_nothing_else_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaleprog.rundir.reading.MOST_DAMAGED", 100)
    monkeypatch.setattr("scaleprog.rundir.reading.MOST_ROWS", 200)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" * 1000)
    assert "scaleprog read nothing after line 100" in read(path, METRIC).trouble
    path.write_bytes(to_line(hostile.STEP) * 1000)
    told = read(path, METRIC)
    assert (len(told.rows), told.trouble) == (200, "metrics.jsonl is very long; scaleprog read nothing after line 200")


def test_whatever_is_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    name = os.fsdecode(b"run\xff") + hostile.ESCAPES
    path.write_bytes(to_line({"time": 1e9, "event": "error", "step": 1, "rank": 0, "message": name}))
    assert len(read(path, EVENT).rows) == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "NaN", "1e999", '"3"', "null", "true", "[1]"])
def test_a_baseline_has_taken_time(seconds: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(f'{{"train_seconds": {seconds}}}')
    with pytest.raises(CheckpointError, match="train_seconds"):
        read_object(tmp_path / "results.json", Baseline)
