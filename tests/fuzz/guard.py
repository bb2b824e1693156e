"""No start that is fuzzed may signal a process outside its own session: the attempt is written down and does nothing.

`python -m tests.fuzz.guard SIGNALS MODULE ARGUMENTS` is `python -m MODULE ARGUMENTS` so guarded.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def install(signals: Path) -> None:
    """Guards this process; attempts are appended to the file `signals`, as a signal and a process each."""

    def guarded(send: Callable[..., None], described: Callable[[int], int]) -> Callable[..., None]:
        def call(target: int, number: int, *rest: Any) -> None:
            pid = described(target)
            if number and not own(pid):
                with open(signals, "a") as file:
                    file.write(f"{int(number)} {pid}\n")
                return
            send(target, number, *rest)

        return call

    os.kill = guarded(os.kill, lambda pid: pid)  # type: ignore[assignment]
    os.killpg = guarded(os.killpg, lambda group: -group)  # type: ignore[assignment]
    signal.pidfd_send_signal = guarded(signal.pidfd_send_signal, of_handle)  # type: ignore[assignment]


def own(pid: int) -> bool:
    """Whether a process (negative: a group) is of this session."""
    try:
        return pid not in (0, 1, -1) and os.getsid(abs(pid)) == os.getsid(0)
    except OSError:
        return False


def of_handle(handle: int) -> int:
    """The process of a pidfd."""
    return int(Path(f"/proc/self/fdinfo/{handle}").read_text().split("Pid:")[1].split()[0])


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
