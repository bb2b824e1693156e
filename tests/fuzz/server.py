"""Starts of the program by the hundred a minute: one process imports everything once, and forks a child for each start.

`python -m tests.fuzz.server` reads starts and writes ends, a line of JSON each. It stays single-threaded, so that a
child can do whatever a process just started can. `start_process` is the same by a process of its own.
"""

import gc
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import guard

SECONDS, BYTES = 10.0, 2 * 2**30
"""What a start may take."""
CAP_SECONDS = 60.0  # by the wall, however busy the machine is
SPARE_BYTES = 4 * 2**30  # what is refused to a child that grows faster than it is looked at
FILE_BYTES = 2**30
POLL_SECONDS = 0.02
IMPORT_BYTES = 2**30  # of a process of its own
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Start:
    """`python -m MODULE ARGUMENTS` in a folder. `said`: the file that its output goes to; `signals`: see `guard`."""

    module: str
    arguments: Sequence[str]
    folder: str
    said: str
    signals: str
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = SECONDS


@dataclass(frozen=True)
class End:
    """How a start ended: exit code (negative: the signal), seconds by the wall, bytes that it grew by, and whether it
    was ended for taking too much of either."""

    code: int
    seconds: float
    bytes: int
    hung: bool
    swollen: bool


class ForkServer:
    """The process that forks; start with `with`."""

    def __enter__(self) -> "ForkServer":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip
        return self

    def run(self, start: Start) -> End:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(start)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server has ended with {self._process.wait()}")
        return End(**json.loads(answer))

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def start_process(start: Start, seconds: float) -> End:
    """The same by a process of its own. `seconds`: what the imports take before it has begun."""
    limit = (IMPORT_BYTES + BYTES + SPARE_BYTES) // 1024
    command = [sys.executable, "-m", start.module, *start.arguments]
    if start.module == "scaleprog" and start.arguments[0] == "cancel":  # it must not signal whom it likes
        command[2:2] = ["tests.fuzz.guard", start.signals]
    with open(start.said, "wb") as said:
        process = subprocess.Popen(
            ["bash", "-c", f'ulimit -d {limit}; exec "$@"', "--", *command], stdin=subprocess.DEVNULL, stdout=said,
            stderr=subprocess.STDOUT, cwd=start.folder, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **start.environment},
        )  # fmt: skip
    end = watch(process.pid, start.seconds + seconds, IMPORT_BYTES)
    process.returncode = end.code
    return end


def watch(pid: int, seconds: float, baseline: int) -> End:
    """Waits for a child that leads a session, and ends it where it takes longer or grows over its limits.

    Time in which it waited for a processor does not count: the machine may be busy with other things.
    """
    began, hung, swollen, peak = time.monotonic(), False, False, 0
    handle = os.pidfd_open(pid)
    try:
        waiting = select.poll()
        waiting.register(handle, select.POLLIN)
        while not waiting.poll(POLL_SECONDS * 1000):
            peak = max(peak, resident(pid) - baseline)
            took = time.monotonic() - began
            hung = took > CAP_SECONDS or took - queued(pid) > seconds
            swollen = peak > BYTES
            if hung or swollen:
                kill_group(pid)
                break
    finally:
        os.close(handle)
    _, status, usage = os.wait4(pid, 0)
    kill_group(pid)  # whom it has left behind
    peak = max(peak, usage.ru_maxrss * 1024 - baseline)
    return End(os.waitstatus_to_exitcode(status), time.monotonic() - began, peak, hung, swollen or peak > BYTES)


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def queued(pid: int) -> float:
    """Seconds that a process was ready to run and had no processor."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def child(start: Start) -> None:
    """What a forked child does; never returns."""
    os.setsid()
    code = 1
    try:
        descriptor = os.open(start.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES + SPARE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES,) * 2)
        os.chdir(start.folder)
        os.environ.update(start.environment)
        guard.install(Path(start.signals))
        code = run_module(start.module, start.arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def run_module(module: str, arguments: Sequence[str]) -> int:
    """`python -m`, as far as a process does that has begun already; returns the exit code."""
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def import_everything() -> None:
    """What starts would import, and what libraries compute once."""
    import matplotlib.pyplot as plt
    import torch

    torch.set_num_threads(1)
    import scaleprog.cli
    import scaleprog.planning.plan
    import scaleprog.reporting.report
    import scaleprog.sharding.replicated
    import scaleprog.shards.check
    import scaleprog.training.evaluate_run
    import scaleprog.training.export
    import scaleprog.training.loop
    from tests.fuzz.fixtures import recipe

    scaleprog.planning.plan.describe(recipe(Path("shards")))
    figure = plt.figure()
    figure.text(0, 0, "a")
    figure.canvas.draw()
    plt.close(figure)
    gc.collect()
    gc.freeze()  # a child's collections need not look at what is here, nor copy its pages
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"


def serve() -> None:
    protocol = os.fdopen(os.dup(1), "w")  # what libraries print must not get in between
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import_everything()
    for line in sys.stdin:
        values: dict[str, Any] = json.loads(line)
        baseline = resident(os.getpid())
        start = Start(**values)
        pid = os.fork()
        if not pid:
            child(start)
        protocol.write(json.dumps(asdict(watch(pid, start.seconds, baseline))) + "\n")
        protocol.flush()


if __name__ == "__main__":
    serve()
