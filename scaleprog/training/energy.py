"""The energy of a start, as the hardware counts it: GPUs by NVML, CPUs and their memory by RAPL, read through zeus."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scaleprog.rundir.recorder import Recorder

WINDOW = "start"


@contextmanager
def metered(recorder: Recorder, device: torch.device, first_of_node: bool) -> Iterator[None]:
    """Records the joules of this rank's GPU while the context lasts; the first rank of a node adds those of its CPUs.

    Reading the counters waits for nothing on the device. Those of the CPUs count everything that runs on the node.
    Nothing is recorded without zeus (the extra `energy`), where it finds no counter, and for a start that was killed.
    """
    monitor = _begin(device, first_of_node)
    try:
        yield
    finally:
        if monitor is not None:
            _end(monitor, recorder, first_of_node)


def _begin(device: torch.device, first_of_node: bool) -> Any:
    """zeus's monitor; None without zeus, or if it fails: no run ends for a number that only a report reads."""
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None
    try:
        gpus = [torch.cuda.current_device()] if device.type == "cuda" else []
        monitor = ZeusMonitor(gpu_indices=gpus, cpu_indices=None if first_of_node else [])
        monitor.begin_window(WINDOW, sync_execution=False)
    except Exception as error:
        _tell(error)
        return None
    return monitor


def _end(monitor: Any, recorder: Recorder, first_of_node: bool) -> None:
    try:
        used = monitor.end_window(WINDOW, sync_execution=False)
        gpu, cpu, memory = (joules or {} for joules in (used.gpu_energy, used.cpu_energy, used.dram_energy))
        if gpu or cpu:
            counted = cpu or not first_of_node  # zeus may find no counter of the CPUs
            of_cpus = sum(cpu.values()) + sum(memory.values()) if counted else None
            recorder.own_event("energy", gpu_joules=sum(gpu.values()), cpu_joules=of_cpus)
    except Exception as error:
        _tell(error)


def _tell(error: Exception) -> None:
    print(f"the energy is not recorded: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
