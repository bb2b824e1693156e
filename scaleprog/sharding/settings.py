"""How a recipe says what spreads the model over the ranks, and what of it can be refused before there are any."""

import importlib.util
from typing import Literal

from pydantic import model_validator

from scaleprog.errors import RecipeError
from scaleprog.settings import Ranks, Settings

Engine = Literal["fsdp", "hsdp", "zero", "replicated"]


class ShardingSettings(Settings):
    """What spreads the model over the ranks; master weights, moments and EMA are fp32 in every engine.

    `engine`: `fsdp` (FSDP2: parameters, gradients, moments and EMA sharded over all ranks), `hsdp` (sharded over groups
    of `shard` ranks, replicated across them), `zero` (DeepSpeed, of the given `stage`) or `replicated` (one process, or
    DDP); `precision`: of forward and backward.
    """

    engine: Engine = "fsdp"
    precision: Literal["fp32", "bf16"] = "fp32"
    stage: Literal[1, 2, 3] = 3
    """zero: optimizer and EMA sharded (1), gradients too (2), parameters too (3)."""
    shard: Ranks | None = None
    """hsdp: ranks that one copy of the model is spread over; default: those of a node."""
    offload: Literal["optimizer", "all"] | None = None
    """What lives in the host's memory: zero's optimizer state, or with it (stage 3) and under fsdp and hsdp the
    parameters, too."""
    reshard_after_forward: bool = True
    """Whether a layer's sharded parameters are gathered anew for backward, which saves memory for bandwidth."""
    recompute: bool = False
    """Whether a layer's activations are computed again in backward (activation checkpointing) instead of kept."""
    compile: bool = False
    """Whether torch.compile makes one kernel sequence of each layer, for all resolutions and depths."""

    @model_validator(mode="after")
    def _check(self) -> "ShardingSettings":
        if self.shard is not None and self.engine != "hsdp":
            raise ValueError(f"shard is of engine hsdp, got engine {self.engine}")
        if self.engine != "zero" and "stage" in self.model_fields_set and self.stage != 3:
            raise ValueError(f"stage is of engine zero, got engine {self.engine}")
        if self.offload is None:
            return self
        if self.engine == "replicated":
            raise ValueError("offload needs an engine that shards: fsdp, hsdp or zero")
        if self.engine == "zero" and self.offload == "all" and self.stage != 3:
            raise ValueError(
                f"offload: all needs stage 3, which shards the parameters; stage {self.stage} can: optimizer"
            )
        if self.engine != "zero" and self.offload == "optimizer":
            raise ValueError(f"engine {self.engine} offloads all or nothing, got offload: optimizer")
        return self

    def check_world(self, world: int, per_node: int) -> None:
        """Raises RecipeError for what cannot run here on `world` ranks, `per_node` of them on each node."""
        if self.engine == "zero" and importlib.util.find_spec("deepspeed") is None:
            raise RecipeError("sharding.engine: zero needs DeepSpeed: pip install 'scaleprog[deepspeed]'")
        if self.engine == "hsdp":
            self.shard_ranks(world, per_node)

    def shard_ranks(self, world: int, per_node: int | None = None) -> int:
        """Ranks that one copy of the model is spread over; hsdp without `shard`: `per_node`, or all of them.

        Raises RecipeError if hsdp's do not divide `world`.
        """
        if self.engine != "hsdp":
            return 1 if self.engine == "replicated" else world
        ranks = self.shard or per_node or world
        if world % ranks:
            raise RecipeError(
                f"sharding.shard: groups of {ranks} ranks do not divide a world of {world}; "
                f"use one of {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
            )
        return ranks
