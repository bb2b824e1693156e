"""AdaReg: strengths by stage (paper 5.3)."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaleprog.growth.regularization import Regularization, regularization


def test_four_stages() -> None:
    third = 1 / 3
    strengths = [regularization(True, stage, 4) for stage in (1, 2, 3, 4)]
    assert [s.magnitude for s in strengths] == pytest.approx([0.5, 0.5 + third / 2, 0.5 + third, 1])
    assert [s.erase for s in strengths] == pytest.approx([0, third, 2 * third, 1])
    assert [s.drop_path for s in strengths] == pytest.approx([0, third, 2 * third, 1])


@given(st.integers(2, 30))
def test_ramps_are_linear_from_end_to_end(stages: int) -> None:
    strengths = [regularization(True, stage, stages) for stage in range(1, stages + 1)]
    assert strengths[0] == Regularization(magnitude=0.5, erase=0, drop_path=0)
    assert strengths[-1] == Regularization(magnitude=1, erase=1, drop_path=1)
    for name, first in (("magnitude", 0.5), ("erase", 0), ("drop_path", 0)):
        values = [getattr(s, name) for s in strengths]
        step = (1 - first) / (stages - 1)
        assert [b - a for a, b in pairwise(values)] == pytest.approx([step] * (stages - 1))


@given(st.integers(1, 30), st.data())
def test_without_it_every_stage_has_full_strength(stages: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(1, stages))
    assert regularization(False, stage, stages) == Regularization(magnitude=1, erase=1, drop_path=1)


def test_a_single_stage_is_the_last() -> None:
    assert regularization(True, 1, 1) == Regularization(magnitude=1, erase=1, drop_path=1)
