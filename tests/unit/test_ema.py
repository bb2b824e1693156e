"""The EMA: how far back it reaches, and what it is after many steps."""

import pytest
import torch

from scaleprog.sharding.ema import Ema, momentum_of


def test_the_momentum_warms_up_to_its_setting_and_stays_there() -> None:
    assert momentum_of(0.998, 0, warmup=True) == pytest.approx(0.1)
    assert momentum_of(0.998, 90, warmup=True) == pytest.approx(0.91)
    assert momentum_of(0.998, 4490, warmup=True) == momentum_of(0.998, 10**6, warmup=True) == 0.998
    assert momentum_of(0.998, 0, warmup=False) == 0.998


def test_a_short_run_grows_from_what_it_has_learnt_and_not_from_where_it_began() -> None:
    """The weights go from 0 to 1 within 100 steps: what the average holds of it with and without a warm-up."""
    averages = []
    for warmup in (True, False):
        weights = [torch.zeros(1)]
        ema = Ema({"weight": weights[0]})
        for step in range(100):
            weights[0].fill_((step + 1) / 100)
            ema.update(weights, [], momentum_of(0.998, step, warmup), torch.tensor(0.0))
        averages.append(float(ema.weights["weight"]))
    assert averages[0] > 0.85
    assert averages[1] < 0.15
