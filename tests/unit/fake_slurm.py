"""Commands of Slurm's names on the PATH, which write down how they were called and answer what a test wants."""

from pathlib import Path
from typing import Any

SHOWN = (
    "JobId=7 JobName=scaleprog-a b UserId=me(1) GroupId=me(1) JobState={state} Reason={reason} Requeue=1 "
    "Restarts={restarts} BatchFlag={batch} ExitCode={code} TimeLimit=00:05:00 SubmitTime=1795468537 EndTime={end} "
    "PreemptTime={preempt} NodeList={nodes} BatchHost=node0{command}\n"
)


class FakeSlurm:
    """Commands in a folder of the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.show()
        self.command("sinfo", "echo low; echo high; echo low")
        self.command("sbatch", "echo Submitted batch job 7")
        self.command("scancel", "exit 0")

    def command(self, name: str, script: str) -> None:
        """Makes a command do what `script` says."""
        path = self.folder / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.folder}/calls\n{script}\n')
        path.chmod(0o755)

    def show(self, **fields: Any) -> None:
        """What scontrol shows of job 7; `requeue` does nothing."""
        values = {
            "state": "RUNNING",
            "reason": "None",
            "restarts": 0,
            "batch": 1,
            "code": "0:0",
            "end": "Unknown",
            "preempt": "None",
            "nodes": "node[0-1]",
            "command": "",
        }
        (self.folder / "shown").write_text(SHOWN.format(**values | fields))
        self.command("scontrol", f'[ "$1" = requeue ] || cat {self.folder}/shown')

    def calls(self, name: str) -> list[str]:
        """How a command was called."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ")]
