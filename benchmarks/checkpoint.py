"""What never losing a run costs: checkpoints, the agreement on a last step, leaving and coming back.

    python benchmarks/checkpoint.py [--saves 5] [--out docs/results/checkpoint.md]

One process trains a DeiT-S (weights, one EMA, AdamW) and saves it, in turns with and without training beside the
writing. The agreement is timed on two ranks with steps as long as those of the Fashion-MNIST recipe's smallest network
(16 px, 3 layers, batch 64), the shortest there are. Leaving and coming back are those of `scaleprog train` on that
recipe.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from scaleprog.errors import EXIT_CODE
from scaleprog.growth.operators import fresh
from scaleprog.launchers.local import launch
from scaleprog.models import resolve_family
from scaleprog.ranks.coordinator import process_group
from scaleprog.ranks.stop import Watch
from scaleprog.recipe import Recipe
from scaleprog.rundir.checkpoint import Checkpoints
from scaleprog.rundir.recorder import read_rows
from scaleprog.training.process import make_backend

MINUTE = 60.0
DEIT_S = "configs/imagenet/deit_small_original_100.yaml"
SMALL = "configs/fashion_mnist/prog.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/checkpoint.md"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = saving(Path(folder), options.saves) + agreement(Path(folder)) + leaving(Path(folder))
    method = (__doc__ or "").strip().rpartition("\n\n")[2]
    table = "".join(f"| {what} | {value} |\n" for what, value in rows)
    text = f"{method} {os.cpu_count()} CPU cores.\n\n| | |\n|---|---|\n{table}"
    options.out.write_text(text)
    print(text)


def saving(folder: Path, saves: int) -> list[tuple[str, str]]:
    """Saves of a DeiT-S with training at rest, and with training going on."""
    recipe = Recipe.load(DEIT_S, ["sharding.engine=replicated"])
    kind, full, _ = resolve_family(recipe.model)
    images = torch.randn(4, 3, full.resolution, full.resolution)
    labels = torch.zeros(4, dtype=torch.int64)
    with process_group() as (coordinator, device):
        backend = make_backend("replicated", recipe, kind, device)
        backend.regrow(fresh(kind.split(full.depth)), inherit=False, may_skip_layers=False)
        checkpoints = Checkpoints(folder / "checkpoints", coordinator, keep=1)

        def step() -> float:
            began = time.perf_counter()
            backend.backward(F.cross_entropy(backend.forward(images), labels))
            backend.step(1e-4, step=0)
            return time.perf_counter() - began

        for _ in range(3):
            step()
        size = sum(part.tensor.nbytes for part in backend.state().values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        at_rest, stalls, beside = [], [], []
        for number in range(saves):
            began = time.perf_counter()
            checkpoints.save(2 * number, {}, backend.state())
            checkpoints.wait()
            at_rest.append(time.perf_counter() - began)
            if number == 0:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            alone = statistics.median(step() for _ in range(5))
            began = time.perf_counter()
            checkpoints.save(2 * number + 1, {}, backend.state())
            stall, slower = time.perf_counter() - began, 0.0
            while not checkpoints.finished():
                slower += step() - alone
            stalls.append(stall)
            beside.append(stall + slower)
    still, whole, rest = (statistics.median(values) for values in (stalls, beside, at_rest))
    return [
        ("checkpoint of a DeiT-S with EMA and AdamW", f"{size / 2**20:.0f} MiB"),
        ("a blocking save (durable, checksummed, renamed)", f"{rest:.2f} s"),
        ("an asynchronous save: training pauses", f"{still:.3f} s, {still / rest:.1%} of the blocking save"),
        ("... plus the slowdown of steps during the save", f"{whole:.2f} s, {whole / rest:.1%} of the blocking save"),
        ("... once a minute", f"{whole / MINUTE:.2%} of the time"),
        ("peak memory that the first save adds, in copies of the shards", f"{peak * 1024 / size:.2f}"),
    ]


def agreement(folder: Path, repeats: int = 3) -> list[tuple[str, str]]:
    """`Watch.agree` on two ranks."""
    measured = []
    for _ in range(repeats):
        launch(2, step_and_ask, folder)
        measured.append(json.loads((folder / "agreement.json").read_text()))
    share, seconds = (statistics.median(values) for values in zip(*measured))
    return [("agreeing on a last step, 2 ranks", f"{share:.3%} of steps of {1e3 * seconds:.1f} ms")]


def step_and_ask(folder: Path) -> None:
    with process_group() as (coordinator, _):
        matrix, asked, began, steps = torch.randn(400, 400), 0.0, time.perf_counter(), 2000

        def nothing() -> None:
            pass

        def compute(seconds: float) -> None:
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                matrix @ matrix

        with Watch(coordinator, print, lambda: None, every_minutes=10) as watch:
            for _ in range(steps):
                compute(0.014)
                coordinator.barrier()  # as the gradients' reduction does: waiting for each other is no part of this
                compute(0.001)  # the optimizer
                before = time.perf_counter()
                watch.agree()
                between = time.perf_counter()
                nothing()
                asked += 2 * between - before - time.perf_counter()  # without what the clock costs
        seconds = (time.perf_counter() - began) / steps
        if coordinator.rank == 0:
            (folder / "agreement.json").write_text(json.dumps([asked / steps / seconds, seconds]))


def leaving(folder: Path, repeats: int = 3) -> list[tuple[str, str]]:
    """From a signal to the exit, and from the same command again to the next step."""
    leave, back, run = [], [], folder / "run"
    command = [sys.executable, "-m", "scaleprog", "train", SMALL, "train.log_every=1", "--nproc", "2", "--run-dir", run]
    known = 0
    for _ in range(repeats + 1):
        began = time.perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(rows := read_rows(run / "metrics.jsonl")) == 0 or rows[-1]["step"] <= known:
            time.sleep(0.05)
        back.append(time.perf_counter() - began)
        time.sleep(2)
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == EXIT_CODE
        leave.append(time.perf_counter() - began)
        known = read_rows(run / "metrics.jsonl")[-1]["step"]
    return [
        ("from signal to exit, 2 ranks, with a checkpoint", f"{statistics.median(leave):.2f} s"),
        ("from restart to the first step", f"{statistics.median(back[1:]):.1f} s"),
    ]


if __name__ == "__main__":
    main()
