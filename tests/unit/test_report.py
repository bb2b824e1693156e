"""The report: its numbers from run directories as training writes them, its pictures, and its errors."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from scaleprog.errors import CheckpointError, ScaleprogError
from scaleprog.reporting.grouping import read_groups
from scaleprog.reporting.history import read_run
from scaleprog.reporting.report import write_report

EPOCH = 10  # steps
FULL = (28, 8)
CANDIDATES = [(16, 4), (16, 6), (28, 4), (28, 6)]
ORIGINAL = [("train", 1, FULL, 80)]
PROG = [("train", 1, (16, 4), 20), ("train", 2, (20, 5), 20), ("train", 3, (24, 7), 20), ("train", 4, FULL, 20)]
AUTOPROG = [
    ("supernet", 1, (28, 6), 20), ("train", 1, (16, 4), 20), ("supernet", 2, (28, 6), 20), ("train", 2, (28, 4), 20),
    ("train", 3, FULL, 20),
]  # fmt: skip


def seconds_of(resolution: int, depth: int, full: float) -> float:
    """A step's duration if a step of the full network takes `full` seconds."""
    return full * resolution**2 * depth / (FULL[0] ** 2 * FULL[1])


class Writer:
    """Writes a run directory phase by phase, in the formats of the recorder and the training loop."""

    def __init__(self, folder: Path, schedule: Any, seed: int = 0, full: float = 1.0, **growth: Any) -> None:
        folder.mkdir(parents=True)
        self.folder, self.full, self.schedule = folder, full, schedule
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.step, self.train_seconds = 0, 0.0
        recipe = {
            "seed": seed, "model": {"name": "vit", "depth": FULL[1], "resolution": FULL[0]},
            "train": {"epochs": 8.0, "batch": 64}, "growth": {"schedule": schedule, "smallest": 0.5, **growth},
            "search": {"times": "measured"},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.event("start", world=2, engine="fsdp", device="cpu", host="node", reader_bytes=1)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"time": 1e9 + len(self.events), "event": kind, "step": self.step, **fields})

    def train(self, phase: str, stage: int, size: tuple[int, int], steps: int, top1: float = 80.0) -> None:
        """One phase; after each epoch of a training phase the network is `top1` percent right, its EMA 1 more."""
        self.event("growth", stage=stage, phase=phase, resolution=size[0], depth=size[1], seconds=0.25)
        start = self.step
        for i in range(steps):
            resolution, depth = CANDIDATES[i % len(CANDIDATES)] if phase == "supernet" else size
            if phase == "supernet" and i % EPOCH == 0:
                self.measure()
            took = seconds_of(resolution, depth, self.full)
            self.step, self.train_seconds = self.step + 1, self.train_seconds + took
            self.rows.append({
                "step": self.step, "epoch": (self.step - 1) / EPOCH, "stage": stage, "phase": phase,
                "resolution": resolution, "depth": depth, "lr": 1e-3, "data_wait_seconds": 0.1, "images": 64,
                "loss": 2.0, "grad_norm": 1.0, "step_seconds": took, "images_per_second": 64 / took,
                "cpu_seconds": took / 2,
            })  # fmt: skip
            if phase == "train" and self.step % EPOCH == 0:
                accuracy = {"top1": top1, "top1_ema": top1 + 1, "train_seconds": self.train_seconds}
                self.rows.append({"step": self.step, **accuracy})
        if phase == "supernet":
            self.measure()
            self.choose(stage)
        else:
            decided = [e for e in self.events if e["event"] == "choice" and e["stage"] == stage]
            self.stages.append({
                "stage": stage, "resolution": size[0], "depth": size[1], "epochs": (self.step - start) / EPOCH,
                "searched": bool(decided), "alpha": decided[-1]["alpha"] if decided else None, "scores": [],
            })  # fmt: skip
        self.event("checkpoint", seconds=0.5, bytes=2**20)

    def measure(self) -> None:
        losses = [[r, d, 1.5 + 1 / (1 + self.step) - 0.001 * r - 0.01 * d] for r, d in CANDIDATES]
        self.event("measurement", losses=losses)

    def choose(self, stage: int) -> None:
        """Stage 1 as published, the others within a budget."""
        first = stage == 1
        self.event(
            "choice", stage=stage, candidates=CANDIDATES, losses=[1.51, 1.42, 1.43, 1.34],
            times=[seconds_of(*c, self.full) for c in CANDIDATES], scores=[1.9, 1.8, 1.7, 1.6 if first else None],
            chosen=CANDIDATES[0 if first else 2], alpha=0.125 if first else None, complete_from=None if first else 80,
        )  # fmt: skip

    def save(self, finished: bool = True, top1: float = 80.0) -> Path:
        for name, rows in (("metrics", self.rows), ("events", self.events)):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            results = {
                "schedule": self.schedule, "top1": top1, "top1_ema": top1 + 1, "top1_best": top1 + 1,
                "train_seconds": self.train_seconds, "train_cpu_seconds": self.train_seconds / 2,
                "search_seconds": 1.5, "wall_seconds": self.train_seconds + 7, "images": 64 * self.step,
                "steps": self.step, "speedup": None, "stages": self.stages,
            }  # fmt: skip
            (self.folder / "results.json").write_text(json.dumps(results))
        return self.folder


def finished(folder: Path, schedule: Any, phases: Any, top1: float = 80.0, **options: Any) -> Path:
    run = Writer(folder, schedule, **options)
    for phase in phases:
        run.train(*phase, top1=top1)
    return run.save(top1=top1)


def six(root: Path) -> list[Path]:
    """Two seeds of Original and of Prog, one AutoProg, an unfinished Prog of another operator."""
    unfinished = Writer(root / "stacking-seed0", "linear", operator="stacking")
    unfinished.train(*PROG[0], top1=60.0)
    unfinished.train("train", 2, (20, 5), 5)
    return [
        finished(root / "original-seed0", "original", ORIGINAL, 88.0, seed=0, full=1.0),
        finished(root / "original-seed1", "original", ORIGINAL, 90.0, seed=1, full=1.5),
        finished(root / "prog-seed0", "linear", PROG, 86.0, seed=0, full=1.0),
        finished(root / "prog-seed1", "linear", PROG, 87.0, seed=1, full=1.2),
        finished(root / "autoprog-seed0", "automatic", AUTOPROG, 89.0, full=1.0),
        unfinished.save(finished=False),
    ]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return six(tmp_path)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the terminal is told of the six runs, and the folder of their report."""
    root = tmp_path_factory.mktemp("six")
    return write_report(six(root), root / "out"), root / "out"


@pytest.fixture
def markdown(told: tuple[str, Path]) -> str:
    return (told[1] / "report.md").read_text()


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """Every table of a Markdown text, as rows by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", markdown, re.MULTILINE):
        header, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        found.append([dict(zip(header, line, strict=True)) for line in lines])
    return found


def report(runs: list[Path], out: Path) -> str:
    write_report(runs, out)
    return (out / "report.md").read_text()


def test_one_row_per_run_with_speedups_against_the_mean_baseline(markdown: str) -> None:
    rows = {row["run"]: row for row in tables(markdown)[0]}
    prog = sum(20 * seconds_of(*size, 1.0) for _, _, size, _ in PROG)
    assert list(rows) == [
        "original-seed0", "original-seed1", "prog-seed0", "prog-seed1", "autoprog-seed0", "stacking-seed0 (unfinished)"
    ]  # fmt: skip
    assert "**original** with 100.0 s of training steps, the mean of 2 runs" in markdown
    assert rows["prog-seed0"] == {
        "run": "prog-seed0", "schedule": "Prog 0.5Ω", "seed": "0", "stages": "16x4 -> 20x5 -> 24x7 -> 28x8",
        "epochs": "8", "top-1": "86.00", "top-1 EMA": "87.00", "top-1 best": "87.00", "train s": f"{prog:.1f}",
        "CPU s": f"{prog / 2:.1f}", "scoring s": "1.5", "wall s": f"{prog + 7:.1f}",
        "speedup": f"{100 / prog - 1:+.1%}", "wall speedup": f"{107 / (prog + 7) - 1:+.1%}",
    }  # fmt: skip
    assert rows["prog-seed1"]["speedup"] == f"{100 / (1.2 * prog) - 1:+.1%}"
    assert (rows["original-seed0"]["speedup"], rows["original-seed1"]["speedup"]) == ("+25.0%", "-16.7%")
    assert rows["autoprog-seed0"]["schedule"] == "AutoProg 0.5Ω"
    assert rows["autoprog-seed0"]["stages"] == "16x4 -> 28x4 -> 28x8"


def test_an_unfinished_run_shows_what_it_has(markdown: str) -> None:
    row = tables(markdown)[0][-1]
    seconds = 20 * seconds_of(16, 4, 1.0) + 5 * seconds_of(20, 5, 1.0)
    assert row["stages"] == "16x4 -> 20x5 -> ..."
    assert row["epochs"] == "2.4 of 8"
    assert (row["top-1"], row["top-1 best"]) == ("60.00", "61.00")
    assert (row["train s"], row["CPU s"]) == (f"{seconds:.1f}", f"{seconds / 2:.1f}")
    assert row["wall s"] == row["scoring s"] == row["speedup"] == "–"


def test_means_and_deviations_over_the_seeds(markdown: str) -> None:
    means = tables(markdown)[1]
    prog = sum(20 * seconds_of(*size, 1.0) for _, _, size, _ in PROG)
    assert [row["recipe"] for row in means] == ["original", "prog"]
    assert means[0]["runs"] == means[1]["runs"] == "2"
    assert means[0]["top-1 best"] == f"90.00 ± {math.sqrt(2):.2f}"
    assert means[0]["train s"] == f"100.0 ± {20 * math.sqrt(2):.1f}"
    assert means[0]["speedup"].startswith("+0.0% ±")
    assert means[1]["top-1"] == f"86.50 ± {math.sqrt(0.5):.2f}"
    assert means[1]["train s"] == f"{1.1 * prog:.1f} ± {0.1 * prog * math.sqrt(2):.1f}"
    spread = (100 / prog - 100 / (1.2 * prog)) / math.sqrt(2)
    assert means[1]["speedup"] == f"{100 / (1.1 * prog) - 1:+.1%} ± {spread:.1%}"


def test_what_the_searches_decided(markdown: str) -> None:
    candidates = tables(markdown)[2]
    assert "stage 1 chose 16x4, alpha 0.1250; stage 2 chose 28x4, complete from schedule step 80." in markdown
    assert [row["candidate"] for row in candidates] == ["16x4", "16x6", "28x4", "28x6"] * 2
    assert [(row["stage"], row["candidate"]) for row in candidates if row["chosen"]] == [("1", "16x4"), ("2", "28x4")]
    assert [row["score"] for row in candidates[4:]] == ["1.9000", "1.8000", "1.7000", "–"]
    assert candidates[1] == {
        "stage": "1", "candidate": "16x6", "loss": "1.4200", "step ms": f"{1e3 * seconds_of(16, 6, 1.0):.4g}",
        "score": "1.8000", "chosen": "",
    }  # fmt: skip


def test_a_phase_that_waits_for_data_is_named_with_what_helps(tmp_path: Path) -> None:
    run = Writer(tmp_path / "hungry", "linear")
    for phase in PROG[:3]:
        run.train(*phase)
    shares = {1: (0.5, 0.6), 2: (0.03, 1.0), 3: (0.2, 0.9)}
    """By stage: the part of the time in which the host waits, and that in which the device works."""
    for row in run.rows:
        if "loss" in row:
            waited, busy = shares[row["stage"]]
            row |= {"images_per_second": 64 * busy / row["step_seconds"], "data_wait_share": waited}
    text = write_report([run.save(finished=False)], tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    (table,) = (each for each in tables(markdown) if "waiting" in each[0])
    assert [(row["stage"], row["network"], row["waiting"]) for row in table] == [
        ("1", "16x4", "40.0%"), ("2", "20x5", "0.0%"), ("3", "24x7", "10.0%")
    ]  # fmt: skip
    (told,) = (line for line in text.splitlines() if "waits for data" in line)
    assert told.startswith("hungry waits for data in 40% of stage 1 (16x4): use more cores and data.workers")
    run.rows = [row | {"data_wait_share": 0.04} for row in run.rows if "loss" in row]
    assert "waits for data" not in write_report([run.save(finished=False)], tmp_path / "out")


def test_the_pictures_show_something(told: tuple[str, Path], markdown: str) -> None:
    for name in ("accuracy_over_time.png", "schedule.png", "search.png", "timeline.png"):
        assert f"]({name})" in markdown
        with Image.open(told[1] / name) as picture:
            assert picture.format == "PNG"
            assert picture.width >= 1200
            assert picture.height >= 400
            colours = picture.convert("RGB").getcolors(picture.width * picture.height)
            assert len(colours) > 50
            blank = sum(count for count, colour in colours if min(colour) > 250) / (picture.width * picture.height)
            assert 0.1 < blank < 0.98


def test_every_run_has_a_row_of_its_life(markdown: str) -> None:
    rows = tables(markdown)[-1]
    assert [row["run"] for row in rows] == [
        "original-seed0", "original-seed1", "prog-seed0", "prog-seed1", "autoprog-seed0", "stacking-seed0"
    ]  # fmt: skip
    assert {row["starts"] for row in rows} == {"1"}
    assert rows[0]["checkpoint stall"] == "–"  # these events do not tell


def test_no_search_no_picture_of_one(runs: list[Path], tmp_path: Path) -> None:
    markdown = report(runs[:4], tmp_path / "out")
    assert "search.png" not in markdown
    assert not (tmp_path / "out" / "search.png").exists()


def test_a_restart_takes_back_what_was_told_of_later_steps(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", "automatic")
    run.train(*AUTOPROG[0])
    run.train(*AUTOPROG[1])
    beyond = len(run.rows)
    run.train(*AUTOPROG[2])  # lost: the run goes on from before
    del run.rows[beyond:], run.events[-1]
    run.events[-1] |= {"chosen": (16, 6), "complete_from": 999}  # what the lost search chose
    run.event("error", rank=1, message="RuntimeError: lost\nmore")
    run.step, run.train_seconds = 40, sum(row.get("step_seconds", 0.0) for row in run.rows)
    run.measure()
    run.event("start", world=4, engine="fsdp", device="cpu", host="node", reader_bytes=1)
    for phase in AUTOPROG[2:]:
        run.train(*phase)
    markdown = report([run.save()], tmp_path / "out")
    candidates = tables(markdown)[1]
    assert [(row["stage"], row["candidate"]) for row in candidates if row["chosen"]] == [("1", "16x4"), ("2", "28x4")]
    assert "999" not in markdown
    assert "- starts: 2 (at step 0, world size 2; at step 40, world size 4)" in markdown
    assert "- growths in 1.25 s: 5 (stage 1 supernet up to 28x6 at step 0 (0.25 s); stage 1 16x4 at step 20" in markdown
    assert "- checkpoints: 5 in 2.50 s, 5.0 MiB in all" in markdown
    assert "- error at step 60 on rank 1: RuntimeError: lost\n" in markdown


def test_a_choice_that_was_lost_and_not_yet_taken_again_is_not_told(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", "automatic")
    run.train(*AUTOPROG[0])
    run.rows = [row for row in run.rows if row["step"] <= 10]
    run.step = 10
    run.event("start", world=2, engine="fsdp", device="cpu", host="node", reader_bytes=1)
    markdown = report([run.save(finished=False)], tmp_path / "out")
    assert "stage 1 is not decided yet." in markdown
    assert (tmp_path / "out" / "search.png").exists()
    assert tables(markdown)[0][0]["stages"] == "..."


def on_other_data(run: Path) -> Path:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "data": {"path": "data/other"}}))
    return run


def test_only_runs_on_the_same_data_are_compared(runs: list[Path], tmp_path: Path) -> None:
    other = [
        on_other_data(finished(tmp_path / "other", "linear", PROG, 70.0)),
        on_other_data(finished(tmp_path / "base", "original", ORIGINAL, 75.0, full=2.0)),
    ]
    markdown = report([runs[0], runs[2], *other], tmp_path / "out")
    assert "prog (Prog 0.5Ω) reaches 87.00 % where original reaches 89.00 %" in markdown
    assert "other (Prog 0.5Ω) reaches 71.00 % where base reaches 76.00 %" in markdown
    assert markdown.count(" reaches ") == 4
    assert "The baseline for other is **base**" in markdown
    assert (tmp_path / "out" / "verdict2.png").exists()
    alone = report([runs[0], other[0]], tmp_path / "alone")
    assert {row["run"]: row["speedup"] for row in tables(alone)[0]} == {"original-seed0": "+0.0%", "other": "–"}


def test_a_second_run_with_a_seed_is_no_second_seed(tmp_path: Path) -> None:
    one, same, two = (finished(tmp_path / f"run{i}", "linear", PROG, 80.0 + i, seed=i // 2) for i in range(3))
    [row] = tables(report([one, same, two], tmp_path / "out"))[1]
    assert row["recipe"] == "run0"
    assert row["runs"] == "2"
    assert row["top-1 best"] == "82.00 ± 1.41"


def test_without_a_finished_baseline_speedups_are_left_out(runs: list[Path], tmp_path: Path) -> None:
    markdown = report(runs[2:], tmp_path / "none")
    assert "no run has the schedule `original`" in markdown
    assert {row["speedup"] for table in tables(markdown)[:2] for row in table} == {"–"}
    (runs[0] / "results.json").unlink()
    assert "the `original` run has not finished" in report([runs[0], runs[2]], tmp_path / "unfinished")
    assert "**original** with 120.0 s of training steps." in report([runs[0], runs[1]], tmp_path / "other-seed")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [finished(tmp_path / host / "original-seed0", "original", ORIGINAL, smallest=s) for host, s in
               (("a", 0.5), ("b", 0.4))]  # fmt: skip
    rows = tables(report([*folders, folders[0]], tmp_path / "out"))[0]
    assert [row["run"] for row in rows] == ["a/original-seed0", "b/original-seed0"]


def test_a_schedule_by_hand_and_the_supernet_have_names(tmp_path: Path) -> None:
    by_hand = finished(tmp_path / "hand", [{"resolution": 28, "depth": 8}], ORIGINAL)
    supernet = Writer(tmp_path / "supernet", "supernet")
    supernet.train("supernet", 1, FULL, 30)
    rows = tables(report([by_hand, supernet.save(finished=False)], tmp_path / "out"))[0]
    assert [row["schedule"] for row in rows] == ["by hand", "Supernet 0.5Ω"]


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", "automatic")
    run.measure()
    row = tables(report([run.save(finished=False)], tmp_path / "out"))[0][0]
    assert (row["run"], row["train s"], row["top-1"]) == ("run (unfinished)", "0.0", "–")


def test_the_terminal_is_told_the_table_and_the_place(told: tuple[str, Path]) -> None:
    text, out = told
    header, *lines, blank, prog, autoprog, place = text.splitlines()
    columns = ["run", "schedule", "top-1 best", "train s", "speedup", "wall s"]
    assert header.split() == " ".join(columns).split()
    assert len(lines) == 6
    assert "-16.7%" in lines[1]
    assert blank == ""
    assert prog == (
        "prog (Prog 0.5Ω) reaches 87.50 % where original reaches 90.00 %, in 47 s of training instead of 100 s (+114% "
        "speedup), and in 54 s instead of 107 s of wall time (+99%)."
    )
    assert autoprog.startswith("autoprog (AutoProg 0.5Ω) reaches")
    assert Path(place) == out / "report.md"


def test_the_report_names_no_place_of_this_machine(told: tuple[str, Path], markdown: str) -> None:
    assert str(told[1].parent) not in markdown


RECORDS = ("metrics", "events")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: run.rename(run.with_name("away")), "no such run directory"),
        (lambda run: (run / "recipe.yaml").unlink(), "no recipe.yaml"),
        (lambda run: [(run / f"{name}.jsonl").unlink() for name in RECORDS], "has not recorded anything"),
        (
            lambda run: [(run / f"{name}.jsonl").write_text("") for name in ("metrics", "events")],
            "has not recorded any",
        ),
        (lambda run: (run / "results.json").write_text('{"top1": '), "results.json: not readable"),
        (lambda run: (run / "recipe.yaml").write_text("- a list"), "recipe.yaml: a recipe must be a mapping"),
        (lambda run: (run / "results.json").write_text('{"top1": 1.0}'), "results.json: expected the keys stages"),
    ],
)
def test_what_is_no_run_is_named(runs: list[Path], tmp_path: Path, spoil: Any, message: str) -> None:
    spoil(runs[2])
    with pytest.raises(CheckpointError, match=message) as error:
        write_report(runs, tmp_path / "out")
    assert str(runs[2]) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_no_runs_and_no_folder(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name at least one"):
        write_report([], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ScaleprogError, match="cannot create a folder for the report"):
        write_report(runs, tmp_path / "file")


@pytest.mark.parametrize("order", [("photos-seed0", "photos"), ("photos", "photos-seed0")])
def test_a_recipe_whose_short_name_is_anothers_run_is_not_lost(order: tuple[str, str], tmp_path: Path) -> None:
    schedules = {"photos-seed0": ("original", ORIGINAL), "photos": ("linear", PROG)}
    runs = [finished(tmp_path / name, *schedules[name]) for name in order]
    _, groups = read_groups(runs)
    assert {group.name: group.runs[0].schedule.split()[0] for group in groups} == {
        "photos-seed0": "Original", "photos": "Prog"
    }  # fmt: skip


def test_runs_of_a_sweep_that_wait_are_left_out(tmp_path: Path) -> None:
    finished(tmp_path / "sweep/a-seed0", "original", ORIGINAL)
    (tmp_path / "sweep/b-seed0").mkdir()
    shutil.copy(tmp_path / "sweep/a-seed0/recipe.yaml", tmp_path / "sweep/b-seed0")
    told, _ = read_groups([tmp_path / "sweep"])
    assert [run.name for run in told] == ["a-seed0"]
    with pytest.raises(CheckpointError, match="has not recorded anything yet"):
        read_groups([tmp_path / "sweep/b-seed0"])
    shutil.rmtree(tmp_path / "sweep/a-seed0")
    with pytest.raises(CheckpointError, match="none of its 1 runs has begun"):
        read_groups([tmp_path / "sweep"])


def test_scoring_is_part_of_the_time_of_training(tmp_path: Path) -> None:
    """As in results.json, so that a curve and the marks of its stages have one clock."""
    run = Writer(tmp_path / "run", "automatic")
    run.train("supernet", 1, FULL, 2 * EPOCH)
    run.train("train", 1, (16, 4), EPOCH)
    scored = [event for event in run.events if event["event"] == "measurement"]
    for event in scored:
        event["seconds"] = 0.5
    record = read_run(run.save(finished=False), "run")
    steps = sum(row["step_seconds"] for row in run.rows if "loss" in row)
    supernet = sum(row["step_seconds"] for row in run.rows[: 2 * EPOCH])
    assert len(scored) == 3
    assert record.results["train_seconds"] == pytest.approx(steps + 1.5)
    assert [segment.seconds for segment in record.segments] == pytest.approx([0.5, supernet + 1.5])


def test_the_time_of_a_fork_is_its_own(tmp_path: Path) -> None:
    """Its records begin with those of its parent, as `write_fork` leaves them."""
    run = Writer(tmp_path / "fork", "original")
    run.train("train", 1, FULL, 40)
    parents, kept = run.train_seconds, [e for e in run.events if e["event"] in ("growth", "measurement")]
    run.events = [{**event, "generation": 0} for event in kept]
    run.event("forked", generation=0, run="parent")
    run.event("start", generation=1, world=2, startup_seconds=1.0)
    own = run.step
    run.train("train", 1, FULL, 20)
    for row in run.rows:
        row["time"] = 2e9 + row["step"]
    for event in run.events:
        event["time"] = 2e9 + own
    timeline = read_run(run.save(finished=False), "fork").timeline
    assert timeline is not None
    assert timeline.costs["training"] == pytest.approx(run.train_seconds - parents)
    assert timeline.costs["growth"] == 0.25
