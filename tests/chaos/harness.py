"""Runs under faults, compared with the undisturbed run.

    python -m tests.chaos.harness [--runs 25] [--seed 0] [--engine fsdp] [--model vit] [--out docs/results/chaos.md]

A run of `scaleprog train` is started as a user would: the same command again after each exit that says "try again" or
each kill of all. A Slurm job comes back by itself. Jobs need root, for the cluster.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from scaleprog.errors import EXIT_CODE, MISTAKE_CODE
from scaleprog.files.atomic import write_whole
from scaleprog.recipe import Recipe
from scaleprog.recipe.keys import Engine
from scaleprog.rundir.recorder import read_rows
from tests.chaos import on_slurm
from tests.chaos.faults import HANGS, KINDS, MOMENTS, SLURM_KINDS, STRUCK, WAIT_LONG, Fault, damage
from tests.compare import differences
from tests.conftest import draw_patterns, short_recipe
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import own_number

SAVE_STEPS = 7  # the least that a kill can lose is counted against it
STARTS = 6
ENGINES: dict[Engine, str] = {
    "fsdp": "Sharded over all ranks",
    "hsdp": "Two copies of the model, each sharded over half of the ranks",
    "zero": "Stage 3",
}
MODELS: dict[str, dict[str, dict[str, object]]] = {
    "vit": {"model": {"drop_path": 0.2}, "augment": {"mixup": 0.8}},
    "volo": {
        "model": {"name": "volo_d1_224", "patch": 4, "width": 32, "depth": 6, "heads": 2, "drop_path": 0.2},
        "augment": {"mix_token": True},
    },
}
START_SECONDS = 900  # more than a start takes, even on a machine that has other things to do
PATIENCE = 0.2  # minutes; longer than any step takes, even on such a machine
TOLD = ("checkpoint_failed", "preempted", "hurried", "hang")
HEAD = (
    "fault", "moment", "rank", "started by", "struck at step", "starts", "steps trained again", "told",
    "equal to undisturbed",
)  # fmt: skip
DISK = 8 * 2**20


Command = Callable[[list[str]], subprocess.CompletedProcess[str]]
"""Runs tests.chaos.faults with arguments, in a session of its own."""


def command_anew(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """By an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.chaos.faults", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=START_SECONDS, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a run under a fault ended."""

    fault: Fault
    ranks: int
    step: int
    """At which the fault struck; -1 if it never did."""
    starts: int
    lost: int
    """Steps that were trained again."""
    told: str
    """What the run said about checkpoints that failed or were skipped."""
    wrong: list[str]
    """What differs from the undisturbed run."""


class Chaos:
    """A folder with shards, runs of one recipe on one engine, and the undisturbed ones among them."""

    def __init__(
        self,
        folder: Path,
        engine: Engine = "fsdp",
        cluster: Cluster | None = None,
        model: str = "vit",
        command: Command = command_anew,
    ) -> None:
        """`cluster`: for faults of Slurm jobs, brought up as each needs it; `model`: one of MODELS; `command`: runs
        tests.chaos.faults."""
        self.folder, self.engine, self.cluster, self.model, self.command = folder, engine, cluster, model, command
        self.shards = draw_patterns(folder / "shards")

    def recipe(self, ranks: int) -> Recipe:
        """What is trained on so many ranks; under hsdp they hold two copies of the model."""
        sharding: dict[str, object] = {"engine": self.engine}
        if self.engine == "hsdp":
            sharding["shard"] = ranks // 2
        return short_recipe(
            self.shards,
            model=MODELS[self.model]["model"],
            augment={"crop": "resized", "scale": (0.4, 1.0), "eval_crop": 0.875, **MODELS[self.model]["augment"]},
            optimizer={"clip": 1.0},
            data={"trace": True, "workers": 1},
            checkpoint={"every_steps": SAVE_STEPS},
            sharding=sharding,
        )

    def recipe_under(self, fault: Fault, ranks: int) -> Recipe:
        """The same, with less patience where the fault lets ranks wait."""
        recipe = self.recipe(ranks)
        if fault.kind not in WAIT_LONG:
            return recipe
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"patience": PATIENCE})})

    def reference(self, ranks: int) -> Path:
        """The undisturbed run on so many ranks."""
        folder = self.folder / f"undisturbed-{ranks}"
        if not folder.exists():
            nothing = Fault("TERM", "never", -1, 0)
            done = self._start(folder, ranks, nothing)
            assert done.returncode == 0, done.stdout
        return folder

    def run(self, fault: Fault, ranks: int, name: str) -> Outcome:
        """Trains under the fault to the end. Raises RuntimeError if the run does not end by itself."""
        folder = self.folder / name
        if fault.kind == "full disk":
            with small_disk(folder):
                return self._run(fault, ranks, folder)
        return self._run(fault, ranks, folder)

    def _run(self, fault: Fault, ranks: int, folder: Path) -> Outcome:
        if fault.kind in SLURM_KINDS:
            assert self.cluster is not None
            on_slurm.run(self.cluster, fault, self.recipe_under(fault, ranks), folder, ranks)
        else:
            self._train(fault, ranks, folder)
        events = read_rows(folder / "events.jsonl")
        struck = folder / STRUCK
        return Outcome(
            fault, ranks,
            step=json.loads(struck.read_text())["step"] if struck.exists() else -1,
            starts=sum(event["event"] == "start" for event in events),
            lost=sum(event.get("repeated_steps", 0) for event in events),
            told=", ".join(sorted({event["event"] for event in events} & set(TOLD))),
            wrong=differences(self.recipe(ranks), folder, self.reference(ranks)),
        )  # fmt: skip

    def _train(self, fault: Fault, ranks: int, folder: Path) -> None:
        """By `scaleprog train`, again and again until it is finished."""
        for starts in range(1, STARTS + 1):
            done = self._start(folder, ranks, fault)
            if done.returncode == 0:
                break
            refused = done.returncode == MISTAKE_CODE and starts == 1 and fault.kind == "not a number"
            if done.returncode not in (EXIT_CODE, -signal.SIGKILL) and not refused:
                raise RuntimeError(f"{fault}: exit code {done.returncode}\n{done.stdout}")
            if starts == 1:
                damage(fault, folder)
            if starts == 1 and fault.kind == "other data":
                other = self._start(folder, ranks, fault, draw_patterns(self.folder / f"other-{folder.name}", seed=9))
                if other.returncode != MISTAKE_CODE or "other data" not in other.stdout:
                    raise RuntimeError(f"{fault}: trained on other data: {other.returncode}\n{other.stdout}")
        else:
            raise RuntimeError(f"{fault}: not finished after {STARTS} starts\n{done.stdout}")

    def _start(
        self, folder: Path, ranks: int, fault: Fault, shards: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        recipe, trained = self.folder / f"recipe-{ranks}.yaml", self.recipe_under(fault, ranks)
        if shards is not None:
            data = trained.data.model_copy(update={"path": str(shards)})
            trained = trained.model_copy(update={"data": data})
        recipe.write_text(trained.dump())
        return self.command([str(recipe), str(folder), str(ranks), json.dumps(asdict(fault))])


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of DISK bytes at `folder`; only root can mount it."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def draw(runs: int, seed: int, slurm: bool = True) -> list[tuple[Fault, int]]:
    """Faults and rank counts: every kind and every moment in turn, shuffled against each other, the rest at random."""
    rng = random.Random(seed)
    every = KINDS + SLURM_KINDS if slurm else KINDS
    kinds = [kind for _ in range(-(-runs // len(every))) for kind in rng.sample(every, len(every))][:runs]
    moments = [moment for _ in range(-(-runs // len(MOMENTS))) for moment in rng.sample(MOMENTS, len(MOMENTS))][:runs]
    drawn = []
    for kind, moment in zip(kinds, moments):
        ranks = 2 if kind in SLURM_KINDS else rng.choice((2, 2, 4))
        writes = kind in ("kill before the rename", "kill in retention", "full disk")  # rank 0's business
        rank = 0 if writes else rng.randrange(ranks)
        by = rng.choice(on_slurm.BOTH) if kind in SLURM_KINDS else "train"
        delay = 0.0 if kind in (*SLURM_KINDS, *HANGS) else rng.choice((0.0, rng.uniform(0, 0.3)))
        drawn.append((Fault(kind, moment, rank, delay, by), ranks))
    return drawn


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def put_section(path: Path, heading: str, text: str) -> None:
    """Puts `text` under a heading of a Markdown file, in place of what stood there."""
    sections = (path.read_text() if path.exists() else "").split("## ")
    others = [s.strip() for s in sections if s.strip() and s.split("\n")[0] != heading]
    whole = sorted([*others, f"{heading}\n\n{text.strip()}"])
    write_whole(path, "\n\n".join(f"## {section}" for section in whole) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=len(KINDS + SLURM_KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default="fsdp")
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--out", type=Path, help="a file with a section for each engine; every run replaces this one's")
    options = parser.parse_args()
    rows = [row(HEAD), row(["---"] * len(HEAD))]
    slurm = os.geteuid() == 0
    without = "" if slurm else "; no Slurm jobs: only root can bring a cluster up"
    print(f"{options.engine}, seed {options.seed}{without}", flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    command = f"make chaos N={options.runs} SEED={options.seed} ENGINE={options.engine} MODEL={options.model}"
    failed = 0
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        cluster = Cluster(stack.enter_context(own_number())) if slurm else None
        if cluster is not None:
            stack.callback(cluster.down)
        chaos = Chaos(Path(folder), options.engine, cluster, options.model)
        for number, (fault, ranks) in enumerate(draw(options.runs, options.seed, slurm)):
            began = time.monotonic()
            outcome = chaos.run(fault, ranks, f"run-{number}")
            good = not outcome.wrong and outcome.step >= 0
            failed += not good
            equal = "bit for bit" if good else "**NO**: " + ", ".join(outcome.wrong[:3])
            rows.append(row([fault.kind, fault.moment, f"{fault.rank} of {ranks}", fault.by, outcome.step,
                             outcome.starts, outcome.lost, outcome.told, equal]))  # fmt: skip
            print(f"{rows[-1]} {time.monotonic() - began:.0f} s", flush=True)
            text = (
                f"{ENGINES[options.engine]}. {number + 1} runs by `{command}` of commit {commit or 'unknown'}, "
                f"{failed} not equal. A checkpoint every {SAVE_STEPS} steps; a signal that gave notice costs none."
            )
            if options.out:
                put_section(options.out, f"{options.model}, {options.engine}", text + "\n\n" + "\n".join(rows))
    print(text)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
