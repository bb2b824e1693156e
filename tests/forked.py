"""Commands and ranks forked from a process that has imported all they need: an import takes longer than many a run."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from scaleprog.launchers import local

PRELOADED = ["tests.preloaded"]


def fork_ranks(patch: pytest.MonkeyPatch) -> None:
    """Makes `launch` fork ranks from a process that has imported torch; an import takes longer than many a run.

    The ranks then have the environment that this process had at its first launch.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    patch.setattr(local, "START_METHOD", "forkserver")


@pytest.fixture(scope="package", autouse=True)
def forked() -> Iterator[None]:
    """For a conftest to import: all tests of its folder fork their ranks, also those of a module's fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        fork_ranks(patch)
        yield


def start(
    module: str, arguments: Sequence[object], output: Path | None = None, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """`python -m MODULE ARGUMENTS` in a session of its own, with the environment of the first process that was forked.

    Args:
        module: run as `__main__`.
        arguments: on its command line.
        output: the file that everything it prints goes to (None: where this process prints).
        environment: variables besides.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    words = [module, *map(str, arguments)]
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(words, output, environment or {}))
    process.start()
    return process


def run(
    module: str, arguments: Sequence[object], output: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Waits for what `start` starts. Raises TimeoutError."""
    process = start(module, arguments, output, environment)
    try:
        process.join(seconds)
        if process.exitcode is None:
            raise TimeoutError(f"{module} {arguments}: {seconds:.0f} s\n{output.read_text()}")
    finally:
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its ranks are in its session
            process.kill()
            process.join()
    return subprocess.CompletedProcess(list(map(str, arguments)), process.exitcode, output.read_text())


def _run(words: list[str], output: Path | None, environment: Mapping[str, str]) -> None:
    os.setsid()
    if output is not None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    os.environ.update(environment)
    local.START_METHOD = "fork"
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
