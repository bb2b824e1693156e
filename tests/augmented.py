"""Images of a lane, or of an evaluation batch, as the network sees them: through the host's part and the device's."""

from collections.abc import Sequence

import numpy as np
import torch

from scaleprog.data.augment import Augmentation, BatchRequest, Encoded, normalization
from scaleprog.data.on_device import erase, normalize
from scaleprog.data.tensor_operations import operate, packed


def train_images(
    augmentation: Augmentation, images: Sequence[Encoded], request: BatchRequest, lane: int
) -> torch.Tensor:
    """(n, C, r, r) float32."""
    return train_images_with_origins(augmentation, images, request, lane)[0]


def train_images_with_origins(
    augmentation: Augmentation, images: Sequence[Encoded], request: BatchRequest, lane: int
) -> tuple[torch.Tensor, np.ndarray]:
    """(n, C, r, r) float32, and their origins (n, 2, 3)."""
    pixels = np.empty((len(images), request.resolution, request.resolution, augmentation.channels), np.uint8)
    origins, deferred, erasing = augmentation.lane(images, request, lane, pixels)
    changed = operate(torch.from_numpy(pixels), packed(deferred, augmentation.deferred), augmentation.fill)
    batch = normalize(changed, *normalization(augmentation.settings, augmentation.channels))
    erase(batch, torch.tensor(erasing))
    return batch, origins


def evaluation_images(augmentation: Augmentation, images: Sequence[Encoded], resolution: int) -> torch.Tensor:
    """(n, C, r, r) float32."""
    pixels = np.empty((len(images), resolution, resolution, augmentation.channels), np.uint8)
    augmentation.evaluation(images, pixels)
    return normalize(torch.from_numpy(pixels), *normalization(augmentation.settings, augmentation.channels))
