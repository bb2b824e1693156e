"""What a sub-network costs: parameters, and multiply-accumulates counted by torch's own counter on the meta device."""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from scaleprog.growth.space import Subnet
from scaleprog.models.elastic import ElasticModel, ModelSettings, Structure


@cache
def parameters(family: type[ElasticModel], model: ModelSettings, depth: int) -> int:
    """Parameters of the network of `depth` layers."""
    with torch.device("meta"):
        return sum(p.numel() for p in family(model, Structure.plain(family.split(depth))).parameters())


@cache
def gmacs(family: type[ElasticModel], model: ModelSettings, subnet: Subnet) -> float:
    """Billions of multiply-accumulates of one image's forward pass, attention included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = family(model, Structure.plain(family.split(subnet.depth)))
        network(torch.empty(1, model.channels, subnet.resolution, subnet.resolution))
    return counter.get_total_flops() / 2e9
