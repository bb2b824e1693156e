"""Adaptive regularisation, AdaReg (paper 5.3): augmentation and drop-path strengths that grow with the network."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Regularization:
    """Factors on the recipe's RandAugment magnitude, random-erase probability and stochastic-depth rate, 0 to 1."""

    magnitude: float = 1.0
    erase: float = 1.0
    drop_path: float = 1.0


def regularization(ramp: float) -> Regularization:
    """Strengths where growth has come as far as `ramp` (0: it begins, 1: complete): magnitude from a half, the others
    from zero, linearly up to full."""
    return Regularization(magnitude=0.5 + 0.5 * ramp, erase=ramp, drop_path=ramp)
