"""What may lie in a run directory: honest records of which some are damaged, and worse."""

import json
import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

STEP = {
    "step": 7, "epoch": 0.5, "stage": 1, "phase": "train", "resolution": 16, "depth": 2, "lr": 1e-3, "images": 8,
    "data_wait_seconds": 0.1, "loss": 2.0, "grad_norm": 1.0, "step_seconds": 0.5, "images_per_second": 13.0,
    "cpu_seconds": 0.4, "time": 1e9 + 7,
}  # fmt: skip
CHOICE = {
    "event": "choice", "stage": 2, "candidates": [[16, 2], [32, 4]], "losses": [1.5, 1.4], "times": [0.1, 0.4],
    "scores": [0.3, None], "chosen": [16, 2], "alpha": None, "complete_from": 60, "over": 0.0,
}  # fmt: skip
METRICS = [STEP, {"step": 8, "top1": 50.0, "top1_ema": 51.0, "train_seconds": 4.0}]
EVENTS = [
    {"event": "start", "world": 2, "startup_seconds": 3.0, "repeated_steps": 2, "repeated_seconds": 1.0,
     "repeated_since": 1e9, "repeated_until": 1e9 + 9, "hosts": ["a"], "job": None, "engine": "fsdp"},
    {"event": "growth", "stage": 1, "phase": "train", "resolution": 16, "depth": 2, "seconds": 0.1, "sources": [[0]]},
    {"event": "measurement", "seconds": 1.0, "losses": [[16, 2, 1.5], [32, 4, 1.4]]},
    CHOICE, CHOICE | {"stage": 1, "alpha": 0.1, "complete_from": None, "over": None},
    {"event": "evaluation", "seconds": 1.0, "top1": 50.0, "top1_ema": 51.0},
    {"event": "checkpoint", "seconds": 1.0, "stall": 0.1, "bytes": 1000},
    {"event": "checkpoint_failed", "message": "No space left", "stall": 0.1},
    {"event": "damaged", "total": 3, "samples": ["train-000000.tar: sample 'a'"]},
    {"event": "signal", "signal": "SIGTERM", "rank": 0, "unsaved_steps": 1, "unsaved_seconds": 1.0},
    {"event": "hurried", "rank": 0}, {"event": "preempted", "reason": "SIGTERM"}, {"event": "stopped_early"},
    {"event": "error", "message": "rank 1: OSError: gone\\nmore", "rank": 0}, {"event": "finish", "top1_best": 50.0},
]  # fmt: skip
LEFT = {
    "time": 1e9 + 20, "job": "7", "restart": 0, "kind": "crash", "code": 137, "cause": "a task was killed", "step": 7,
    "measured": 0, "preempted": False, "requeue": True, "why": "",
}  # fmt: skip
REPORT = {"time": 1e9 + 19, "rank": 0, "code": 75, "cause": "stopped", "reason": "SIGTERM"}
RESULTS = {
    "schedule": "linear", "top1": 50.0, "top1_ema": 51.0, "top1_best": 51.0, "train_seconds": 4.0, "images": 64,
    "train_cpu_seconds": 3.0, "search_seconds": 0.0, "wall_seconds": 9.0, "steps": 8, "speedup": None,
    "stages": [{"stage": 1, "resolution": 16, "depth": 2, "epochs": 1.0, "searched": False, "scores": []}],
}  # fmt: skip
JOB = {"job": "7", "name": "scaleprog-run", "code": "code/x", "log": "jobs/x.out"}
OWNER = {"generation": 1, "nonce": "n", "job": "7", "restart": 0, "host": "elsewhere", "pid": 7, "started": "1"}
PLAN = {
    "schedule": {
        "kind": "automatic", "ladder": [[16, 2], [24, 3], [32, 4]], "steps": 80, "search_steps": 10, "rule": "window",
        "recycle": True, "adaptive_regularization": False, "budget": None, "promised": False, "complete_steps": 0,
        "patch": None, "curriculum": False, "scoring": 1.0,
    },
    "gmacs": [[side, depth, 1e-6 * side**2 * depth] for side in (16, 24, 32) for depth in (2, 3, 4)],
}  # fmt: skip
MEASURING = {"where": {"step": 7, "networks": [[16, 2]], "ranks": 1}, "done": 3, "losses": [[[1.0, 1.0, 1.0]]]}

ESCAPES = "\x1b]0;title\x07\x1b[2J\u202egnp\u200b<img src=x onerror=alert(1)>|`[a](javascript:b)$x_1$\ud800\x00\r\n"
numbers = st.sampled_from(
    [0, -1, 1, 0.0, -0.0, 5e-324, 1e-9, -1e9, 2**31, 2**53, 2**63, -(2**63), 10**400, 1e300, -1e300, 1e9, 2.0**33,
     253402300800.0, float("nan"), float("inf"), -float("inf"), True, False]
)  # fmt: skip
texts = st.sampled_from(["", "\n", " ", ESCAPES, "x" * 5000, "SIGINT", "start", "7", "-1", "NaN", "$\\frac{1$", "_x"])
values = st.recursive(
    st.none() | numbers | texts | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
raw = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [b"", b"[" * 100_000, b'{"a":' * 5000, b"9" * 100_000, b'{"step":' + b"9" * 100_000 + b"}", b"null", b"3",
         b"{}", b"[]", b'"start"', b"\xff\xfe", b'{"step": NaN, "loss": 1}', b'{"step": 1, "step": {}, "loss": []}',
         b'{"time": 1e999, "event": "start"}', b'{"event": "error", "message": "\\ud800"}', b"- a\n- b", b"a: &a [*a]",
         b"\x00" * 99]
    ),
)  # fmt: skip


def dumps(row: Any) -> bytes:
    return json.dumps(row).encode("utf-8", "backslashreplace")


@st.composite
def damaged(draw: st.DrawFn, honest: list[dict[str, Any]], **common: Any) -> bytes:
    """An honest record, at times with some values put in place of its own, or without them; or what is none."""
    if draw(st.integers(0, 7)) == 0:
        return draw(raw)
    row = common | draw(st.sampled_from(honest))
    for key in draw(st.lists(st.sampled_from([*row, "more"]), max_size=2)) if draw(st.booleans()) else ():
        if draw(st.integers(0, 3)):
            row = row | {key: draw(values)}
        else:
            row = {other: value for other, value in row.items() if other != key}
    return dumps(row)


steps = st.integers(0, 90)
moments = st.sampled_from([0.0, 1.0, 1e9, 1e9 + 5, 1e9 + 7, 1e9 + 9, 2.0**33])


def file_of(honest: list[dict[str, Any]], **common: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """A file of such lines, the last of them perhaps being written."""
    line = st.fixed_dictionaries(common).flatmap(lambda fields: damaged([row | fields for row in honest]))
    rows = st.lists(line, max_size=12).map(b"\n".join)
    return st.tuples(rows, st.sampled_from([b"\n", b"", b'\n{"step": 9, "lo'])).map(b"".join)


SMALL = {
    "results.json": RESULTS, "job.json": JOB, "owner.json": OWNER, "measuring.json": MEASURING, "plan.json": PLAN,
}  # fmt: skip
FOLDERS = (
    "checkpoints/step-00000007", "checkpoints/step-x", f"checkpoints/step-{9**40}", f"checkpoints/{ESCAPES[:20]}",
    "rank_1", "rank_x", f"rank_{9**50}", "rank_", "tensorboard/rank_1",
)  # fmt: skip
run_directories = st.fixed_dictionaries(
    {
        "metrics.jsonl": file_of([METRICS[0]] * 3 + [METRICS[1]], step=steps),
        "events.jsonl": file_of(EVENTS + EVENTS[:1] * 4, step=steps, time=moments, generation=st.integers(0, 3)),
        "requeues.jsonl": file_of([LEFT], time=moments),
        "samples-0.jsonl": file_of([{"step": 1, "generation": 1, "ids": [1]}]),
    },
    optional={
        **{name: damaged([row]) for name, row in SMALL.items()},
        **{f"jobs/reports/7-0-{rank}.json": damaged([REPORT]) for rank in range(3)},
        **{f"{folder}/x": st.just(b"") for folder in FOLDERS},
    },
)  # fmt: skip
"""Paths of files and what they hold."""


def lay_down(run: Path, files: dict[str, bytes]) -> Path:
    """Writes the files of a run directory, but for the recipe."""
    for name, content in files.items():
        path = run / name.replace("\x00", "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return run


def put_in_the_way(path: Path, kind: str) -> None:
    """Something that is no regular file of a sane size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    elif kind == "one line":
        path.write_bytes(b'{"x": "' + b"a" * 2**25)


IN_THE_WAY = ("fifo", "directory", "loop", "endless", "sparse", "one line")
