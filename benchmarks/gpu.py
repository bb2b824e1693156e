"""Speed on this machine's GPU, as much as fits into so many minutes, the most telling cells first.

    python -m benchmarks.gpu [--minutes 8] [--out docs/results/gpu.md] [--tiny]

One process is the only rank. It trains on random images through `Backend`, as `scaleprog train` does: forward,
backward, AdamW, one EMA. The bare loop is timm's model under autocast with torch's fused AdamW, without EMA. Times are
of CUDA events, the median of three windows of ten steps. `host ms`: for the host to issue a step to an idle device, of
8 images if it is eager, so that the host does not wait for the device. `without EMA`: images/s if the EMA is not
updated. MFU: model FLOPs of forward and backward, counted by torch, by the device's bf16 peak. GiB: allocated /
reserved, at most. `compile s`: by how much compilation made the first three steps longer, without Inductor's cache. A
growth's memory is read before, during, and after `Backend.regrow`. Compiled layers are those of `sharding.compile`, one
code for all shapes, unless "for each shape" says otherwise. A supernet's mixed row is the mean over the candidates that
its steps draw.
"""

import argparse
import gc
import os
import platform
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from benchmarks.gpu_cells import Cell, cells
from benchmarks.gpu_trainer import Bench, Row
from scaleprog.ranks.coordinator import process_group

SHORTEST = 1.0
"""Estimates of --tiny, in seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu.md"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this program out on a CPU")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch._inductor.config.force_disable_caches = True
    if options.tiny:  # captures graphs, but does not generate code
        torch.compile = partial(torch.compile, backend="eager")
    with process_group() as (coordinator, device):
        bench = Bench(coordinator, device, options.tiny)
        if options.tiny:
            torch.set_num_threads(1)
        found: dict[Cell, Sequence[Row] | str] = {}
        gc.disable()  # as in training
        for cell in (listed := cells(options.tiny)):
            began = time.monotonic()
            found[cell] = outcome(bench, cell, deadline)
            rows = found[cell]
            said = rows if isinstance(rows, str) else f"{len(rows)} rows"
            print(f"{time.monotonic() - began:6.1f} s  {cell.table}: {cell.name}: {said}", flush=True)
            options.out.write_text(report(bench, listed, found))
    print(options.out.read_text())


def outcome(bench: Bench, cell: Cell, deadline: float) -> Sequence[Row] | str:
    """The rows of a cell, or why there are none."""
    left, needed = deadline - time.monotonic(), SHORTEST if bench.tiny else cell.estimate
    if left < needed:
        return f"not run: {left:.0f} s left, it takes about {needed:.0f} s"
    try:
        with limited(left), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cell.measure(bench)
    except Exception as error:  # the next cells can still run
        traceback.print_exc()
        return f"FAILED: {type(error).__name__}: {error}"
    finally:
        bench.free()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError("the minutes are over")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---- the report


def report(bench: Bench, listed: Sequence[Cell], found: dict[Cell, Sequence[Row] | str]) -> str:
    """The tables of what has been measured so far."""
    done = sum(not isinstance(rows, str) for rows in found.values())
    method = " ".join((__doc__ or "").rpartition("[--tiny]")[2].split())
    software = f"torch {torch.__version__}, CUDA {torch.version.cuda}" if bench.cuda else f"torch {torch.__version__}"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    lines = ["Written by `python -m benchmarks.gpu`.", "", method, ""]
    lines += [f"{bench.name}, {os.cpu_count()} CPU cores, Python {platform.python_version()}, {software}. {now}.", ""]
    if done < len(listed):
        lines += [f"**partial: {done} of {len(listed)} cells**", ""]
    for table in dict.fromkeys(cell.table for cell in listed):
        lines += section(table, {cell: found.get(cell, "not reached") for cell in listed if cell.table == table})
    return "\n".join(lines).rstrip() + "\n"


def section(title: str, found: dict[Cell, Sequence[Row] | str]) -> list[str]:
    """The lines of one table, and the texts that go with its rows."""
    measured = [row for rows in found.values() if not isinstance(rows, str) for row in rows]
    columns = list(dict.fromkeys(key for row in measured for key in row if key != "text"))
    lines = [f"## {title}", "", f"| {' | '.join(['cell', *columns])} |", "|---" * (1 + len(columns)) + "|"]
    texts = []
    for cell, rows in found.items():
        if isinstance(rows, str):
            problem = " ".join(rows.split()).replace("|", "/")[:400]
            lines.append(f"| {' | '.join([cell.name, problem, *[''] * (len(columns) - 1)])} |")
            continue
        for row in rows:
            lines.append(f"| {' | '.join([cell.name, *(shown(row.get(column, '')) for column in columns)])} |")
            if row.get("text"):
                texts += [f"{cell.name}:", "", "```text", row["text"], "```", ""]
    return [*lines, "", *texts]


def shown(value: Any) -> str:
    """A number with four significant digits or all those before the point, and anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
