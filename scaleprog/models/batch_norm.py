"""Batch norm whose statistics depend neither on the number of ranks nor on the micro-batch.

A training batch consists of lanes, and a rank owns whole lanes. Each lane is normalized by its own statistics, so no
rank needs another's, and any micro-batch of whole lanes computes the same. Evaluation takes running statistics, which
follow the mean over all lanes of a global batch.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class LaneNorm(nn.BatchNorm2d):
    """timm's BatchNorm2d, normalizing every `rows` images of a training batch by themselves.

    Statistics are no buffers: engines move, cast, and copy buffers as they please. Whoever trains the network updates
    `running` from `take_mean` after each step.
    """

    rows: int = 0
    """Images of a lane; 0: the whole batch is one."""

    def __init__(self, like: nn.BatchNorm2d) -> None:
        super().__init__(
            like.num_features, like.eps, like.momentum, track_running_stats=False, device=like.weight.device
        )
        self.running = self.untaught(like.weight.device)
        self.pending: list[Tensor] = []

    def untaught(self, device: torch.device) -> Tensor:
        """Running statistics before training, (2, C): means of 0, variances of 1."""
        zeros = torch.zeros(self.num_features, device=device)
        return torch.stack((zeros, zeros + 1))

    def take_mean(self) -> Tensor:
        """The mean statistics of the lanes since the last call, (2, C); forgets them."""
        mean = torch.cat(self.pending, 1).mean(1)
        self.pending.clear()
        return mean

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            mean, variance = self.running.to(images.device).unbind()
            scale, shift = self.weight.float(), self.bias.float()  # running statistics are fp32 in every precision
            normed = functional.batch_norm(images.float(), mean, variance, scale, shift, eps=self.eps)
            return normed.to(images.dtype)
        rows = self.rows or len(images)
        lanes = len(images) // rows
        # (B, C, H, W) -> (rows, lanes * C, H, W): batch norm then sees each channel of each lane as a channel
        split = images.unflatten(0, (lanes, rows)).transpose(0, 1).flatten(1, 2)
        scale, shift = self.weight.repeat(lanes), self.bias.repeat(lanes)
        normed, mean, inverse = torch.native_batch_norm(split, scale, shift, None, None, True, 0.0, self.eps)
        count = split.numel() // split.shape[1]
        variance = (inverse.detach() ** -2 - self.eps) * (count / max(1, count - 1))
        self.pending.append(torch.stack((mean.detach(), variance)).view(2, lanes, -1).float())
        return normed.unflatten(1, (lanes, -1)).transpose(0, 1).flatten(0, 1)


def replace_batch_norms(net: nn.Module) -> dict[str, LaneNorm]:
    """Puts a LaneNorm in place of every BatchNorm2d of `net`, and returns them by name."""
    found = {name: LaneNorm(module) for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, norm in found.items():
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, norm)
    return found
