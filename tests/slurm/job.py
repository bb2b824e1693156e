"""A training job on the cluster, and what a test must know of it: where it stands, what it said, how to hold it."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from scaleprog.launchers.attempt import Attempt
from scaleprog.recipe import Recipe
from scaleprog.rundir.folders import committed_step
from scaleprog.rundir.reading import read_rows
from scaleprog.rundir.records import REQUEUES
from scaleprog.rundir.slurm_queue import OVER
from tests.slurm.cluster import Cluster
from tests.slurm.control import Control

ROOT = Path(__file__).parents[2]
HOOK = ROOT / "tests" / "slurm" / "hook"
SECONDS = 180.0  # more than anything takes, even on a machine that has other things to do
By = Literal["submit", "sbatch"]
BOTH: tuple[By, By] = ("submit", "sbatch")
OWN = (
    "nodes", "spare_nodes", "restart", "tasks_per_node", "time", "signal_before", "partition", "account", "qos",
    "sweep",
)  # fmt: skip
"""Options that `scaleprog submit` has itself."""
T = TypeVar("T")


class TrainingJob:
    """A recipe trained in a run directory by `scaleprog submit` or by slurm/train.sbatch, on nodes x tasks ranks.

    `nodes`: those that train, where `submit` asks for a range.

    Args:
        cluster: where.
        recipe: what.
        run: the run directory.
        by: which way.
        beside: where control files, the recipe and sbatch's log are put; default: beside the run directory.
        hooks: module:function to be called in every task before it trains, besides the one that lets it be held.
    """

    def __init__(
        self,
        cluster: Cluster,
        recipe: Recipe,
        run: Path,
        by: By,
        nodes: int = 2,
        tasks_per_node: int = 1,
        beside: Path | None = None,
        hooks: tuple[str, ...] = (),
    ) -> None:
        self.cluster, self.recipe, self.run, self.by = cluster, recipe, run, by
        self.nodes, self.tasks_per_node = nodes, tasks_per_node
        self.hooks = ("tests.slurm.control:install", *hooks)
        self.id = ""
        self.in_sweep = False
        self.held_step: int | None = None
        self.beside = beside or run.parent
        self.control = Control(self.beside / f"{run.name}.control")
        self.control.folder.mkdir(parents=True, exist_ok=True)
        self.recipe_file = self.beside / f"{run.name}.yaml"
        self.recipe_file.write_text(recipe.dump())

    # ---- what is done to it

    def submit(self, signal_before: int = 60, **options: str) -> None:
        """Submits it, or the same again; `options` of sbatch. Raises RuntimeError with what was said against it.

        With an option `sweep`, it is the first run of that sweep, whose folder is the parent of the run directory.
        """
        options = {"nodes": str(self.nodes), "time": "60", **options}
        self.in_sweep = "sweep" in options
        folder = self.run.parent if self.in_sweep else self.run
        command: list[str | Path]
        spare = 0  # for sbatch; `submit` takes the option
        least, colon, most = options["nodes"].partition(":")
        if self.by == "submit":
            options |= {"tasks_per_node": str(self.tasks_per_node), "signal_before": str(signal_before)}
            command = [sys.executable, "-m", "scaleprog", "submit", self.recipe_file, f"--run-dir={folder}"]
            command += [
                _option(*option) if option[0] in OWN else f"--sbatch={_option(*option)}" for option in options.items()
            ]
        else:
            if colon:  # with ntasks_per_node Slurm would give least x tasks_per_node nodes at most
                options["nodes"] = f"{least}-{most}"
            else:
                options["ntasks_per_node"] = str(self.tasks_per_node)
            spare = int(options.pop("spare_nodes", 0))
            if spare:
                options |= {"nodes": str(int(least) + spare), "no_kill": ""}
            options["signal"] = f"USR2@{signal_before}"
            options |= {"output": f"{self.beside}/%j.log"}
            command = ["sbatch", "--parsable", *(_option(*option) for option in options.items())]
            command += [ROOT / "slurm" / "train.sbatch", self.recipe_file, self.run]
        environment = [f"{key}={value}" for key, value in self._environment().items()]
        if colon:
            environment.append(f"MIN_NODES={least}")
        if spare:
            environment.append(f"SPARE_NODES={spare}")
        told = self.cluster.run(["env", f"--chdir={ROOT}", *environment, *command], seconds=SECONDS).stdout
        self.id = re.findall(r"\d+", told)[0] + "_0" * self.in_sweep

    def _environment(self) -> dict[str, str]:
        """What sbatch hands on to the job."""
        return {
            "PYTHONPATH": f"{HOOK}{os.pathsep}{ROOT}",  # the job puts its snapshot of the code before them
            "PYTHON": sys.executable,
            "TASK_HOOKS": " ".join(self.hooks),
            "CONTROL": str(self.control.folder),
        }

    def hold_at(self, step: int) -> None:
        """Holds it after this step instead of where it is, or was to be, held."""
        if self.held_step is not None:
            self.control.release("step", self.held_step)
        self.held_step = step
        self.control.hold("step", step)

    def go_on(self) -> None:
        """Lets it train on from where it is held."""
        if self.held_step is not None:
            self.control.release("step", self.held_step)
        self.held_step = None

    def finish(self) -> None:
        """Lets it train to the end, undisturbed."""
        self.go_on()
        self.control.slow_down(0)
        self.wait_state("COMPLETED")

    def processes(self, rank: int) -> list[int]:
        """The pids of a rank's process, seen from this machine; without those that it has forked."""
        wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={rank}".encode()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((folder / "environ").read_bytes().split(b"\0"))
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                wanted <= variables
                and {b"scaleprog.launchers.task", b"submitit.core._submit"} & set(words)
                and b"-u" in words
            ):
                found += [int(folder.name)] * (b"python" in words[0])
        return [pid for pid in found if _parent(pid) not in found]

    # ---- where it stands

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    @property
    def repeats(self) -> int:
        """How often it has started its tasks again by itself since Slurm has last started it."""
        return sum(row.get("here", False) and row["restart"] == self.restarts for row in self.requeues())

    @property
    def start(self) -> str:
        """As `Control` names the present start."""
        return str(Attempt(self.id, self.restarts, self.repeats))

    def show(self) -> dict[str, str]:
        return self.cluster.show(self.id)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The run's events, of all starts."""
        events = read_rows(self.run / "events.jsonl")
        return [event for event in events if kind is None or event["event"] == kind]

    def signals(self) -> list[str]:
        """The signals that the run has heard since its last start."""
        events = self.events()
        begun = max((i for i, event in enumerate(events) if event["event"] == "start"), default=0)
        return [event["signal"] for event in events[begun:] if event["event"] == "signal"]

    def trained(self) -> int:
        """The last step that was written down."""
        return max((row["step"] for row in read_rows(self.run / "metrics.jsonl") if "loss" in row), default=0)

    def committed(self) -> int:
        """The step of the newest visible checkpoint."""
        return committed_step(self.run)

    def requeues(self) -> list[dict[str, Any]]:
        """What the batch script decided at the ends of the starts."""
        return read_rows(self.run / REQUEUES)

    def log(self) -> str:
        """Everything that the job has printed, of all its tasks and starts."""
        if self.by == "sbatch":
            paths = [self.beside / f"{self.id}.log"]
        else:
            folder = self.run.parent if self.in_sweep else self.run
            paths = sorted(folder.glob(f"jobs/*/{self.id}_*log.*"))
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def told(self) -> str:
        """What there is to say where something went wrong."""
        lines = self.log().splitlines()[-60:]
        events = [str(event) for event in self.events()[-8:]]
        return "\n".join([f"{self.by}: {self.show()}", *events, *lines, self.cluster.log()])

    # ---- waiting

    def wait(self, what: str, condition: Callable[[], T], seconds: float = SECONDS) -> T:
        """Waits for a condition to be true and returns its value. Raises TimeoutError with all that is known."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f"{self.by}, job {self.id}: {seconds:.0f} s and not {what}\n{self.told()}")
            time.sleep(0.1)
        return value

    def wait_held(self, kind: str = "step", step: int | None = None) -> None:
        """Waits until all ranks of the present start are held at a moment, by default that of `hold_at`."""
        at = self.held_step if step is None else step
        assert at is not None

        def all_held() -> bool:
            job = self.show()
            if job["JobState"] in OVER:
                raise RuntimeError(f"{self.by}, job {self.id}: ended before {kind} {at}\n{self.told()}")
            return len(self.control.held(kind, at, self.start)) == self.ranks

        self.wait(f"held at {kind} {at}", all_held)

    def wait_state(self, *states: str, restarts: int = 0) -> dict[str, str]:
        """Waits until Slurm has it in one of `states`, started again `restarts` times or more."""

        def there() -> dict[str, str] | None:
            job = self.show()
            if job["JobState"] in OVER and job["JobState"] not in states:
                raise RuntimeError(
                    f"{self.by}, job {self.id}: {job['JobState']}, not {' or '.join(states)}\n{self.told()}"
                )
            return job if job["JobState"] in states and int(job["Restarts"]) >= restarts else None

        return self.wait(f"{' or '.join(states)} with {restarts} restarts", there)


def _parent(pid: int) -> int:
    """The process that has started another; 0 if that has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _option(key: str, value: str) -> str:
    return f"--{key.replace('_', '-')}{value and f'={value}'}"
