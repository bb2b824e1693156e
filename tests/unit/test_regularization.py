"""AdaReg: strengths by how far growth has come (paper 5.3)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.phase import Regularization


def test_four_stages() -> None:
    strengths = [Regularization.at(stage / 3) for stage in range(4)]
    assert [s.magnitude for s in strengths] == pytest.approx([0.5, 2 / 3, 5 / 6, 1])
    assert [s.erase for s in strengths] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [s.drop_path for s in strengths] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@given(st.floats(0, 1), st.floats(0, 1))
def test_ramps_are_linear_from_end_to_end(one: float, other: float) -> None:
    assert Regularization.at(0) == Regularization(magnitude=0.5, erase=0, drop_path=0)
    assert Regularization.at(1) == Regularization(magnitude=1, erase=1, drop_path=1)
    middle = Regularization.at((one + other) / 2)
    for name in ("magnitude", "erase", "drop_path"):
        ends = getattr(Regularization.at(one), name), getattr(Regularization.at(other), name)
        assert getattr(middle, name) == pytest.approx(sum(ends) / 2)
