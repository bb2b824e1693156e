"""How a model is spread over ranks: the only place that knows."""

from scaleprog.sharding.backend import Backend
from scaleprog.sharding.settings import Engine


def engine(name: Engine) -> type[Backend]:
    """The backend of an engine's name; DeepSpeed is imported by those only who ask for it."""
    if name == "zero":
        from scaleprog.sharding.zero import ZeroBackend

        return ZeroBackend
    from scaleprog.sharding.fsdp import FsdpBackend
    from scaleprog.sharding.replicated import ReplicatedBackend

    return ReplicatedBackend if name == "replicated" else FsdpBackend
