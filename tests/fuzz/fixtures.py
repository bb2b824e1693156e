"""Valid inputs, made once by real starts: shards, a recipe, a finished run, one that was stopped, another run's."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from webdataset.writer import ShardWriter

from scaleprog.recipe import Recipe
from scaleprog.shards.check import write_manifest
from tests.conftest import CLASSES, pattern, short_recipe
from tests.fuzz import records
from tests.fuzz.checkpoints import steps
from tests.fuzz.server import End, ForkServer, Start

SHARDS, RECIPE, RUN, RUN_AS = "shards", "recipe.yaml", "run", "recipe-of-the-run.yaml"
STOPPED, GOAL = 26, 28
"""After which step the stopped run stands, and to which a case continues it."""
SEARCHING, SEARCHED = 2, 4
"""The same of a run that is about to measure."""
KEPT = 3
SLURM = {
    "scontrol": '[ "$1" = requeue ] && {{ echo "$*" >> "{calls}"; exit 0; }}\n'
    'echo "JobId=7 JobName={job} UserId=me(1) JobState=RUNNING Reason=None Requeue=1 Restarts=0 ExitCode=0:0 '
    'TimeLimit=00:05:00 EndTime=Unknown PreemptTime=None NodeList=node0 BatchHost=node0"',
    "scancel": 'echo "scancel $*" >> "{calls}"',
    "sacct": "exit 1",
}
"""What stands in for Slurm: job 7 runs, under the name `{job}`."""


@dataclass(frozen=True)
class Told:
    """How a start ended, what it printed, whom it signalled and what it asked of Slurm."""

    end: End
    text: str
    signals: str = ""
    calls: str = ""


@dataclass
class Intact:
    """The folder of valid inputs, and what the commands say of them."""

    folder: Path
    rows: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """The undisturbed run's rows by step."""
    said: dict[str, str] = field(default_factory=dict)
    """What commands print on intact input, by a name of the command."""


class Work:
    """The folder that one case changes, with copies of the valid inputs."""

    def __init__(self, folder: Path, intact: Intact, run: str = "stopped") -> None:
        self.intact, self.folder, self.work = intact, folder, folder / "work"
        self.shards, self.recipe, self.run = self.work / SHARDS, self.work / RECIPE, self.work / RUN
        self.foreign = intact.folder / "foreign" / "checkpoints"
        self.work.mkdir(parents=True)
        shutil.copytree(intact.folder / SHARDS, self.shards, copy_function=os.link)
        shutil.copy(intact.folder / RECIPE, self.recipe)
        shutil.copytree(intact.folder / run, self.run)

    def slurm(self, job: str = "scaleprog-run") -> dict[str, str]:
        """An environment whose Slurm knows job 7 under a name."""
        folder = self.folder / "slurm"
        folder.mkdir()
        for name, script in SLURM.items():
            path = folder / name
            path.write_text("#!/bin/sh\n" + script.format(calls=self.folder / "calls", job=job) + "\n")
            path.chmod(0o755)
        return {"PATH": f"{folder}:{os.environ['PATH']}"}

    def start(self, module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Start:
        return Start(
            module, tuple(map(str, arguments)), str(self.work), str(self.folder / "said"), str(self.folder / "signals"),
            dict(environment or {}),
        )  # fmt: skip

    def told(self, end: End) -> Told:
        """What is known of a start that has ended."""
        return Told(end, *(_read(self.folder / name) for name in ("said", "signals", "calls")))


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape") if path.is_file() else ""


def make(folder: Path, server: ForkServer) -> Intact:
    """Makes the valid inputs in a folder."""
    with redirect_stdout(None):
        draw_shards(folder / SHARDS)
    (folder / RECIPE).write_text(recipe(Path(SHARDS)).dump())
    intact = Intact(folder)

    def scaleprog(*arguments: object, at: Path = folder) -> str:
        start = Start("scaleprog", tuple(map(str, arguments)), str(at), str(folder / "said"), str(folder / "signals"))
        end = server.run(start)
        text = (folder / "said").read_text()
        if end.code or end.hung or end.swollen:
            raise RuntimeError(f"{arguments}: {end}\n{text}")
        return text

    scaleprog("train", RECIPE, "--run-dir", "finished")
    scaleprog("train", RECIPE, f"train.max_steps={STOPPED}", "--run-dir", "stopped")
    scaleprog("train", RECIPE, f"train.max_steps={STOPPED}", "seed=1", "--run-dir", "foreign")
    scaleprog("train", RECIPE, f"train.max_steps={SEARCHING}", "--run-dir", "searching")
    for name in ("finished", "stopped", "foreign"):
        for path in steps(folder / name / "checkpoints")[:-KEPT]:
            shutil.rmtree(path)
    rows = [json.loads(line) for line in (folder / "finished" / "metrics.jsonl").read_text().splitlines()]
    intact.rows = {row["step"]: row for row in rows if "loss" in row}
    older = folder / "older"
    shutil.copytree(folder / "stopped", older / RUN)
    (older / SHARDS).symlink_to(folder / SHARDS)
    for path in reversed(steps(older / RUN / "checkpoints")):
        intact.said[f"evaluate {path.name}"] = scaleprog("evaluate", RUN, at=older)
        shutil.rmtree(path)
    intact.said["check"] = scaleprog("shards", "check", SHARDS, "--workers", 1)
    intact.said["plan"] = scaleprog("plan", RECIPE)
    events = [json.loads(line) for line in (folder / "finished" / "events.jsonl").read_text().splitlines()]
    measured = next(e for e in events if e["event"] == "measurement" and e["step"] > SEARCHING)
    for name in ("finished", "stopped", "searching"):
        records.complete(folder / name, measured["step"], [pair[:2] for pair in measured["losses"]])
    return intact


def draw_shards(folder: Path) -> None:
    """3 + 2 shards of patterns; enough validation images that accuracies tell networks apart."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count, per_shard in (("train", 80, 27), ("val", 120, 60)):
        with ShardWriter(str(folder / f"{split}-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
            for i in range(count):
                image = cv2.imencode(".png", pattern(i % CLASSES, rng))[1].tobytes()
                writer.write({"__key__": f"{split}{i:05d}", "png": image, "cls": i % CLASSES})
    write_manifest(folder, workers=1)


def recipe(shards: Path) -> Recipe:
    """40 steps in two stages, with a search whose choice does not depend on clocks."""
    return short_recipe(
        shards,
        model={"drop_path": 0.1},
        train={"epochs": 4, "batch": 8, "log_every": 5},
        optimizer={"lr": 3e-3, "warmup_epochs": 0.1},
        growth={"schedule": "automatic", "stages": 2, "smallest": 0.5},
        search={"method": "published", "epochs": 0.5, "subset": 8, "times": "modelled"},
        sharding={"engine": "replicated"},
        checkpoint={"every_steps": 10, "keep": 9},
        evaluate={"every": 2, "batch": 60},
    )
