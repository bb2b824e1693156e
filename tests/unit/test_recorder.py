"""The record of a run: events of all ranks in one file, steps once each, curves of every rank."""

import json
import multiprocessing
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import scaleprog.rundir.recorder
from scaleprog.growth.search import Decision
from scaleprog.growth.space import Subnet
from scaleprog.ranks.coordinator import Coordinator
from scaleprog.ranks.waits import Waited
from scaleprog.rundir.board import About, Board, event_files, reintroduce
from scaleprog.rundir.pictures import grid
from scaleprog.rundir.progress import ProgressLine
from scaleprog.rundir.reading import read
from scaleprog.rundir.recorder import Recorder, StepTimer, read_rows
from scaleprog.rundir.records import EVENT
from scaleprog.rundir.state import decision_to_json
from scaleprog.rundir.straggler import Change, Slow
from tests.compare import curves, samples, texts

DECISION = Decision(
    stage=2,
    candidates=(Subnet(16, 2), Subnet(16, 4), Subnet(32, 4)),
    losses=(1.5, 1.25, 1.125),
    times=(0.125, 0.25, 1.0),
    scores=(0.0, 0.0, None),
    chosen=Subnet(16, 2),
    complete_from=78,
    why="it is cheap",
)


class Rank:
    """A coordinator whose other ranks agree with whatever this one says."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world

    def mean(self, values: list[float]) -> list[float]:
        return values

    def maximum(self, values: list[float]) -> list[float]:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world


def recorder(
    run: Path,
    rank: int = 0,
    world: int = 1,
    generation: int = 1,
    step: int = 0,
    rank_curves: bool = True,
    about: About | None = None,
) -> Recorder:
    ranks = cast(Coordinator, Rank(rank, world))
    return Recorder(run, ranks, generation, step, log_every=2, rank_curves=rank_curves, about=about)


def train(record: Recorder, *numbers: int) -> None:
    for step in numbers:
        timer = StepTimer(torch.device("cpu"))
        timer.stop()
        row: dict[str, Any] = {"step": step, "phase": "train", "images": 8, "data_wait_seconds": 0.25, "lr": 0.1}
        record.step(row, torch.tensor(float(step)), torch.tensor(1.0), timer, torch.tensor([step]))
    record.flush()


def steps(folder: Path) -> dict[str, list[int]]:
    """The steps of every curve as TensorBoard shows them."""
    return {tag: [step for step, _ in points] for tag, points in curves(folder).items()}


def test_what_happens_to_one_rank_is_told_by_that_rank_and_the_rest_once(tmp_path: Path) -> None:
    for rank in range(3):
        record = recorder(tmp_path, rank, world=3, generation=7)
        record.event("growth", step=4)
        record.own_event("signal", signal="SIGTERM")
        record.close()
    rows = read_rows(tmp_path / "events.jsonl")
    assert [(row["event"], row.get("rank")) for row in rows] == [
        ("growth", None), ("signal", 0), ("signal", 1), ("signal", 2)
    ]  # fmt: skip
    assert {row["generation"] for row in rows} == {7}


def shout(run: Path, rank: int) -> None:
    record = recorder(run, rank, world=4)
    for number in range(200):
        record.own_event("signal", number=number, padding="x" * (number % 50) * rank)


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=shout, args=(tmp_path, rank)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    told = sorted((row["rank"], row["number"]) for row in map(json.loads, lines))
    assert told == [(rank, number) for rank in range(4) for number in range(200)]


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    whole = '{"time": 1.0, "event": "start", "step": 0}\n'
    (tmp_path / "events.jsonl").write_text(whole + '{"time": 2.0, "eve')
    record = recorder(tmp_path)
    record.event("checkpoint", step=3)
    record.close()
    assert [row["event"] for row in read_rows(tmp_path / "events.jsonl")] == ["start", "checkpoint"]


def test_what_a_restart_has_lost(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    assert record.lost == {"repeated_steps": 0}
    train(record, *range(1, 8))
    record.evaluation(6, {"top1": 50.0})
    record.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    lost = [row for row in rows if row["step"] > 4 and "loss" in row]
    again = recorder(tmp_path, step=4, generation=2)
    assert again.lost == {
        "repeated_steps": 3,
        "repeated_seconds": pytest.approx(sum(row["step_seconds"] + 0.25 for row in lost)),
        "repeated_since": pytest.approx(lost[0]["time"] - lost[0]["step_seconds"] - 0.25),
        "repeated_until": lost[-1]["time"],
    }
    again.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_curves_of_every_rank_go_on_without_doubled_points(tmp_path: Path) -> None:
    own = ["vitals/step_seconds", "vitals/data_wait_seconds"]
    first = [recorder(tmp_path, rank, world=2) for rank in range(2)]
    for record in first:
        train(record, *range(1, 9))
        record.sync()  # and never closed: it was killed
    assert steps(tmp_path / "rank_1") == {tag: [2, 4, 6, 8] for tag in own}
    for rank in range(2):
        record = recorder(tmp_path, rank, world=2, generation=2, step=5)
        train(record, *range(6, 11))
        record.close()
    for rank in range(2):
        assert steps(tmp_path / f"rank_{rank}") == {tag: [2, 4, 6, 8, 10] for tag in own}
    assert steps(tmp_path)["train/loss"] == [2, 4, 6, 8, 10]
    alone = recorder(tmp_path, generation=3, step=7)  # the second rank is gone
    alone.close()
    for folder in (tmp_path, tmp_path / "rank_0", tmp_path / "rank_1"):
        assert {tuple(points) for points in steps(folder).values()} == {(2, 4, 6)}


def test_without_rank_curves_a_run_has_one_board_and_stops_those_of_earlier_starts(tmp_path: Path) -> None:
    for generation, rank_curves in enumerate((True, False)):
        for rank in range(2):
            record = recorder(tmp_path, rank, 2, generation, step=2 * generation, rank_curves=rank_curves)
            train(record, *range(2 * generation + 1, 2 * generation + 5))
            record.close()
    assert steps(tmp_path)["train/loss"] == [2, 4, 6]
    assert set(map(tuple, steps(tmp_path / "rank_1").values())) == {(2,)}, "the points that the second start repeats"
    alone = tmp_path / "alone"
    alone.mkdir()
    for rank in range(2):
        recorder(alone, rank, world=2, rank_curves=False).close()
    assert not [path for path in alone.iterdir() if path.is_dir()]


def test_a_run_that_an_earlier_version_drew_elsewhere_is_drawn_again_from_its_records(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    train(first, *range(1, 7))
    first.evaluation(6, {"top1": 50.0})
    first.event("choice", step=4, **decision_to_json(DECISION))
    first.event("choice", step=6, **decision_to_json(replace(DECISION, stage=3)))  # of steps that are lost
    first.close()
    old = tmp_path / "tensorboard"
    (old / "rank_1").mkdir(parents=True)
    for path in event_files(tmp_path):
        shutil.copy(path, old / "rank_1")
        path.rename(old / path.name)
    for generation, trained in ((2, (5, 6)), (3, (7, 8))):
        record = recorder(tmp_path, generation=generation, step=trained[0] - 1)
        train(record, *trained)
        record.close()
        assert not event_files(old)
        assert event_files(old / "rank_1"), "cannot be drawn again"
    assert steps(tmp_path)["train/loss"] == [2, 4, 6, 8]
    assert len(event_files(tmp_path)) == 2
    drawn = EventAccumulator(str(tmp_path)).Reload()
    wall = {row["step"]: row["time"] for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row}
    for tag in ("train/loss", "vitals/lr"):
        assert {event.step: event.wall_time for event in drawn.Scalars(tag)} == {
            step: wall[step] for step in (2, 4, 6, 8)
        }
    assert texts(tmp_path).keys() == {"search/stage_2/text_summary"}


def test_old_curves_stay_until_the_disk_has_the_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = recorder(tmp_path)
    train(first, *range(1, 7))
    first.close()
    old = tmp_path / "tensorboard"
    old.mkdir()
    for path in event_files(tmp_path):
        path.rename(old / path.name)
    with monkeypatch.context() as patched:
        patched.setattr("scaleprog.rundir.appending.Appended.sync", lambda _: False)
        recorder(tmp_path, step=6, generation=2).close()
    assert event_files(old)
    recorder(tmp_path, step=6, generation=3).close()
    assert not event_files(old)
    assert steps(tmp_path)["train/loss"] == [2, 4, 6]


def test_a_run_made_longer_shows_the_longer_recipe_and_all_that_was_drawn(tmp_path: Path) -> None:
    def about(epochs: int) -> About:
        return About({"train.epochs": epochs}, f"epochs: {epochs}")

    picture = grid(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    first = recorder(tmp_path, about=about(1))
    train(first, *range(1, 5))
    first.picture(2, "networks", picture)
    first.choice(2, DECISION)
    first.conclude()
    first.close()
    (drawn,) = event_files(tmp_path)
    with drawn.open("ab") as file:
        file.write(b"torn")
    reintroduce(tmp_path, about(2), step=4)
    second = recorder(tmp_path, step=4, generation=2, about=about(2))
    train(second, 5, 6)
    second.close()
    assert steps(tmp_path)["train/loss"] == [2, 4, 6]
    shown = texts(tmp_path)
    assert shown.keys() == {"run/recipe/text_summary", "search/stage_2/text_summary"}
    assert "epochs: 2" in shown["run/recipe/text_summary"]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [image.encoded_image_string for image in events.Images("networks")] == [picture]
    sessions = events.PluginTagToContent("hparams")
    assert sessions.keys() == {"_hparams_/session_start_info"}, "it has not ended"
    told = HParamsPluginData.FromString(sessions["_hparams_/session_start_info"])
    assert told.session_start_info.hparams["train.epochs"].number_value == 2


def test_a_run_that_has_drawn_nothing_gets_no_board_when_it_is_made_longer(tmp_path: Path) -> None:
    reintroduce(tmp_path, About({}, ""), step=0)
    assert not list(tmp_path.iterdir())


def test_the_samples_of_a_step_trained_again_on_fewer_ranks_count_once(tmp_path: Path) -> None:
    starts = [(2, range(1, 6)), (1, range(4, 8)), (3, range(6, 8))]  # ranks, steps; a crash ends all but the last
    for generation, (world, trained) in enumerate(starts, start=1):
        for rank in range(world):
            record = recorder(tmp_path, rank, world, generation, trained[0] - 1)
            for step in trained:
                record.samples(step, [100 * generation + 10 * step + rank])
            record.close()
    assert samples(tmp_path) == {
        1: [110, 111], 2: [120, 121], 3: [130, 131], 4: [240], 5: [250], 6: [360, 361, 362], 7: [370, 371, 372]
    }  # fmt: skip


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond `size` bytes: the kernel takes what fits and refuses the rest."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def board_size(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("half_a_record", [0, 30])
def test_a_full_disk_stops_no_step_and_costs_no_point(
    half_a_record: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = recorder(tmp_path, world=2)
    train(record, *range(1, 5))
    record.sync()
    with full_beyond(min(map(board_size, (tmp_path, tmp_path / "rank_0"))) + half_a_record):
        for step in range(5, 9):
            train(record, step)
            record.samples(step, list(range(100)))
            record.event("checkpoint_failed", step=step)
            record.sync()
        record.evaluation(8, {"top1": 50.0})
        record.sync()
        assert set(steps(tmp_path)["train/loss"]) == {2, 4}, "it is full"
    told = capsys.readouterr().err
    assert told.count("events.out.tfevents") == 2, "each board says so, once"
    assert "will retry" in told
    train(record, 9, 10)
    record.close()
    assert steps(tmp_path)["train/loss"] == [2, 4, 6, 8, 10]
    assert steps(tmp_path)["validation/top1"] == [8]
    assert steps(tmp_path / "rank_0")["vitals/step_seconds"] == [2, 4, 6, 8, 10]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in read_rows(tmp_path / "samples-0.jsonl")] == [5, 6, 7, 8]
    failed = [row for row in read_rows(tmp_path / "events.jsonl") if row["event"] == "checkpoint_failed"]
    assert [row["step"] for row in failed] == [5, 6, 7, 8]
    assert capsys.readouterr().err == ""


def test_a_board_says_whether_the_disk_has_taken_everything(tmp_path: Path) -> None:
    board = Board(tmp_path, step=0)
    assert board.sync()
    with full_beyond(board_size(tmp_path)):
        board.draw({"step": 1, "top1": 50.0})
        assert not board.sync()
    assert board.sync()
    board.close()


def test_what_is_refused_to_the_end_is_lost_aloud_and_drawn_by_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = recorder(tmp_path)
    train(record, *range(1, 5))
    with full_beyond(board_size(tmp_path) + 30):
        train(record, *range(5, 9))
        record.close()
    assert "ARE LOST" in capsys.readouterr().err
    again = recorder(tmp_path, step=4, generation=2)
    train(again, *range(5, 9))
    again.close()
    assert steps(tmp_path)["train/loss"] == [2, 4, 6, 8]


def test_a_log_on_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open("/dev/full", "w")  # noqa: SIM115  # closing it would raise, too
    monkeypatch.setattr(sys, "stderr", log)
    ProgressLine(total=8, step=0, enabled=True).say("NO CHECKPOINT of step 4")
    record = recorder(tmp_path)
    train(record, *range(1, 5))
    with full_beyond(board_size(tmp_path)):
        train(record, *range(5, 9))
    record.close()
    with pytest.raises(OSError, match="No space left"):
        log.close()


class Slower(Rank):
    """A coordinator of two ranks; the other one took 0.5 s for each step, and waited for data all the time."""

    def maximum(self, values: list[float]) -> list[float]:
        return [max(value, other) for value, other in zip(values, [-0.5] * (len(values) - 1) + [0.9], strict=True)]


def test_times_are_those_of_the_fastest_rank_and_rates_those_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Recorder(tmp_path, cast(Coordinator, Slower(0, 2)), 1, 0, log_every=2)
    clock = 100.0
    monkeypatch.setattr("scaleprog.rundir.recorder.time.perf_counter", lambda: clock)
    for step, took in ((1, 2.0), (2, 0.25)):
        clock += 1.0  # it waits for a batch
        timer = StepTimer(torch.device("cpu"))
        clock += took
        timer.stop()
        row: dict[str, Any] = {"step": step, "phase": "train", "images": 8, "data_wait_seconds": 1.0, "lr": 0.1}
        record.step(row, torch.tensor(1.0), torch.tensor(1.0), timer, torch.tensor([0]))
    rows = record.flush()
    assert [row["step_seconds"] for row in rows] == [0.5, 0.25], "the first waited 1.5 s for the other rank"
    assert [row["images_per_second"] for row in rows] == pytest.approx([16 / 4.25] * 2)
    assert [row["data_wait_share"] for row in rows] == [0.9] * 2, "the other rank's, which waited longer"
    assert "step 2: waiting for data takes 90% of the time" in capsys.readouterr().err
    (event,) = read_rows(tmp_path / "events.jsonl")
    assert (event["event"], event["step"], event["share"]) == ("data_wait", 2, 0.9)
    record.step(dict(row, step=3), torch.tensor(1.0), torch.tensor(1.0), timer, torch.tensor([0]))
    record.flush()
    assert len(read_rows(tmp_path / "events.jsonl")) == 1, "it says so once"
    record.close()


def test_the_event_has_all_ranks_that_the_log_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = [Slow(rank, "there", 2.0, 0.5) for rank in range(2000)]
    record = recorder(tmp_path)
    record._tell_of_stragglers(7, Change(slow[:8], slow[:1], 1.0, more_began=slow[8:], more_ended=slow[1:]))
    record.close()
    told = read(tmp_path / "events.jsonl", EVENT)
    assert [(event["event"], len(event["slow"])) for event in told.rows] == [
        ("straggler", 2000), ("straggler_over", 2000)
    ]  # fmt: skip
    assert capsys.readouterr().err.count("rank") < 100


@pytest.mark.parametrize(("device", "share", "own"), [("cpu", 0.8, 3.5), ("cuda", 0.05, 2.0)])
def test_a_wait_for_data_counts_while_the_device_is_idle(
    device: str, share: float, own: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, nothing computes during a wait. A GPU computes the step before: here in 95 % of the time."""
    monkeypatch.setattr("scaleprog.rundir.recorder.memory", lambda _: {})
    monkeypatch.setattr("scaleprog.rundir.recorder.time.perf_counter", lambda: 102.0)
    ranks = cast(Coordinator, Rank(0, 2))
    record = Recorder(tmp_path, ranks, 1, 0, log_every=2, device=torch.device(device))
    for step in (1, 2):
        timer: Any = SimpleNamespace(began=99.8 + step, cpu_seconds=0.1, seconds=lambda: 0.95)
        row = {"step": step, "phase": "train", "images": 8, "data_wait_seconds": 0.8, "lr": 0.1}
        record.step(row, torch.tensor(1.0), torch.tensor(1.0), timer, torch.tensor([0]), waited=Waited())
    rows = record.flush()
    record.close()
    assert [row["data_wait_share"] for row in rows] == pytest.approx([share] * 2)
    assert [row["data_wait_seconds"] for row in rows] == [0.8] * 2
    assert [row["slowest_rank_seconds"] for row in rows] == pytest.approx([own] * 2)


class Beside(Rank):
    """A coordinator of two ranks; besides waits for this one, the other needed 8 s a step, 2 s of them for data."""

    def mean(self, values: list[float]) -> list[float]:
        *losses, own, _, data, _ = values
        measured = own / 4.0
        return [*losses, own / 2, 8.0 * measured / 2, data / 2, 2.0 * measured / 2]


def test_rows_show_the_slowest_rank_and_the_log_names_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scaleprog.rundir.straggler.LEAST_SECONDS", 0.0)
    ranks, hosts = cast(Coordinator, Beside(0, 2)), ["here", "there"]
    record = Recorder(tmp_path, ranks, 1, 0, log_every=2, rank_curves=True, hosts=hosts)
    clock = 100.0
    monkeypatch.setattr("scaleprog.rundir.recorder.time.perf_counter", lambda: clock)
    for step in range(1, 11):
        timer = StepTimer(torch.device("cpu"))
        clock += 10.0
        timer.stop()
        row = {"step": step, "phase": "train", "images": 8, "data_wait_seconds": 0.5, "lr": 0.1}
        waited = Waited(host_seconds=6.5) if step % 2 == 0 else None  # as on CUDA
        record.step(row, torch.tensor(1.0), torch.tensor(1.0), timer, torch.tensor([0]), waited=waited)
        if step % 2 == 0:
            record.flush()
    record.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    keys = ("slowest_rank", "slowest_rank_seconds", "median_rank_seconds", "collective_wait_seconds")
    assert [tuple(row.get(key) for key in keys) for row in rows] == [(1, 8.0, 6.0, None), (1, 8.0, 6.0, 6.5)] * 5
    (event,) = [event for event in read_rows(tmp_path / "events.jsonl") if event["event"] == "straggler"]
    assert (event["step"], event["median_seconds"]) == (6, 6.0)
    assert event["slow"] == [{"rank": 1, "host": "there", "seconds": 8.0, "data_seconds": 2.0}]
    assert capsys.readouterr().err.count("step 6: rank 1 on there is slow") == 1
    assert steps(tmp_path)["vitals/slowest_rank"] == [2, 4, 6, 8, 10]
    assert steps(tmp_path / "rank_0")["vitals/collective_wait_seconds"] == [2, 4, 6, 8, 10]


def test_rows_show_flops_memory_and_skipped_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = cast(Coordinator, Rank(0, 1))
    record = Recorder(tmp_path, ranks, 1, 0, log_every=2, skipped=3, peak_flops=1e9)
    clock = 100.0
    monkeypatch.setattr("scaleprog.rundir.recorder.time.perf_counter", lambda: clock)
    for step, norm in ((1, 1.0), (2, float("inf")), (3, 1.0)):
        timer = StepTimer(torch.device("cpu"))
        clock += 2.0
        timer.stop()
        row: dict[str, Any] = {"step": step, "phase": "train", "images": 8, "data_wait_seconds": 0.0, "lr": 0.1}
        record.step(row, torch.tensor(1.0), torch.tensor(norm), timer, torch.tensor([0]), flops=step * 1e8)
    rows = record.flush()
    record.close()
    assert [row["mfu"] for row in rows] == pytest.approx([0.1] * 3), "6e8 FLOPs in 6 s of 1e9 FLOP/s"
    assert [row["skipped_updates"] for row in rows] == [3, 4, 4]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert all(0 < row["host_mib"] <= resident + 1 for row in rows)
    assert not {key for row in rows for key in row if key.startswith(("device", "slowest", "collective"))}


def test_a_clock_set_back_breaks_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    for number, shift in enumerate((0.0, -86400.0, -1.0)):
        monkeypatch.setattr("scaleprog.rundir.recorder.time.time", lambda shift=shift: now + shift)
        record = recorder(tmp_path, step=2 * number)
        train(record, 2 * number + 1, 2 * number + 2)
        record.close()
        monkeypatch.undo()
    assert steps(tmp_path)["train/loss"] == [2, 4, 6]


def test_every_event_that_is_written_can_be_read() -> None:
    written = set()
    for path in (Path(scaleprog.__file__).parent / "training").glob("*.py"):
        written |= set(re.findall(r"event\(\s*\"(\w+)\"", path.read_text()))
    written |= set(re.findall(r"event\(\s*\"(\w+)\"", Path(scaleprog.rundir.recorder.__file__).read_text()))
    assert {"start", "growth", "nonfinite", "data_wait", "checkpoint"} <= written
    for kind in written:
        known = [error["type"] for error in errors_of({"event": kind, "time": 1.0})]
        assert "union_tag_invalid" not in known, f"{kind} has no schema"


def errors_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        EVENT.validate_python(row)
    except ValidationError as error:
        return [dict(found) for found in error.errors()]
    return []
