"""What RandAugment, 3-Augment and color jitter do to a batch of images, as tensor operations on any device.

The operations are Pillow's, as in `operations.py`, with an amount for each image. The host knows which images get which
operation, so it sorts them: the device runs a few kernels for all images of one operation, and the host never waits for
it. All arithmetic is in integers, in tables, or in single operations on float32 in a fixed order, so that an image
comes out the same whatever other images are in its batch.
"""

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from scaleprog.data.operations import Operation
from scaleprog.data.origin import MOVES, pixels_of

WORKING = 2**29
"""The most bytes of a device that `operate` takes beside three times the batch, unless a single image needs more."""
_PASSES = 3  # box blurs in a Gaussian blur
_FARTHEST = 2  # pixels that a box blur reaches: as far as a standard deviation of 2.4 needs


def packed(drawn: Sequence[Sequence[Operation]], most: int) -> Tensor:
    """The operations of each image as numbers: (n, `most`, 2) float32, an index of NAMES and the amount."""
    rows = torch.zeros(len(drawn), most, 2)
    for row, operations in zip(rows.numpy(), drawn):
        for place, (name, amount) in enumerate(operations):
            row[place] = _INDEX[name], amount
    return rows


def operate(images: Tensor, operations: Tensor, fill: tuple[int, ...]) -> Tensor:
    """The changed images; does not modify `images`.

    Args:
        images: (B, r, r, C) uint8, C = 1 or 3, on any device.
        operations: (B, n, 2) on the host, see `packed`; those of an image apply one after another.
        fill: gray level of each channel for places that lie outside the image.
    """
    if not operations.numel():
        return images
    device, side = images.device, images.shape[1]
    background = torch.tensor(fill, dtype=torch.uint8).to(device, non_blocking=True)
    shown = torch.arange(len(images))  # the image in each row of `images`, which every turn sorts
    for turn in operations.unbind(1):
        order = turn[shown, 0].argsort(stable=True)
        shown = shown[order]
        images = images[order.to(device, non_blocking=True)]
        turned = [Operation(NAMES[int(index)], amount) for index, amount in turn[shown].tolist()]
        numbers = torch.tensor([_numbers(operation, side) for operation in turned]).to(device, non_blocking=True)
        first = 0
        for kernels, same in groupby(turned, key=lambda operation: KERNELS.get(operation.name)):
            stop = first + len(list(same))
            if kernels:
                for rows in _parts(first, stop, WORKING // (kernels.bytes * images[0].numel())):
                    images[rows] = kernels.change(images[rows], turned[rows], numbers[rows], background)
            first = stop
    return images[shown.argsort().to(device, non_blocking=True)]


def _parts(first: int, stop: int, most: int) -> list[slice]:
    """Slices of at most `most` rows, but of at least one."""
    step = max(1, most)
    return [slice(start, min(start + step, stop)) for start in range(first, stop, step)]


# ---- colors


def _blended(base: float | Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """Gray levels `base` + `factor` x (`image` - `base`), as uint8: Pillow's Image.blend."""
    return (factor * (image - base)).add_(base).clamp_(0, 255).byte()


def _gray(pixels: Tensor) -> Tensor:
    """(..., C) uint8 -> (..., 1) int32, in Pillow's conversion."""
    if pixels.shape[-1] == 1:
        return pixels.int()
    red, green, blue = pixels.int().split(1, -1)
    return red.mul_(19595).add_(green.mul_(38470)).add_(blue.mul_(7471)).add_(2**15) >> 16


def _levels(pixels: Tensor) -> Tensor:
    return torch.arange(256, device=pixels.device)[:, None]


def _auto_contrast(pixels: Tensor, _: Tensor) -> Tensor:
    low, high = (bound.long() for bound in pixels.aminmax(dim=1, keepdim=True))
    levels = _levels(pixels)
    stretched = (levels - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.clamp_(0, 255), levels)


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    count, total, channels = pixels.shape
    ones = torch.ones((), dtype=torch.int32, device=pixels.device).expand(pixels.shape)
    counts = torch.zeros(count, 256, channels, dtype=torch.int32, device=pixels.device)
    counts.scatter_add_(1, pixels.long(), ones)
    step = (total - counts.gather(1, pixels.amax(1, keepdim=True).long())) // 255
    below = counts.cumsum(1) - counts
    spread = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, spread.clamp_(0, 255), _levels(pixels))


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    total = pixels.shape[1]
    mean = (2 * _gray(pixels).sum(1, keepdim=True) + total) // (2 * total)
    return _blended(mean, _levels(pixels), factor)


def _posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    dropped = torch.ones_like(bits, dtype=torch.int64) << (8 - bits.long()).clamp(min=0)
    return _levels(pixels) // dropped * dropped


def _solarize(pixels: Tensor, least: Tensor) -> Tensor:
    levels = _levels(pixels)
    return torch.where(levels < least, levels, 255 - levels)


def _solarize_add(pixels: Tensor, more: Tensor) -> Tensor:
    levels = _levels(pixels)
    return torch.where(levels < 128, (levels + more.long()).clamp_(max=255), levels)


TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda pixels, amount: 255 - _levels(pixels),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "contrast": _contrast,
    "brightness": lambda pixels, factor: _blended(0, _levels(pixels), factor),
}
"""Operations that replace each gray level by another: pixels (k, r * r, C) and amounts (k, 1, 1) -> the new levels,
(k, 256, C) or a shape that expands to it."""


def _looked_up(pixels: Tensor, turned: Sequence[Operation], numbers: Tensor, background: Tensor) -> Tensor:
    flat = pixels.flatten(1, 2)
    tables = torch.empty(len(pixels), 256, pixels.shape[-1], dtype=torch.uint8, device=pixels.device)
    first = 0
    for name, same in groupby(turned, key=lambda operation: operation.name):
        rows = slice(first, first := first + len(list(same)))
        tables[rows] = TABLES[name](flat[rows], numbers[rows, :1, None])
    return tables.gather(1, flat.long()).view_as(pixels)


def _colored(pixels: Tensor, turned: Sequence[Operation], numbers: Tensor, background: Tensor) -> Tensor:
    return _blended(_gray(pixels), pixels, numbers[:, 0, None, None, None])


# ---- neighborhoods


def _sharpened(pixels: Tensor, turned: Sequence[Operation], numbers: Tensor, background: Tensor) -> Tensor:
    """Blends with Pillow's ImageFilter.SMOOTH; the pixels at the edges stay as they are."""
    whole, inner = pixels.short(), pixels[:, 1:-1, 1:-1]
    three = whole[:, :-2] + whole[:, 1:-1] + whole[:, 2:]
    nine = three[:, :, :-2] + three[:, :, 1:-1] + three[:, :, 2:]
    smooth = nine.add_(inner, alpha=4).mul_(2).add_(13).floor_divide_(26)
    changed = pixels.clone()
    changed[:, 1:-1, 1:-1] = _blended(smooth, inner, numbers[:, 0, None, None, None])
    return changed


def _blurred(pixels: Tensor, turned: Sequence[Operation], numbers: Tensor, background: Tensor) -> Tensor:
    """Blurs with a box that weighs pixels by their distance, several times, across and then down, as Pillow does."""
    weights = [weight[:, None, None, None] for weight in numbers[:, : _FARTHEST + 1].unbind(1)]
    for axis in (2, 1):
        side = pixels.shape[axis]
        for _ in range(_PASSES):
            padded = _padded(pixels, axis).short()
            center, *rest = (padded.narrow(axis, at, side) for at in (2, 1, 3, 0, 4))
            near, far = rest[0] + rest[1], rest[2] + rest[3]
            blurred = (weights[0] * center).add_(weights[1] * near).add_(weights[2] * far)
            pixels = blurred.add_(0.5).byte()
    return pixels


def _box(sigma: float) -> list[float]:
    """Weights at the distances 0, 1 and 2 of a box blur that, after all passes, spreads by `sigma` pixels.

    The box is whole up to a distance; one pixel further, a part of it makes the variance right.
    """
    variance = sigma**2 / _PASSES
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (variance - whole * (whole + 1) / 3) / (2 * ((whole + 1) ** 2 - variance))
    box = [1.0] * (whole + 1) + [part, 0.0]
    return [weight / (2 * (whole + part) + 1) for weight in box[: _FARTHEST + 1]]


# ---- moves


def _padded(pixels: Tensor, axis: int) -> Tensor:
    """Two more pixels at both ends of an axis, equal to those at the edge."""
    side = pixels.shape[axis]
    return pixels.index_select(axis, torch.arange(-2, side + 2, device=pixels.device).clamp_(0, side - 1))


def _cubic(place: Tensor) -> list[Tensor]:
    """Weights of the four pixels at -1, 0, 1 and 2 for a place between 0 and 1: Keys's cubic with a = -1, Pillow's."""
    rest = 1 - place
    return [
        -place * rest * rest,
        1 - place * place * (1 + rest),
        1 - rest * rest * (1 + place),
        -place * place * rest,
    ]


def _weighted(near: Tensor, weights: list[Tensor]) -> Tensor:
    """The sum over the last axis of `near`, with weights that expand to its other axes."""
    total = weights[0] * near[..., 0]
    for index in (1, 2, 3):
        total += weights[index] * near[..., index]
    return total


def _inside(place: Tensor, side: int) -> Tensor:
    return (place >= -0.5) & (place < side - 0.5)


def _moved_across(pixels: Tensor, turned: Sequence[Operation], numbers: Tensor, background: Tensor) -> Tensor:
    """Moves the pixels of line y by numbers[:, 0] * y + numbers[:, 1]."""
    count, side, _, _ = pixels.shape
    line = torch.arange(side, device=pixels.device)
    by = (numbers[:, 0, None] * line).add_(numbers[:, 1, None])[..., None]
    whole = by.floor()
    windows = _padded(pixels, 2).unfold(2, 4, 1)
    row = torch.arange(count, device=pixels.device)[:, None, None]
    near = windows[row, line[:, None], (whole.long() + line + 1).clamp_(0, side)]  # (k, r, r, C, 4)
    moved = _weighted(near, _cubic((by - whole)[..., None])).clamp_(0, 255).byte()
    return torch.where(_inside(by + line, side)[..., None], moved, background)


def _moved_down(pixels: Tensor, turned: Sequence[Operation], numbers: Tensor, background: Tensor) -> Tensor:
    return _moved_across(pixels.transpose(1, 2), turned, numbers, background).transpose(1, 2)


def _rotated(pixels: Tensor, turned: Sequence[Operation], numbers: Tensor, background: Tensor) -> Tensor:
    """Each pixel comes from where the matrices in numbers (k, 6) map it."""
    count, side, _, _ = pixels.shape
    line = torch.arange(side, device=pixels.device)
    a, b, c, d, e, f = (number[:, None, None] for number in numbers.unbind(1))
    x = (a * line).add(b * line[:, None]).add_(c)
    y = (d * line).add(e * line[:, None]).add_(f)
    left, top = x.floor(), y.floor()
    windows = _padded(_padded(pixels, 1), 2).unfold(1, 4, 1).unfold(2, 4, 1)
    row = torch.arange(count, device=pixels.device)[:, None, None]
    near = windows[row, (top.long() + 1).clamp_(0, side), (left.long() + 1).clamp_(0, side)]  # (k, r, r, C, 4, 4)
    between = _weighted(near, _cubic((x - left)[..., None, None]))
    moved = _weighted(between, _cubic((y - top)[..., None])).clamp_(0, 255).byte()
    return torch.where((_inside(x, side) & _inside(y, side))[..., None], moved, background)


# ---- all of them


class _Kernels(NamedTuple):
    """What changes the images of one operation, or of several that are alike.

    Args:
        change: pixels (k, r, r, C), their operations, their `_numbers` (k, 6), the fill (C,) -> the changed pixels.
        bytes: of working memory for each byte of an image.
    """

    change: Callable[[Tensor, Sequence[Operation], Tensor, Tensor], Tensor]
    bytes: int


KERNELS: dict[str, _Kernels] = {
    **dict.fromkeys(TABLES, _Kernels(_looked_up, 12)),
    "color": _Kernels(_colored, 16),
    "sharpness": _Kernels(_sharpened, 16),
    "blur": _Kernels(_blurred, 24),
    **dict.fromkeys(("shear_x", "translate_x"), _Kernels(_moved_across, 20)),
    **dict.fromkeys(("shear_y", "translate_y"), _Kernels(_moved_down, 20)),
    "rotate": _Kernels(_rotated, 100),
}
"""Every operation of `operations.py`; neighbors with the same kernels change together."""
NAMES = ("", *KERNELS)
"""The operation of each index; the first is none."""
_INDEX = {name: index for index, name in enumerate(NAMES)}


def _numbers(operation: Operation, side: int) -> list[float]:
    """What the kernels need to know of an operation: six numbers, of which most operations use the first only."""
    name, amount = operation
    found = [amount]
    if name == "blur":
        found = _box(amount)
    elif name in MOVES:
        (a, b, c), (d, e, f) = pixels_of(MOVES[name](amount), side).tolist()
        change = KERNELS[name].change
        found = [b, c] if change is _moved_across else [d, f] if change is _moved_down else [a, b, c, d, e, f]
    return [*found, *[0.0] * (6 - len(found))]
