"""How a model is spread over ranks: the only place that knows."""

from scaleprog.sharding.backend import Backend
from scaleprog.sharding.fsdp import FsdpBackend
from scaleprog.sharding.replicated import ReplicatedBackend

ENGINES: dict[str, type[Backend]] = {"fsdp": FsdpBackend, "replicated": ReplicatedBackend}
