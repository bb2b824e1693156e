"""What TensorBoard and the trackers show of a run's records: names of curves, and the text of a search. No torch."""

from collections.abc import Mapping
from typing import Any

from scaleprog.files.display import as_markdown
from scaleprog.growth.search import Decision

IN_TRAIN = ("loss", "images_per_second")  # what `train` shows of a step
HIDDEN = ("step", "images", "time")  # numbers in a row that make no curve


def points(row: Mapping[str, Any]) -> dict[str, float]:
    """The points of a row of metrics.jsonl, by the names of their curves."""
    return {
        f"{_group(key, row)}/{key}": value
        for key, value in row.items()
        if key not in HIDDEN and (isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63))
    }


def is_drawn(row: Mapping[str, Any], log_every: int) -> bool:
    """Whether a row of metrics.jsonl is shown: an evaluation, or a step that makes a point."""
    return "phase" not in row or row["step"] % log_every == 0


def story(decision: Decision, unit: str) -> str:
    """What a search found and chose, in Markdown; `unit` is that of the candidates' times."""
    rows = decision.table(unit)
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    table = "\n".join(f"| {' | '.join(map(as_markdown, line))} |" for line in lines)
    return f"chose **{decision.chosen}**, {as_markdown(decision.because)}\n\n{table}"


def _group(key: str, row: Mapping[str, Any]) -> str:
    """The group that shows the number `key` of a row of metrics.jsonl."""
    if "loss" in row:
        return "train" if key in IN_TRAIN else "vitals"
    return "vitals" if key.endswith("_seconds") else "validation"
