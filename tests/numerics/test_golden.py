"""Losses of a short run, stored as text: whoever changes the numerics does it on purpose.

Regenerate with `pytest tests/numerics/test_golden.py --regenerate-golden`, and say in the commit why they changed.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from scaleprog.recipe import Recipe
from tests.conftest import run, step_rows

GOLDEN = Path(__file__).with_name("golden.txt")


def test_losses_are_those_on_record(
    make_recipe: Callable[..., Recipe], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    run(make_recipe(model={"drop_path": 0.1}), tmp_path)
    losses = [row["loss"] for row in step_rows(tmp_path).values()]
    if pytestconfig.getoption("regenerate_golden"):
        GOLDEN.write_text("".join(f"{loss:.7f}\n" for loss in losses))
    expected = [float(line) for line in GOLDEN.read_text().split()]
    assert losses == pytest.approx(expected, rel=1e-4)  # other CPUs sum in another order
