"""The records of a run directory, as a stranger or a broken disk may leave them."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from tests.fuzz.files import damage, displace, replace
from tests.fuzz.values import ESCAPES, HTML, mutate

SKIPPED = ("checkpoints", "events.out.", "recipe.yaml")  # how the names of what stays as it is begin
JOB, RESTART = "7", 0
NAMES = (
    f"{ESCAPES}",
    HTML,
    "[red]x[bold]",
    "[x]",
    "a" * 200,
    "two\nlines",
    "|x|",
    "\udcff",
    "-n",
    "--help",
    "*",
    "$x$",
    "${",
    "_^{",
)
"""For run directories; what matplotlib would read as a formula is among them."""


def files(run: Path) -> list[Path]:
    """Every record of a run directory but recipe and checkpoints."""
    found = (path for path in run.rglob("*") if path.is_file())
    return sorted(path for path in found if not path.relative_to(run).parts[0].startswith(SKIPPED))


def change(run: Path, rng: random.Random) -> tuple[str, Path]:
    """One change of a record; says what it did, and to which."""
    path = rng.choice(files(run))
    name = str(path.relative_to(run))
    kind = rng.choice(("bytes", "place", *["value"] * 6, "several"))
    if path.stat().st_size == 0:
        kind = "place"
    elif path.suffix not in (".json", ".jsonl"):
        kind = rng.choice(("bytes", "place"))
    if kind == "bytes":
        return f"{name}: {damage(path, rng)}", path
    if kind == "place":
        return f"{name}: {displace(path, rng)}", path
    if path.suffix == ".jsonl":
        return f"{name}: {another_line(path, rng, rng.choice((2, 5, 20)) if kind == 'several' else 1)}", path
    text, done = mutate(json.loads(path.read_text()), rng, "json")
    replace(path, text.encode(errors="surrogatepass"))
    return f"{name}: {done.kind} {'.'.join(map(str, done.path))[:80]}", path


def another_line(path: Path, rng: random.Random, times: int) -> str:
    """Changes lines of a .jsonl file."""
    lines = path.read_text().splitlines()
    told = []
    for _ in range(times):
        place = rng.randrange(len(lines))
        kind = rng.choice((*["value"] * 6, "scalar", "twice", "order", "gone", "clock", "step"))
        if kind == "value":
            try:
                lines[place], done = mutate(json.loads(lines[place]), rng, "json")
            except (ValueError, RecursionError):  # an earlier change has made it none
                continue
            lines[place] = lines[place].replace("\n", " ")
            told.append(f"line {place}: {done.kind} {'.'.join(map(str, done.path))[:40]}")
            continue
        if kind == "scalar":
            lines[place] = rng.choice(
                (
                    "[]",
                    "{}",
                    "null",
                    "1",
                    '"x"',
                    "NaN",
                    '{"event": null}',
                    '{"step": {}}',
                    '{"event": "start"}',
                    '{"loss": 1}',
                    '{"top1": 1}',
                    '{"time": null, "event": "start", "step": 1}',
                )
            )
        elif kind == "twice":
            lines[place:place] = [lines[place]] * rng.choice((1, 2, 500))
        elif kind == "order":
            rng.shuffle(lines)
        elif kind == "gone" and len(lines) > 1:
            del lines[place : len(lines) if rng.random() < 0.5 else place + 1]
        elif kind in ("clock", "step"):
            key = "time" if kind == "clock" else "step"
            shift = rng.choice((-(10**6), -100, 100, 10**6, 10**12, -(10**12), 1e300))
            lines[place:] = [shifted(line, key, shift) for line in lines[place:]]
        told.append(f"line {place}: {kind}")
        if not lines:
            break
    text = "".join(f"{line}\n" for line in lines)
    replace(path, text.encode(errors="surrogatepass"))
    return "; ".join(told)[:200]


def shifted(line: str, key: str, by: float) -> str:
    """A line whose number under a key is another."""
    try:
        row = json.loads(line)
        row[key] += by
        return json.dumps(row)
    except (ValueError, KeyError, TypeError, RecursionError):
        return line


def named_processes(run: Path, rng: random.Random) -> str:
    """`owner.json` names a process that is none of the run's, as well as its writer knew."""
    path = run / "owner.json"
    owner = json.loads(path.read_text())
    pid = rng.choice((-1, 0, 1, -2, os.getpid(), os.getppid(), -os.getpgid(0), 2**31, "1", [1], 1.0, True, None))
    started = rng.choice((owner.get("started"), started_at(pid), None, started_at(os.getpid())))
    owner |= {"pid": pid, "started": started, "host": os.uname().nodename, "job": None}
    if rng.random() < 0.3:
        owner["command"] = owner["cmdline"] = "python -m scaleprog train"
    replace(path, json.dumps(owner).encode())
    (run / "results.json").unlink(missing_ok=True)
    return f"owner.json names process {pid!r} started at {started!r}"


def started_at(pid: Any) -> str | None:
    """As `owner.json` has it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def complete(run: Path, step: int, networks: list[list[int]]) -> None:
    """Puts in what only a Slurm job, or one that was stopped in a measurement, leaves: the one after `step`
    of the networks `networks`, of which nothing is done yet."""
    now = time.time()
    code = run / "code" / ("0" * 12) / "scaleprog"
    code.mkdir(parents=True)
    (code / "__init__.py").write_text("raise SystemExit('code of a stranger was run')\n")
    (run / "job.json").write_text(
        json.dumps({"job": JOB, "name": "scaleprog-run", "code": f"code/{'0' * 12}", "log": "jobs/7/run.log"})
    )
    row = {
        "time": now - 50,
        "job": JOB,
        "restart": RESTART,
        "kind": "crash",
        "code": 1,
        "cause": "rank 0: RuntimeError: x",
        "step": 10,
        "measured": 0,
        "preempted": False,
        "requeue": True,
        "why": "",
    }
    (run / "requeues.jsonl").write_text(json.dumps(row) + "\n")
    reports = run / "jobs" / "reports"
    reports.mkdir(parents=True)
    for rank, code_, reason in ((0, 75, "SIGUSR2"), (1, 75, "SIGUSR2")):
        (reports / f"{JOB}-{RESTART}-{rank}.json").write_text(
            json.dumps({"time": now, "rank": rank, "code": code_, "cause": "stopped by SIGUSR2", "reason": reason})
        )
    (run / "measuring.json").write_text(
        json.dumps(
            {"where": {"step": step, "networks": networks, "ranks": 1}, "done": 0, "losses": [[[] for _ in networks]]}
        )
    )
