"""What happens to a batch's images on the device: bytes become normalized numbers, and boxes are erased."""

from functools import lru_cache

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device. The host waits for no GPU: it copies from page-locked memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, r, r, C) uint8 -> (B, C, r, r) float32, contiguous.

    `mean`, `std`: of pixels in 0-1, one number per channel.
    """
    count, side, _, channels = images.shape
    numbers = torch.empty(count, channels, side, side, device=images.device).copy_(images.permute(0, 3, 1, 2))
    middle, width = _statistics(mean, std, images.device)
    return numbers.sub_(middle).div_(width)


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of `normalize`, rounded to bytes and clamped: (B, C, r, r) -> (B, r, r, C) uint8."""
    middle, width = _statistics(mean, std, images.device)
    return images.mul(width).add_(middle).round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)


@lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    middle, width = (torch.tensor(numbers, device=device).view(-1, 1, 1) * 255 for numbers in (mean, std))
    return middle, width


def erase(images: Tensor, boxes: Tensor) -> None:
    """Replaces boxes of images (B, C, r, r) by standard normal noise, in place.

    The noise of each box has a seed of its own, so it depends only on the kind of device.

    Args:
        images: normalized.
        boxes: (B, 5) int64 on the host, see `augment.Erasing`.
    """
    if not boxes[:, 2].any():
        return
    generator = torch.Generator(images.device)
    for row, (top, left, height, width, seed) in enumerate(boxes.tolist()):
        if height:
            generator.manual_seed(seed)
            images[row, :, top : top + height, left : left + width].normal_(generator=generator)


def low_pass(images: Tensor, cutoff: int) -> Tensor:
    """Removes frequencies that `cutoff` x `cutoff` pixels cannot hold (arXiv 2405.08768, 3.2) from (B, C, H, W) images.

    The images keep their size: EfficientTrain++ crops the spectrum, and this function sets the rest of it to zero.
    """
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device).abs()
    columns = torch.fft.rfftfreq(width, 1 / width, device=images.device)
    kept = (rows < cutoff / 2)[:, None] & (columns < cutoff / 2)
    return torch.fft.irfft2(torch.fft.rfft2(images.float()) * kept, (height, width)).to(images.dtype)
