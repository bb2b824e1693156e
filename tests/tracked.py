"""Trackers for tests: MLflow's own server on loopback, and a reader of what wandb writes offline."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = """
import os, sys
store, port = sys.argv[1:]
os.environ |= {"_MLFLOW_SERVER_FILE_STORE": store, "_MLFLOW_SERVER_ARTIFACT_ROOT": "nowhere"}
from mlflow.server import app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", int(port), app, threaded=True)
"""
Curves = dict[str, list[tuple[int, float]]]


class MLflowServer:
    """MLflow's server application over a database of its own; may be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [sys.executable, "-c", SERVER, f"sqlite:///{self._folder / 'mlflow.db'}", str(self.port)]
        with open(self._folder / "server.log", "ab") as log:
            environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
            self._process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self._folder, env=environment)
        give_up = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            assert time.monotonic() < give_up, "no server"
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def curves(self, name: str) -> Curves:
        """All points that the server has of the only run of this name, in the order of their steps."""
        from mlflow import MlflowClient

        client = MlflowClient(self.url)
        (run,) = [run for run in client.search_runs(["0"]) if run.info.run_name == name]
        history = {tag: client.get_metric_history(run.info.run_id, tag) for tag in run.data.metrics}
        return {tag: sorted((point.step, point.value) for point in points) for tag, points in history.items()}


@pytest.fixture
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[MLflowServer]:
    """A server that runs, and that MLFLOW_TRACKING_URI names."""
    pytest.importorskip("mlflow.server")
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    server.start()
    yield server
    server.stop()


def wandb_curves(run: Path) -> tuple[set[str], Curves]:
    """The ids and the points in all offline folders of a run, in the order in which they were written."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record

    ids: set[str] = set()
    curves: Curves = {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in _records(path.read_bytes()):
            record = Record.FromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for tag, value in items.items():
                if not tag.startswith("_"):
                    curves.setdefault(tag, []).append((record.history.step.num, value))
    return ids, curves


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, the first of which begins with 7 bytes."""
    whole, at = b"", 7
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is too short for a header
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""
