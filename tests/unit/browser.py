"""A real browser that a test drives by the protocol of Chromium's developer tools."""

import asyncio
import base64
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

TEXT = """
(() => {
  const told = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) told.push(node.textContent.trim());
    if (node.nodeType === Node.ELEMENT_NODE && ["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName)) return;
    if (node.shadowRoot) walk(node.shadowRoot);
    node.childNodes.forEach(walk);
  };
  if (document.body) walk(document.body);
  return told.filter(Boolean).join("\\n");
})()
"""
"""Every text of a page, also those inside of components."""


class Page:
    """A tab of the browser."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._sent = loop, socket, 0

    def open(self, address: str) -> None:
        self._call("Page.navigate", url="about:blank")  # or another #fragment of a page would not load it again
        self._call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text_with(self, pattern: str, seconds: float) -> str:
        """Every text of the page, once it matches a pattern."""
        limit = time.monotonic() + seconds
        while not re.search(pattern, shown := self.evaluate(TEXT) or "", re.DOTALL):
            assert time.monotonic() < limit, f"no {pattern!r} in:\n{shown}"
            time.sleep(0.3)
        return shown

    def picture(self, path: Path) -> None:
        """Writes what is seen to a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(self._answer(method, parameters))

    async def _answer(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1
        await self._socket.send_json({"id": self._sent, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result


@contextmanager
def browsing(chromium: str, profile: Path, size: str = "1600,1200") -> Iterator[Page]:
    """A page of a Chromium of its own."""
    flags = f"--headless=new --no-sandbox --disable-gpu --remote-debugging-port=0 --window-size={size}".split()
    command = [chromium, *flags, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        assert browser.stderr is not None
        try:
            told = next(line for line in browser.stderr if "DevTools listening on" in line)
            port = int(re.findall(r":(\d+)/", told)[0])
            loop = asyncio.new_event_loop()
            session, socket = loop.run_until_complete(_connected(port))
            try:
                yield Page(loop, socket)
            finally:
                loop.run_until_complete(session.close())
                loop.close()
        finally:
            browser.kill()


async def _connected(port: int) -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
    session = aiohttp.ClientSession()
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        page = next(each for each in await answer.json() if each["type"] == "page")
    return session, await session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
