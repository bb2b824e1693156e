"""A web server of a folder that drops connections, cuts and delays answers, and is away for a while."""

import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer:
    """Serves `folder` at `url`, with parts of files (ranges); the shares of answers with a fault may change.

    Args:
        folder: what it serves.
        ranges: whether it sends parts of files, or always the whole.
        port: 0: any.
    """

    def __init__(self, folder: Path, ranges: bool = True, port: int = 0) -> None:
        self.folder, self.ranges = folder, ranges
        self.drops = self.cuts = self.delays = 0.0
        """Of all answers: the share that ends early, that is short without a sign, and that waits 20 ms."""
        self.trickles = 0.0
        """The seconds that a shard takes, in six pieces."""
        self.redirect, self.status, self.dead = "", 200, False
        self.moved = ""
        """A folder whose files have moved to the top."""
        self.dies: dict[int, float] = {}
        """Seconds for which it breaks all connections, by the number of the GET with which that begins."""
        self.asked: list[str] = []
        """The paths of all GETs."""
        self._random = random.Random(0)
        self._server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Answer, self))
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def count(self, path: str) -> None:
        """Notes a GET, and dies with it if that is its turn."""
        self.asked.append(path)
        if seconds := self.dies.pop(len(self.asked), 0):
            self.dead = True
            threading.Timer(seconds, self._revive).start()

    def _revive(self) -> None:
        self.dead = False

    def close(self) -> None:
        """Breaks all connections and refuses new ones."""
        self.dead = True
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[FaultyServer]:
    server = FaultyServer(folder, ranges)
    try:
        yield server
    finally:
        server.close()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: FaultyServer, *arguments: object) -> None:
        self._faults = server
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._faults.count(self.path)
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        faults, path = self._faults, self._faults.folder / self.path.strip("/")
        if faults.dead:
            self._hang_up()
            return
        moved = faults.moved and self.path.startswith(faults.moved)
        target = self.path.removeprefix(faults.moved) if moved else faults.redirect
        if target or faults.status != 200:
            self.send_response(302 if target else faults.status)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.is_dir():
            names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in path.iterdir())
            content, kind = "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode(), "text/html"
        elif path.is_file():
            content, kind = path.read_bytes(), "application/x-tar"
        else:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if faults.ranges else None
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        if asked and not part:
            self.send_error(416)
            return
        if faults.chance(faults.delays):
            time.sleep(0.02)
        if with_body and faults.chance(faults.cuts):
            part = part[: len(part) // 2]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        dropped = with_body and faults.chance(faults.drops)
        if with_body:
            part = part[: len(part) // 2] if dropped else part
            pieces = 6 if faults.trickles and path.suffix == ".tar" else 1
            for piece in range(pieces):
                time.sleep(faults.trickles / pieces if pieces > 1 else 0)
                self.wfile.write(part[len(part) * piece // pieces : len(part) * (piece + 1) // pieces])
        if dropped:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass
