"""Several servers of one model that share the requests; one that fails costs no more than the requests it had."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from limbeck.client.openai import Refusal, Server, ServerOptions
from limbeck.types import Json, LimbeckError

R = TypeVar("R")
# Path and bodies of requests to one server.
Requests = tuple[str, Sequence[Json]]


def servers_at(
    addresses: str | tuple[str, ...], options: ServerOptions, section: str, served: str
) -> tuple[Server, ...]:
    """The servers of a section of a recipe, not asked anything yet.

    Args:
        addresses: one, or several of servers with the same model.
        served: what they serve, for messages ("the teacher").

    Raises:
        LimbeckError: no address, one twice, or one that is none.
    """
    each = (addresses,) if isinstance(addresses, str) else addresses
    if not each:
        raise LimbeckError(f"{section}.base_url is empty; give the address of a server that serves {served}")
    if len(set(each)) < len(each):
        raise LimbeckError(f"{section}.base_url names a server twice; name each once")
    return tuple(Server.at(address, options, section) for address in each)


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

    @property
    def left(self) -> tuple[Server, ...]:
        """The servers that are not left out."""
        with self._lock:
            return tuple(server for number, server in enumerate(self.servers) if number not in self._failed)

    def take_back(self) -> None:
        """Ask all servers again."""
        with self._lock:
            self._failed.clear()

    def keep(self, addresses: Collection[str]) -> None:
        """Ask those at certain addresses alone, until all are taken back."""
        with self._lock:
            for number, server in enumerate(self.servers):
                if server.base_url not in addresses:
                    self._failed[number] = LimbeckError(f"{server.root} was left out by the first rank")

    def post(self, asking: Callable[[Server], Requests]) -> tuple[Server, list[Json | Refusal]]:
        """The answers to some requests, all by one server and one after the other: see `of_any`.

        Args:
            asking: gives the requests for a server.

        Raises:
            LimbeckError: no server is left; the failure of the last one.
        """

        def ask(server: Server) -> tuple[Server, list[Json | Refusal]]:
            path, bodies = asking(server)
            return server, [server.post(path, body) for body in bodies]

        return self.of_any(ask)

    def of_any(self, work: Callable[[Server], R]) -> R:
        """The result of some work with one server: that with least to do.

        What a server fails in is done with another, and nothing further is asked of it.

        Raises:
            LimbeckError: no server is left; the failure of the last one.
        """
        while True:
            number = self._take()
            server = self.servers[number]
            try:
                return work(server)
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
            self.warn(f"{error}; until then the others of {server.section}.base_url ({left}) do its work")

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
