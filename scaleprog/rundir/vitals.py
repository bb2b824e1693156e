"""What a process measures of itself: the time of a step, and its memory on the host and on the device."""

import os
import time
from functools import lru_cache

import torch

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")


class StepTimer:
    """Seconds and CPU seconds of one training step. On CUDA it uses events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self.began, self._cpu_began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Ends the measurement; call it once, when the step has been issued."""
        self.cpu_seconds = time.process_time() - self._cpu_began
        self._elapsed = time.perf_counter() - self.began
        if self._cuda:
            self._events[1].record()

    def seconds(self) -> float:
        """The step's duration in seconds; waits for the device if it has not finished."""
        if not self._cuda:
            return self._elapsed
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


@lru_cache(maxsize=1)
def _statm(process: int) -> int:
    """The descriptor of what the kernel says about this process's memory; opening it takes longer than reading it."""
    return os.open(f"/proc/{process}/statm", os.O_RDONLY)


def memory(device: torch.device) -> dict[str, float]:
    """MiB that this process holds on the host and, by torch's allocator, on a CUDA device; waits for nothing.

    `device_peak_mib`: the most that tensors held since this start began.
    """
    pages = int(os.pread(_statm(os.getpid()), 128, 0).split()[1])
    found = {"host_mib": pages * PAGE / MIB}
    if device.type == "cuda":
        held = torch.cuda.memory_stats(device)
        found |= {
            "device_allocated_mib": held["allocated_bytes.all.current"] / MIB,
            "device_reserved_mib": held["reserved_bytes.all.current"] / MIB,
            "device_peak_mib": held["allocated_bytes.all.peak"] / MIB,
        }
    return found
