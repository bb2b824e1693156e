"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2), and parameters (3) sharded over all ranks."""

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scaleprog.errors import RecipeError
from scaleprog.models.elastic import Active, ElasticModel
from scaleprog.ranks.rendezvous import limit_as_world
from scaleprog.ranks.waits import Waits
from scaleprog.sharding.backend import Backend, Network
from scaleprog.sharding.optimizer import MOMENTS, adamw, alike, moments
from scaleprog.sharding.placement import Placement

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it even in a single process

try:
    import deepspeed
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
except ImportError as error:
    raise RecipeError(f"sharding.engine: zero needs DeepSpeed: pip install 'scaleprog[deepspeed]' ({error})") from error

# DeepSpeed calls torch's collectives by deprecated names
warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)

BUCKET = 2**26  # most elements to reduce or gather at a time: DeepSpeed allocates as many


class ZeroBackend(Backend):
    """Wraps the model in a DeepSpeed engine, a new one at each growth; in stage 3, parameters are created sharded.

    On CPU and GPU alike, AdamW is torch's fused one. It steps only a few flat tensors, so DeepSpeed's own would be no
    faster, and that one needs a compiler at run time.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.waits = Waits(self.device, known=False)  # DeepSpeed issues the collectives itself
        deepspeed.utils.logger.setLevel(logging.WARNING)
        deepspeed.ops.__compatible_ops__ = {}  # no DeepSpeed op is used, yet the check for ops would compile one
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.group = deepspeed.utils.groups._get_data_parallel_group()
        limit_as_world(self.group)
        self._dtype = torch.bfloat16 if self.sharding.precision == "bf16" else torch.float32
        self._engine: Any = None

    def _configuration(self, model: ElasticModel) -> dict[str, Any]:
        """The configuration for `deepspeed.initialize`."""
        whole, unit = _numel_whole_and_largest(model)
        ranks, bucket = dist.get_world_size(self.group), min(BUCKET, unit)
        sharding, host = self.sharding, {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        zero: dict[str, Any] = {
            "stage": sharding.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": BUCKET,  # takes no buffer: DeepSpeed gathers in place
            "stage3_prefetch_bucket_size": bucket if sharding.reshard_after_forward else BUCKET,
            # while DeepSpeed builds the optimizer, it holds `ranks` times as many elements: a shard or a unit
            "sub_group_size": max(whole // ranks, unit) // ranks,
            "stage3_param_persistence_threshold": 0,  # small parameters must follow their `Placement`, too
            "stage3_max_reuse_distance": 0 if sharding.reshard_after_forward else 2**62,
            "stage3_max_live_parameters": 2 * bucket if sharding.reshard_after_forward else 2**62,
            "memory_efficient_linear": False,  # it would replace torch's own function in the whole process
        }
        if sharding.offload:
            zero["offload_optimizer"] = host
        if sharding.offload == "all":
            zero["offload_param"] = host
        return {
            "train_micro_batch_size_per_gpu": 1,  # required, but unused: gradients accumulate until `update`
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.optimizer.clip or 0.0,
            "bf16": {"enabled": sharding.precision == "bf16", "check_grad_overflow": True},
            "communication_data_type": "fp32",
            # for stage 1, fp32 would select another optimizer of DeepSpeed's, which keeps no shards that we could use
            "data_types": {"grad_accum_dtype": "fp32" if sharding.stage > 1 else None},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**62,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device in every forward and step
        }

    def build(self, model: ElasticModel, steps: Mapping[str, float], may_skip_layers: bool) -> Network:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        configuration = self._configuration(model)
        if self.sharding.stage == 3:
            layers = {type(layer) for group in model.groups() for layer in group}
            deepspeed.utils.set_z3_leaf_modules(model, list(layers))  # DeepSpeed then gathers each as a whole
            self._bear_sharded(model, configuration)
            for parameter in model.net.parameters(recurse=False):  # `model` uses them; `net.forward` never runs
                deepspeed.zero.register_external_parameter(model, parameter)
        else:
            model.to_empty(device=self.device)
        self._traced: tuple[Active, bool] | None = None
        named = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in named.items()}
        groups = alike(shapes, model.no_weight_decay(), self.optimizer, steps)
        self._adamw = adamw(groups, named, self.optimizer)
        self._engine, self._zero, *_ = deepspeed.initialize(model=model, optimizer=self._adamw, config=configuration)
        placements, weights, state = {}, {}, {}
        of = self._zero.sub_group_to_group_id if self.sharding.stage == 3 else range(len(groups))
        for index, (flat, laid) in enumerate(zip(self._masters, self._laid_out(), strict=True)):
            flat.data.zero_()
            ours = self._adamw.state[flat] = moments(flat, groups[of[index]].steps)
            for parameter, placement, position in laid:
                name, count = names[id(parameter)], len(placement.local(self._rank))
                placements[name], weights[name] = placement, flat.detach()[position : position + count]
                state[name] = {key: ours[key][position : position + count] for key in MOMENTS} | {"step": ours["step"]}
        return Network(
            model,
            self._engine,
            shapes,
            placements={name: placements[name] for name in shapes},
            weights={name: weights[name] for name in shapes},
            moments={name: state[name] for name in shapes},
        )

    def _bear_sharded(self, model: ElasticModel, configuration: dict[str, Any]) -> None:
        """Gives a meta-device model sharded parameters; only one at a time is whole, for a moment."""
        birth = _Birth(config_dict_or_path=configuration, dtype=self._dtype)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                whole = nn.Parameter(torch.empty(parameter.shape, dtype=self._dtype, device=self.device))
                setattr(module, name, whole)
                birth.keep_own(whole)

    @property
    def _masters(self) -> list[Tensor]:
        """The fp32 master weights that this rank steps: one flat tensor for each group, or in stage 3 several."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self.sharding.stage == 3 else zero.single_partition_of_fp32_groups

    def _laid_out(self) -> Iterator[list[tuple[nn.Parameter, Placement, int]]]:
        """Yields the parameters of each master, each with its placement and the start of its elements in the master."""
        zero = self._zero
        if self.sharding.stage == 3:
            for group in zero.fp16_groups:
                laid, position = [], 0
                for parameter in group:
                    laid.append((parameter, Placement(parameter.ds_numel, parameter.partition_numel()), position))
                    position += parameter.partition_numel()
                yield laid
            return
        for i, group in enumerate(zero.round_robin_bit16_groups):
            size = int(zero.partition_size[i])
            laid = []
            for parameter, offset in zip(group, zero.round_robin_bit16_offsets[i], strict=True):
                placement = Placement(parameter.numel(), size, offset)
                laid.append((parameter, placement, max(0, offset - self._rank * size)))
            yield laid

    def release(self) -> None:
        self._engine.destroy()
        self._engine = self._zero = None
        parameter_offload.FWD_MODULE_STACK.clear()  # DeepSpeed would keep the model there
        _forget_releases()

    def prepare_forward(self, images: Tensor, active: Active) -> Tensor:
        if self.sharding.stage == 3:
            self._retrace((active, torch.is_grad_enabled()))
            self._order_gathers()
        return images.to(self._dtype)

    def _order_gathers(self) -> None:
        """Has the next gathers wait for the update of the weights; DeepSpeed leaves that to its timers, which are off.

        It gathers on a stream of its own, which nothing else makes wait.
        """
        if self.device.type == "cuda":
            coordinator = self._zero.parameter_offload.get_param_coordinator()
            gathers = coordinator._PartitionedParameterCoordinator__allgather_stream
            gathers.wait_stream(torch.cuda.current_stream(self.device))

    def _retrace(self, pass_: tuple[Active, bool]) -> None:
        """Makes DeepSpeed forget its prefetch order if `pass_` differs from the last pass."""
        if pass_ != self._traced:
            coordinator = self._zero.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
            _forget_releases()
            self._traced = pass_

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def update(self, lr: float) -> Tensor:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()
        # infinite, and then a number of the host, if DeepSpeed has skipped the step
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device)
        # these gradient buffers persist: if the next step skips a layer, the layer's old gradients would count again
        if self.sharding.stage == 3:
            self._zero.grad_partitions_flat_buffer.zero_()
        for master in self._masters if self.sharding.offload else ():
            if master.grad is not None:
                master.grad.zero_()
        return norm

    @torch.no_grad()
    def refresh_compute_weights(self, changed: bool = True) -> None:
        if self.sharding.stage == 3:
            self._zero.parameter_offload.partition_all_parameters()
        if changed and self.sharding.stage < 3:
            self._zero.update_lp_params()
        elif changed:
            for shard, master in zip(self._zero.fp16_partitioned_groups_flat, self._masters, strict=True):
                shard.copy_(master)


def _forget_releases() -> None:
    """Clears the cache of a DeepSpeed method, which would keep every model and release parameters by old traces."""
    inspect.getclosurevars(_RELEASES).nonlocals["func"].cache_clear()


_RELEASES = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]


def _numel_whole_and_largest(model: ElasticModel) -> tuple[int, int]:
    """Elements of a model, and of its largest unit: a layer, or everything outside the layers."""
    layers = [sum(p.numel() for p in layer.parameters()) for group in model.groups() for layer in group]
    whole = sum(p.numel() for p in model.parameters())
    return whole, max(*layers, whole - sum(layers))


class _Birth(deepspeed.zero.Init):
    """zero.Init for parameters that get values later: zero.Init itself would broadcast rank 0's undefined ones."""

    def keep_own(self, parameter: nn.Parameter) -> None:
        """Keeps this rank's part of `parameter` and frees the rest."""
        self._convert_to_deepspeed_param(parameter)
        cast(Any, parameter).partition()
