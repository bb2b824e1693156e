"""How long a rank waits for others: the time that a training step spends in collectives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Waited:
    """The time that one step spent in collectives, on this rank.

    On CUDA, events bracket each collective on its own stream. Collectives of two streams that overlap both count.
    """

    host_seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def seconds(self) -> float:
        """Call it when the device has finished the step."""
        return self.host_seconds + sum(begin.elapsed_time(end) for begin, end in self.events) / 1000


class Waits:
    """Measures collectives: `with waits: dist.all_reduce(...)`. Outside `measured`, that costs next to nothing.

    On the CPU a collective blocks the thread that calls it. On CUDA only events are recorded; nothing waits for the
    device.
    """

    def __init__(self, device: torch.device, known: bool = True) -> None:
        """`known`: whether the time in collectives can be measured; if not, `measured` yields None."""
        self._cuda, self.known = device.type == "cuda", known
        self._waited: Waited | None = None
        self._begun: float | torch.cuda.Event | None = None

    @contextmanager
    def measured(self, sampled: bool) -> Iterator[Waited | None]:
        """Measures the collectives inside the block, which should be one training step.

        `sampled`: whether to measure on CUDA, too, where events cost the host some microseconds for each collective.
        """
        self._waited = Waited() if self.known and (sampled or not self._cuda) else None
        try:
            yield self._waited
        finally:
            self._waited = self._begun = None

    def begin(self) -> None:
        """A collective is about to be issued, on the current stream."""
        if self._waited is not None:
            self._begun = _recorded() if self._cuda else time.perf_counter()

    def end(self) -> None:
        """The collective that began last has been issued; does nothing if none has begun."""
        if self._waited is None or self._begun is None:
            return
        if isinstance(self._begun, float):
            self._waited.host_seconds += time.perf_counter() - self._begun
        else:
            self._waited.events.append((self._begun, _recorded()))
        self._begun = None

    __enter__ = begin

    def __exit__(self, *_: object) -> None:
        self.end()


def _recorded() -> torch.cuda.Event:
    """An event that happens once the current stream has done what it was given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
