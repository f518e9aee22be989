"""Outputs of a vision tower: taken apart, kept in bounded memory, and given again instead of computing them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Kept:
    """Tensors by name, the least recently used forgotten first where they take too much memory."""

    def __init__(self, most: int):
        self.most, self.size = most, 0
        self._of: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, name: str) -> Any:
        if name not in self._of:
            return None
        self._of.move_to_end(name)
        return self._of[name][0]

    def put(self, name: str, value: Any, size: int) -> None:
        if size > self.most:
            return
        self._of[name] = (value, size)
        self.size += size
        while self.size > self.most:
            self.size -= self._of.popitem(last=False)[1][1]


def tensors_in(output: Any) -> Iterator[tuple[Any, Tensor]]:
    """The floating tensors of a tower's output by key and place."""
    items = output.items() if hasattr(output, "items") else enumerate(output if isinstance(output, tuple) else [output])
    for key, value in items:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield (key, None), value
        elif isinstance(value, tuple | list):
            for i, inner in enumerate(value):
                if isinstance(inner, Tensor) and inner.is_floating_point():
                    yield (key, i), inner


def with_tensors(output: Any, named: Mapping[Any, Tensor | None]) -> Any:
    """An output of the same kind with other tensors at some places."""

    def of(key: Any, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(named.get((key, i), inner) for i, inner in enumerate(value))
        return named.get((key, None), value)

    if hasattr(output, "items"):
        return type(output)(**{key: of(key, value) for key, value in output.items()})
    if isinstance(output, tuple):
        return tuple(of(i, value) for i, value in enumerate(output))
    return of(0, output)


@contextmanager
def answering(tower: nn.Module, output: Any) -> Iterator[None]:
    """A tower that gives what it gave before."""
    before = tower.__dict__.get("forward")
    tower.forward = lambda *args, **kwargs: with_tensors(output, {})
    try:
        yield
    finally:
        del tower.forward
        if before is not None:
            tower.forward = before
