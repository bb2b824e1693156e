"""Runs one job per shard in a pool of processes, with a progress bar (plain lines if the output is not a terminal)."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scaleprog.errors import DataError, WorkerDied

Job = TypeVar("Job")
Result = TypeVar("Result")

MAX_LISTED = 20


def run_all(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, label: str, workers: int | None = None
) -> list[Result]:
    """Computes `[function(job) for job in jobs]` in parallel.

    A DataError in one job does not stop the others, so the final error lists all of them. Any other exception stops
    everything.

    Args:
        function: runs each job; pickled if there is more than one worker.
        jobs: the arguments for `function`; pickled if there is more than one worker.
        label: what the progress bar shows.
        workers: number of processes; default: one per CPU that this process may use.

    Raises:
        DataError: a job raised it.
        WorkerDied: a worker was killed.
    """
    results: dict[int, Result] = {}
    problems: dict[int, str] = {}
    with (
        _executor(min(workers or len(os.sched_getaffinity(0)), len(jobs))) as pool,
        _progress(label, len(jobs)) as advance,
    ):
        resource_tracker.ensure_running()  # starting it would unblock SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the new workers have a handler
        try:
            futures = {pool.submit(function, job): index for index, job in enumerate(jobs)}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            index = futures[future]
            try:
                results[index] = future.result()
            except DataError as error:
                problems[index] = str(error)
            except BrokenProcessPool as error:
                raise WorkerDied(
                    f"{label}: a worker died, perhaps from lack of memory; use fewer --workers."
                ) from error
            advance()
    if problems:
        raise DataError(listed([problems[index] for index in sorted(problems)]))
    return [results[index] for index in range(len(jobs))]


def worker() -> int:
    """The number of this worker among all that this program has started; 0 in the program itself."""
    return int(multiprocessing.current_process().name.rpartition("-")[2]) if multiprocessing.parent_process() else 0


def listed(problems: Sequence[str]) -> str:
    """The first MAX_LISTED problems, one per line, and how many more there are."""
    more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return "\n".join([*problems[:MAX_LISTED], *more])


def some(names: Sequence[str]) -> str:
    """The first MAX_LISTED names on one line, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


@contextmanager
def _executor(workers: int) -> Iterator[Executor]:
    """A pool of spawned processes, or a thread if one worker is enough. An exception cancels the jobs that wait."""
    if workers > 1:
        pool: Executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    else:
        pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this worker when its parent dies. Otherwise it would wait for jobs forever and write into the next build.

    Also ends it without a traceback at Ctrl-C, which a terminal sends to the parent, too.
    """
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Yields a function that must be called after each of `total` steps."""
    console = Console()
    if console.is_terminal:
        name = TextColumn("{task.description}", markup=False)
        with Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            print(f"{label}: {done}/{total}", flush=True)

    yield advance
