"""Several servers of one model that share the requests; one that fails costs no more than the requests it had."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from limbeck.client.openai import Refusal, Server
from limbeck.types import Json, LimbeckError

# Path and bodies of requests to one server.
Requests = tuple[str, Sequence[Json]]


@dataclass(kw_only=True)
class ServerPool:
    """Servers with the same model, each asked by as many threads as the others.

    Attributes:
        servers: at least one.
        warn: called with one line when a server is left out from now on.
    """

    servers: Sequence[Server]
    warn: Callable[[str], None] = lambda line: None
    _busy: dict[int, int] = field(default_factory=dict)
    _failed: dict[int, LimbeckError] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def post(self, asking: Callable[[Server], Requests]) -> tuple[Server, list[Json | Refusal]]:
        """The answers to some requests, all by one server and one after the other: the server with least to do.

        Requests of a server that fails are asked of another, and no further one of it.

        Args:
            asking: gives the requests for a server.

        Raises:
            LimbeckError: no server is left; the failure of the last one.
        """
        while True:
            number = self._take()
            server = self.servers[number]
            try:
                path, bodies = asking(server)
                return server, [server.post(path, body) for body in bodies]
            except LimbeckError as error:
                self.leave_out(server, error)
            finally:
                self._give_back(number)

    def leave_out(self, server: Server, error: LimbeckError) -> None:
        """Ask a server nothing any more.

        Raises:
            LimbeckError: it was the last one.
        """
        with self._lock:
            again = self.servers.index(server) in self._failed
            self._failed[self.servers.index(server)] = error
            left = len(self.servers) - len(self._failed)
        if not left:
            raise error
        if not again:
            self.warn(f"{error}; until then the others of teacher.where.base_url ({left}) do its work")

    def _take(self) -> int:
        with self._lock:
            left = [number for number in range(len(self.servers)) if number not in self._failed]
            if not left:
                raise next(reversed(self._failed.values()))
            number = min(left, key=lambda one: self._busy.get(one, 0))
            self._busy[number] = self._busy.get(number, 0) + 1
            return number

    def _give_back(self, number: int) -> None:
        with self._lock:
            self._busy[number] -= 1
