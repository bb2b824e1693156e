"""Reads ahead: a thread loads the shards that will be needed next while the present ones are decoded."""

import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

AHEAD = 2
"""Shards that the thread has loaded or is loading, beyond those that have been taken."""
_POLL_SECONDS, _END_SECONDS = 0.1, 5.0

Loaded = TypeVar("Loaded")


class ReadAhead(Generic[Loaded]):
    """Loads a sequence in order, in a daemon thread, and hands it over in the same order. A context manager.

    Args:
        load: loads one shard; only the thread calls it.
        sequence: the indices of the shards, in the order in which `take` will ask for them.
    """

    def __init__(self, load: Callable[[int], Loaded], sequence: Iterable[int]) -> None:
        self._load, self._sequence = load, sequence
        self._loaded: SimpleQueue[tuple[int, Loaded | BaseException]] = SimpleQueue()
        self._room = threading.Semaphore(AHEAD)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="read-ahead")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread; one that waits for a server ends later, or with the process."""
        self._ended.set()
        self._thread.join(_END_SECONDS)

    def take(self, index: int) -> Loaded:
        """The next shard of the sequence, which must be `index`. Raises what `load` raised for it, from then on."""
        found, result = self._loaded.get()
        if isinstance(result, BaseException):
            self._loaded.put((found, result))
            raise result
        if found != index:
            raise RuntimeError(f"shard {index} was asked for, but {found} was read ahead")
        self._room.release()
        return result

    def _work(self) -> None:
        index = -1
        try:
            for index in self._sequence:
                while not self._room.acquire(timeout=_POLL_SECONDS):
                    if self._ended.is_set():
                        return
                if self._ended.is_set():
                    return
                self._loaded.put((index, self._load(index)))
            raise RuntimeError(f"no shard was to follow shard {index}")
        except BaseException as error:
            self._loaded.put((index, error))
