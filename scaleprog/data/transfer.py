"""Reads whole files from behind a URL with fsspec: parts side by side, and attempts until the server answers.

A file that does not arrive is one of two problems. The server is away, or drops connections: attempts go on for a
stated time, and then `Unavailable` lets the launcher start the run again. Or the file is not there, or not the right
one: a few attempts, and then `DataError`. aiohttp, s3fs and gcsfs are optional; fsspec comes with torch.
"""

import asyncio
import mmap
import random
import re
from collections.abc import Awaitable, Callable, Coroutine
from itertools import count
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, get_loop, sync
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from scaleprog.errors import DataError, Unavailable

PART_BYTES = 4 * 2**20
STREAMS = 4
"""Parts of one file that are on their way at a time."""
BUFFERED = 2 * STREAMS * PART_BYTES
"""The most bytes of parts in memory: aiohttp holds a part in pieces before it joins them."""
PATIENCE_SECONDS = 120.0
"""How long a server may be away while a run reads from it."""
ANSWER_SECONDS, CONNECT_SECONDS = 60.0, 10.0
"""How long one answer, and the connection before it, may take."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 8.0
TRIES = 7
"""Attempts at a file that arrives, but is too short or damaged."""
_EXTRAS = {"s3": "s3", "gs": "gs", "http": "http", "https": "http"}
_RETRIED_STATUS = (408, 425, 429)
_RANDOM = random.SystemRandom()  # leaves the process's random numbers alone

Result = TypeVar("Result")


class _OtherLength(Exception):
    """An answer with too few bytes, or too many."""


def memory(size: int) -> mmap.mmap:
    """Memory for a shard of at least a byte, and a file at the same time; freed, it is the system's again at once."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def fetch(url: str, size: int) -> mmap.mmap:
    """The first `size` bytes of the file at `url`.

    Raises:
        DataError: there is no such file, the server refuses it, or it is shorter.
        Unavailable: the server has not answered for `PATIENCE_SECONDS`.
    """
    content = memory(size)
    streams = asyncio.Semaphore(STREAMS)

    async def part(files: AsyncFileSystem, path: str, start: int) -> int:
        stop = min(start + PART_BYTES, size)

        async def attempt() -> bytes:
            received: bytes = await files._cat_file(path, start=start, end=stop)
            if len(received) != stop - start and (start or len(received) != size):  # a server may send all of a file
                what = "truncated" if len(received) < stop - start else "too long"
                raise _OtherLength(f"{what}: {len(received)} bytes in place of {stop - start}")
            return received

        # without ranges, the first part is the whole file; what must arrive in a minute is the next of its bytes
        parts = -(-size // PART_BYTES) if start == 0 and url.startswith("http") else 1
        async with streams:
            received = await _persist(attempt, url, seconds=ANSWER_SECONDS * parts)
        content[start : start + len(received)] = received
        return len(received)

    async def all_parts(files: AsyncFileSystem, path: str) -> None:
        arrived = await part(files, path, 0)  # alone, because it may turn out to be everything
        async with asyncio.TaskGroup() as group:
            for start in range(arrived, size, PART_BYTES):
                group.create_task(part(files, path, start))

    try:
        _run(url, all_parts)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return content


def fetch_text(url: str, limit: int) -> str:
    """The UTF-8 text of a small file at `url`.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the server refuses it, it has more than `limit` bytes, or it is not UTF-8.
        Unavailable: the server has not answered for `PATIENCE_SECONDS`.
    """

    async def all_of_it(files: AsyncFileSystem, path: str) -> bytes:
        size = await _size(files, path, url, FileNotFoundError(url))
        if size is None or size > limit:
            raise DataError(f"{url}: {size or 'an unknown number of'} bytes; it may have at most {limit}")

        async def attempt() -> bytes:
            received: bytes = await files._cat_file(path, start=0, end=size)
            if len(received) != size:
                raise _OtherLength(f"truncated: {len(received)} of {size} bytes")
            return received

        return await _persist(attempt, url)

    content = _run(url, all_of_it)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{url}: not UTF-8: {error}") from error


def listing(url: str) -> dict[str, int | None]:
    """The files of the folder at `url` and of the folders in it, and their bytes; None if the listing does not say.

    Raises:
        DataError: there is no such folder, or the server refuses or cannot list it.
        Unavailable: the server has not answered for `PATIENCE_SECONDS`.
    """

    async def entries(files: AsyncFileSystem, path: str) -> list[dict[str, Any]]:
        folder = f"{path.rstrip('/')}/" if path.startswith("http") else path  # a web server redirects without the slash
        return await _persist(lambda: files._ls(folder, detail=True), url)

    async def files_below(files: AsyncFileSystem, path: str) -> dict[str, int | None]:
        found, below = await entries(files, path), f"{path}/"
        for folder in [entry["name"] for entry in found if entry["type"] == "directory"]:
            if folder.startswith(below) and folder.rstrip("/") != path:
                found += await entries(files, folder)
        return {entry["name"].removeprefix(below): entry["size"] for entry in found if entry["type"] == "file"}

    return _run(url, files_below)


def size_of(url: str) -> int:
    """Bytes of the file at `url`. Raises DataError, or Unavailable."""

    found = _run(url, lambda files, path: _size(files, path, url))
    if found is None:
        raise DataError(f"{url}: the server does not say how long the file is; copy the shards to a local folder")
    return found


async def _size(files: AsyncFileSystem, path: str, url: str, missing: Exception | None = None) -> int | None:
    """Bytes of a file; None if the server does not say. `missing`: see `_persist`."""
    size: int | None = (await _persist(lambda: files._info(path), url, missing))["size"]
    return size


def _run(url: str, work: Callable[[AsyncFileSystem, str], Coroutine[Any, Any, Result]]) -> Result:
    """Runs a coroutine with the file system of `url` in fsspec's thread. fsspec makes both anew in a forked process."""
    protocol = url.partition(":")[0]
    try:
        files = fsspec.filesystem(protocol, **({"get_client": _session} if protocol.startswith("http") else {}))
    except ImportError as error:
        raise DataError(f"{url}: {error}; pip install 'scaleprog[{_EXTRAS.get(protocol, protocol)}]'") from error
    path = files._strip_protocol(url)
    result: Result = sync(get_loop(), work, files if files.async_impl else AsyncFileSystemWrapper(files), path)
    return result


async def _persist(
    attempt: Callable[[], Awaitable[Result]],
    url: str,
    missing: Exception | None = None,
    seconds: float | None = None,
) -> Result:
    """The result of an attempt, repeated while it may yet succeed.

    `missing`: the error where there is no file. `seconds`: the most that an attempt may take (None: ANSWER_SECONDS).
    """
    clock = asyncio.get_running_loop().time
    give_up, others = clock() + PATIENCE_SECONDS, 0
    for failures in count():
        try:
            return await asyncio.wait_for(attempt(), seconds or ANSWER_SECONDS)
        except Exception as raised:  # each library has its own errors of a connection
            error = _underlying(raised)
            if isinstance(error, DataError):
                raise error from None
            if isinstance(error, FileNotFoundError):
                missing = missing or DataError(f"{url}: no such file; copy it there, or index the shards again")
                raise missing from error
            if _has_other_length(error):
                others += 1
                if others == TRIES:
                    raise DataError(f"{url}: {_plain(error)}; copy the shard again or rebuild it") from error
            if _refused(error):
                raise DataError(
                    f"{url}: the server refuses it ({_plain(error)}); are the URL and fsspec's credentials right?"
                ) from error
            if clock() > give_up:
                raise Unavailable(f"{url}: no answer for {PATIENCE_SECONDS:g} seconds: {_plain(error)}") from error
        pause = min(FIRST_PAUSE_SECONDS * 2 ** min(failures, 30), LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(pause * _RANDOM.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _underlying(error: Exception) -> Exception:
    """The error itself, or what made fsspec say that a web server has no such file: that may be anything."""
    cause = error.__cause__
    web = isinstance(cause, DataError) or (type(cause).__module__.startswith("aiohttp") and _status(cause) != 404)
    return cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and web else error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of aiohttp's errors, and of those of Google and huggingface."""
    for source in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            if isinstance(found := getattr(source, name, None), int):
                return found
    return None


def _has_other_length(error: Exception) -> bool:
    return isinstance(error, _OtherLength) or _beyond_end(error)


def _beyond_end(error: Exception) -> bool:
    """Whether a part was asked for that begins behind the end of a file."""
    return _status(error) == 416 or "InvalidRange" in str(error)


def _refused(error: Exception) -> bool:
    status = _status(error)
    return (
        isinstance(error, PermissionError)
        or type(error).__name__ == "NoCredentialsError"
        or (status is not None and 400 <= status < 500 and status not in (*_RETRIED_STATUS, 416))
    )


def _plain(error: Exception) -> str:
    """An error in a few words; without the query of a URL, which may be a signature."""
    text = re.sub(r"\?[^\s'\")]*", "", str(error) or type(error).__name__)
    text = f"truncated: {text}" if _beyond_end(error) else text
    return text if len(text) <= 300 else f"{text[:300]}..."


async def _session(**settings: Any) -> Any:
    """aiohttp's session: credentials from ~/.netrc, nothing decompressed, and no redirect to another server."""
    import aiohttp
    from yarl import URL

    async def stay(_session: object, _context: object, redirect: aiohttp.TraceRequestRedirectParams) -> None:
        headers = redirect.response.headers
        here = redirect.url.origin()
        there = redirect.url.join(URL(headers.get("Location") or headers.get("URI") or "")).origin()
        if there != here:
            raise DataError(
                f"{redirect.url}: redirects to another server, {there}; give that server's URL itself, or hf:// for a "
                "data set of huggingface.co"
            )

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(stay)
    usual: dict[str, Any] = {
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS),
        "trace_configs": [trace],
        "trust_env": True,
    }
    return aiohttp.ClientSession(**(usual | settings))
