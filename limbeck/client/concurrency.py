"""Several requests at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def concurrently(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Results of `work` as they finish, `workers` at a time.

    After a failure nothing new is begun; what is under way is still handed over, and then the failure raised.
    """
    waiting, lock, end = iter(items), threading.Lock(), object()
    finished: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            with lock:
                item: Any = next(waiting, end)
            if item is end:
                break
            try:
                finished.put(("result", work(item)))
            except BaseException as error:
                stopped.set()
                finished.put(("failure", error))
        finished.put(("end", None))

    # Daemons: an interrupted program need not wait until the server has answered them.
    threads = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    failures: list[BaseException] = []
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            kind, value = finished.get()
            if kind == "result":
                yield value
            elif kind == "failure":
                failures.append(value)
            else:
                running -= 1
    finally:
        stopped.set()
    if failures:
        raise failures[0]
