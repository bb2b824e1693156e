"""Adaptive regularisation, AdaReg (paper 5.3): augmentation and drop-path strengths that grow with the network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Regularization:
    """Factors on the recipe's RandAugment magnitude, random-erase probability and stochastic-depth rate, 0 to 1."""

    magnitude: float = 1.0
    erase: float = 1.0
    drop_path: float = 1.0


def regularization(adaptive: bool, stage: int, stages: int) -> Regularization:
    """Strengths of stage `stage` (1..stages): magnitude from a half, the others from zero, linearly up to full."""
    if not adaptive or stages == 1:
        return Regularization()
    ramp = (stage - 1) / (stages - 1)
    return Regularization(magnitude=0.5 + 0.5 * ramp, erase=ramp, drop_path=ramp)
