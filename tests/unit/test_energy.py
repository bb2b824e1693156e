"""The energy of a start: what is recorded of the counters that zeus finds, and that no run depends on it."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from scaleprog.rundir.recorder import Recorder
from scaleprog.training.energy import metered

CPU = torch.device("cpu")


class Monitor:
    """Stands for zeus's: CPUs with counters, which read 0 at first."""

    broken = False

    def __init__(self, gpu_indices: list[int], cpu_indices: list[int] | None) -> None:
        if self.broken:
            raise RuntimeError("no permission")
        self.gpus, self.cpus = gpu_indices, [0, 1] if cpu_indices is None else cpu_indices

    def begin_window(self, key: str, sync_execution: bool) -> None:
        assert not sync_execution
        self.key = key

    def end_window(self, key: str, sync_execution: bool) -> Any:
        assert (key, sync_execution) == (self.key, False)
        cpu, memory = (dict.fromkeys(self.cpus, joules) or None for joules in (100.0, 10.0))
        return SimpleNamespace(gpu_energy=dict.fromkeys(self.gpus, 1000.0), cpu_energy=cpu, dram_energy=memory)


class Events:
    """Stands for the recorder of a rank."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def own_event(self, kind: str, **fields: Any) -> None:
        self.written.append({"event": kind, **fields})


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch) -> type[Monitor]:
    class Mine(Monitor):
        pass

    module = ModuleType("zeus.monitor")
    module.ZeusMonitor = Mine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    return Mine


def measure(first_of_node: bool = True, work: Any = lambda: None) -> list[dict[str, Any]]:
    """The events of a start that does `work`."""
    events = Events()
    try:
        with metered(cast(Recorder, events), CPU, first_of_node):
            work()
    except ZeroDivisionError:
        pass
    return events.written


def test_the_first_rank_of_a_node_records_its_cpus(zeus: type[Monitor]) -> None:
    assert measure(first_of_node=True) == [{"event": "energy", "gpu_joules": 0, "cpu_joules": 220.0}]
    assert measure(first_of_node=False) == [], "the other ranks would count the same CPUs again"


@pytest.mark.parametrize(("first_of_node", "of_cpus"), [(True, None), (False, 0)])
def test_a_gpu_is_counted_where_cpus_are_not(zeus: type[Monitor], first_of_node: bool, of_cpus: int | None) -> None:
    zeus.end_window = lambda *_, **__: SimpleNamespace(gpu_energy={0: 9.0}, cpu_energy=None, dram_energy=None)  # type: ignore[assignment]
    assert measure(first_of_node) == [{"event": "energy", "gpu_joules": 9.0, "cpu_joules": of_cpus}]


def test_a_start_that_fails_is_measured_too(zeus: type[Monitor]) -> None:
    assert len(measure(work=lambda: 1 / 0)) == 1


def test_no_run_ends_for_its_energy(zeus: type[Monitor], capsys: pytest.CaptureFixture[str]) -> None:
    zeus.broken = True
    assert measure() == []
    assert "the energy is not recorded: RuntimeError: no permission" in capsys.readouterr().err
