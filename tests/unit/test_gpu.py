"""The GPU benchmark, tried out on a tiny model: every cell measures something, on a CPU too."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_cells import cells

pytestmark = pytest.mark.process
ZERO_IS_POSSIBLE = {"compile s", "graphs", "in the flush", "elsewhere", "synchronizations"}


def test_every_cell_has_rows_of_positive_numbers(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out)], check=True)
    text = out.read_text()
    assert not re.search("FAILED|not run|not reached|partial", text)
    measured, header = [], list[str]()
    for line in text.splitlines():
        values = [value.strip() for value in line.strip("|").split("|")]
        if line.startswith("| cell |"):
            header = values
        elif line.startswith("| "):
            row = dict(zip(header, values, strict=True))
            measured.append(row.pop("cell"))
            for column, value in row.items():
                if re.fullmatch(r"[-\d.]+|[-+]?(nan|inf)", value):
                    assert math.isfinite(float(value)), (line, column)
                    assert float(value) > 0 or column in ZERO_IS_POSSIBLE, (line, column)
    assert set(measured) == {cell.name for cell in cells(tiny=True)}
    assert len(measured) > len(cells(tiny=True))
