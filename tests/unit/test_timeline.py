"""The timeline of a run: what its starts, their ends and their costs are told to be, and the picture of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scaleprog.reporting.figures import COLORS
from scaleprog.reporting.timeline import Timeline, describe, read_timeline, span, table_row
from scaleprog.reporting.timeline_figure import draw_timelines
from scaleprog.rundir.reading import still_told

STEP = 0.5  # seconds, and half of that again to wait for data


class Told:
    """Writes what a run of 2 ranks tells, by a clock that only `after` moves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.generation, self.step = folder, 1000.0, 0, 0
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.requeues: list[dict[str, Any]] = []

    def after(self, seconds: float) -> "Told":
        self.now += seconds
        return self

    def event(self, kind: str, **fields: Any) -> "Told":
        self.events.append({"time": self.now, "event": kind, "generation": self.generation, **fields})
        return self

    def start(self, step: int = 0, startup: float = 3.0) -> "Told":
        """Its process begins now."""
        lost = [row for row in self.rows if row["step"] > step]
        self.rows = [row for row in self.rows if row["step"] <= step]
        self.generation, self.step = self.generation + 1, step
        told: dict[str, Any] = {"repeated_steps": len(lost)}
        if lost:
            told |= {"repeated_seconds": 0.75 * len(lost), "repeated_since": lost[0]["time"] - 0.75,
                     "repeated_until": lost[-1]["time"]}  # fmt: skip
        return self.after(startup).event("start", step=step, world=2, startup_seconds=startup, **told)

    def train(self, steps: int, stage: int = 1, phase: str = "train", size: tuple[int, int] = (16, 4)) -> "Told":
        for _ in range(steps):
            self.step += 1
            self.after(1.5 * STEP).rows.append({
                "step": self.step, "stage": stage, "phase": phase, "resolution": size[0], "depth": size[1],
                "loss": 2.0, "step_seconds": STEP, "data_wait_seconds": 0.5 * STEP, "time": self.now,
            })  # fmt: skip
        return self

    def checkpoint(self, stall: float = 1.0) -> "Told":
        return self.after(stall).event("checkpoint", step=self.step, seconds=2.0, stall=stall, bytes=2**20)

    def signal(self, name: str, *ranks: int) -> "Told":
        for rank in ranks:
            self.event("signal", rank=rank, signal=name)
        return self

    def requeue(self, requeue: bool, cause: str) -> "Told":
        self.requeues.append({"time": self.now, "cause": cause, "requeue": requeue})
        return self

    def timeline(self) -> Timeline:
        if self.requeues:
            lines = "".join(json.dumps(row) + "\n" for row in self.requeues)
            (self.folder / "requeues.jsonl").write_text(lines)
        timeline = read_timeline(self.folder, "run", self.rows, self.events)
        assert timeline is not None
        return timeline


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


def marks(timeline: Timeline, *kinds: str) -> list[tuple[float, str, str]]:
    return [(mark.seconds, mark.kind, mark.text) for mark in timeline.marks if mark.kind in kinds]


def test_where_the_time_went(told: Told) -> None:
    told.start().event("growth", step=0, stage=1, phase="train", resolution=16, depth=4, seconds=0.5).after(0.5)
    told.train(4).checkpoint().train(6)  # killed
    told.after(20).start(step=4).train(4).after(2).event("evaluation", step=8, seconds=2.0).checkpoint(0.5)
    timeline = told.event("finish", step=8).timeline()
    assert timeline.wall == pytest.approx(3 + 0.5 + 3 + 1 + 4.5 + 20 + 3 + 3 + 2 + 0.5)
    assert timeline.costs == {
        "training": 8 * STEP, "retrained": pytest.approx(4.5), "data wait": pytest.approx(4 * STEP),
        "checkpoint stall": 1.5, "evaluation, scoring": 2.0, "growth": 0.5, "start-up": 6.0, "queue": 0.0,
        "down": pytest.approx(20), "rest": pytest.approx(0),
    }  # fmt: skip
    assert timeline.lost == 6
    row = table_row(timeline)
    assert (row["starts"], row["steps retrained"], row["total"]) == ("2", "6", "40.5 s")
    assert (row["down"], row["training"]) == (f"{20 / 40.5:.1%}", f"{4 / 40.5:.1%}")
    assert [start.kept for start in timeline.starts] == [4, float("inf")]
    assert timeline.starts[0].points[-1] == (pytest.approx(12), 10)  # the lost steps are on its curve
    assert marks(timeline, "killed", "finish") == [
        (pytest.approx(12), "killed", "ended without notice"), (pytest.approx(40.5), "finish", "finished")
    ]  # fmt: skip


def test_a_device_that_is_busy_while_the_host_waits_is_not_counted_twice(told: Told) -> None:
    told.start().train(10)
    for row in told.rows:
        row["step_seconds"] = 0.7  # of 0.75, of which the host waited 0.25
    costs = told.event("finish", step=10).timeline().costs
    assert costs["training"] == pytest.approx(7)
    assert costs["data wait"] == pytest.approx(0.5)
    assert costs["rest"] == 0


def test_the_data_wait_is_that_of_the_rank_that_waits_longest(told: Told) -> None:
    told.start().train(10)
    for row in told.rows:  # rank 0 never waited, another rank for a third of the time
        row |= {"images": 8, "images_per_second": 8 / 0.75, "data_wait_seconds": 0.0, "data_wait_share": 1 / 3}
    assert told.event("finish", step=10).timeline().costs["data wait"] == pytest.approx(2.5)


def test_signals_and_orderly_ends(told: Told) -> None:
    told.start().train(2).signal("SIGTERM", 1, 0).after(1).checkpoint()
    told.event("preempted", step=2, reason="SIGTERM").after(5)
    told.start(2).train(2).signal("SIGUSR2", 1).checkpoint().event("preempted", step=4, reason="SIGUSR2").after(5)
    told.start(4).train(1).checkpoint().event("preempted", step=5, reason="time limit").after(5)
    told.start(5).train(1).signal("SIGTERM", 0, 1).after(3).event("hurried", rank=1).after(5)
    told.start(5).train(1).after(1).event("error", rank=1, step=6, message="OSError: gone\nmore")
    told.event("error", rank=0, step=6, message="RuntimeError: connection closed").after(5)
    told.start(5).train(1).event("stopped_early", step=6).after(5)
    told.start(6).train(1)  # and it still runs
    words = [(kind, text) for _, kind, text in marks(told.timeline(), "signal", "stop", "killed")]
    assert words == [
        ("signal", "SIGTERM"), ("stop", ""), ("signal", "SIGUSR2, rank 1"), ("stop", ""), ("stop", "time limit"),
        ("signal", "SIGTERM"), ("killed", "a second signal"), ("killed", "OSError, rank 1"),
        ("stop", "train.max_steps"),
    ]  # fmt: skip


def test_time_in_the_queue_is_no_time_down(told: Told) -> None:
    told.start().train(2).after(4).requeue(True, "a task was killed, exit code 137: see the log")
    told.after(100).start().train(2).after(1).requeue(False, "rank 0: OSError: gone")
    timeline = told.timeline()
    assert (timeline.costs["down"], timeline.costs["queue"]) == (pytest.approx(4), pytest.approx(100))
    assert [text for _, _, text in marks(timeline, "killed")] == ["a task was killed", "OSError, rank 0"]
    assert marks(timeline, "requeue") == [(pytest.approx(8.5), "requeue", "")]


def test_what_is_left_of_an_old_start_ends_nothing_and_tells_nothing(told: Told) -> None:
    told.start().train(4).event("choice", step=4, stage=1).after(60).start(2).train(4)
    late = [
        {"time": told.now, "event": "choice", "generation": 1, "step": 2, "stage": 1},
        {"time": told.now, "event": "error", "generation": 1, "step": 9, "rank": 0, "message": "Superseded: by 2"},
    ]
    told.events += late
    timeline = told.after(3).event("finish", step=6).timeline()
    assert [text for _, _, text in marks(timeline, "killed")] == [
        "ended without notice",
        "start 1, superseded: Superseded",
    ]
    assert timeline.costs["down"] == pytest.approx(60)
    assert [event["event"] for event in still_told(told.events)] == ["start", "start", "finish"]


def test_events_without_a_step_or_a_generation(told: Told) -> None:
    told.start().train(3).signal("SIGTERM", 0).after(1).start(3).train(1).event("finish", step=4)
    for event in told.events:
        del event["generation"]
        event.pop("startup_seconds", None)
    for row in told.rows:
        del row["time"]
    assert [event["event"] for event in still_told(told.events)] == ["start", "signal", "start", "finish"]
    timeline = told.timeline()
    assert [start.step for start in timeline.starts] == [0, 3]
    assert timeline.starts[1].stretches[0].end == pytest.approx(timeline.wall)


def test_in_words(told: Told) -> None:
    told.start().train(2).checkpoint().event("checkpoint_failed", step=2, stall=0.5, message="disk full\nmore")
    lines = describe(told.timeline(), told.after(1).signal("SIGTERM", 0, 1).events)
    assert "no checkpoint of step 2: disk full" in lines
    assert not any(line.startswith("damaged") for line in lines)
    told.event("damaged", step=1, total=1, samples=["a"]).event("damaged", step=1, total=3, samples=["b", "c"])
    assert "damaged samples, replaced by others: 3 (a; b; c)" in describe(told.timeline(), told.events)
    told.after(5).start(1)
    lines = describe(told.timeline(), told.events)
    assert lines[0] == "starts: 2 (at step 0, world size 2; at step 1, world size 2, 1 steps to retrain)"
    assert "interruptions: 2 (SIGTERM after 6.5 s; ended without notice after 6.5 s)" in lines
    assert any(line.startswith("14.5 s from the first start to the end: training 0.5 s;") for line in lines)


@pytest.mark.parametrize(("seconds", "text"), [(7.25, "7.25 s"), (119, "119 s"), (150, "2.5 min"), (2e4, "5.56 h"),
                                               (4e5, "4.63 days")])  # fmt: skip
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_no_start_no_life(tmp_path: Path) -> None:
    assert read_timeline(tmp_path, "run", [], [{"time": 1.0, "event": "error", "step": 0}]) is None


def colours(path: Path) -> dict[tuple[int, ...], int]:
    with Image.open(path) as picture:
        image = picture.convert("RGB")
        return {colour: count for count, colour in image.getcolors(image.width * image.height) or []}


def test_the_picture_shows_what_was_lost_and_how_long_it_was_down(told: Told, tmp_path: Path) -> None:
    vermilion, down = tuple(bytes.fromhex(COLORS[1][1:])), (0xEC, 0xEC, 0xEC)
    told.start().train(20, size=(16, 4)).checkpoint()
    draw_timelines(tmp_path / "quiet.png", [told.timeline()])
    told.train(20, stage=2, phase="supernet", size=(28, 6)).after(30).start(20).train(4, stage=2, size=(28, 6))
    draw_timelines(tmp_path / "killed.png", [told.timeline(), told.timeline()])
    quiet, killed = colours(tmp_path / "quiet.png"), colours(tmp_path / "killed.png")
    assert vermilion not in quiet
    assert quiet.get(down, 0) < 1000
    assert killed[vermilion] > 1000
    assert killed[down] > 10_000


def test_a_run_that_has_only_begun_and_one_of_many_starts_can_be_drawn(told: Told, tmp_path: Path) -> None:
    draw_timelines(tmp_path / "begun.png", [told.start(startup=0.0).timeline()])
    for i in range(40):
        told.train(30).checkpoint().train(4).signal("SIGTERM", 0, 1).after(40).requeue(True, "stopped by SIGTERM")
        told.after(200 * (i % 5)).start(told.step - 4 * (i % 3 == 0))
    draw_timelines(tmp_path / "many.png", [told.timeline()])
    assert len(colours(tmp_path / "many.png")) > 50
