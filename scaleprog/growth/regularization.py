"""Adaptive regularization, AdaReg (paper 5.3): augmentation and drop-path strengths that grow with the network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Regularization:
    """Factors on the recipe's RandAugment magnitude, random-erase probability and stochastic-depth rate, 0 to 1."""

    magnitude: float = 1.0
    erase: float = 1.0
    drop_path: float = 1.0


def regularization(ramp: float) -> Regularization:
    """Strengths at the growth progress `ramp`, from 0 (growth begins) to 1 (complete model). All increase linearly to
    1: the magnitude from 0.5, the others from 0."""
    return Regularization(magnitude=0.5 + 0.5 * ramp, erase=ramp, drop_path=ramp)
