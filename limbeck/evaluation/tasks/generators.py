"""Problems made by a program, as many and as hard as one likes: no data is needed, and every answer can be checked."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.evaluation.tasks.problems import TaskName
from limbeck.fields import STRICT, Count, Seed
from limbeck.registry import Registry
from limbeck.types import LimbeckError


class ProblemGenerator(ABC):
    """A source of problems: a frozen dataclass whose fields are its options.

    Attributes:
        task: what its rows are problems of; see `limbeck.evaluation.tasks.problems`.
    """

    task: ClassVar[TaskName]

    @abstractmethod
    def rows(self) -> Iterator[dict[str, Any]]:
        """The problems in the fields of the task, the same ones each time."""

    def check(self) -> None:  # noqa: B027 (not every generator has options that exclude each other)
        """Refuse options that cannot be together.

        Raises:
            LimbeckError: they cannot.
        """


@dataclass(config=STRICT, kw_only=True)
class ChainedSums(ProblemGenerator):
    """Sums and differences modulo a number: each line of the answer is the chain with its first step done."""

    count: Count = 10_000
    """Problems to make; the few that repeat an earlier one are left out when prompts are read."""
    shortest: Annotated[int, Field(ge=2)] = 4
    """Numbers of a chain at least; each but the first is a step of the answer."""
    longest: Annotated[int, Field(ge=2)] = 8
    """At most: the longer, the harder, since one wrong step makes the answer wrong."""
    modulus: Annotated[int, Field(ge=2, le=1000)] = 10
    """All numbers are below this one; a step is one of twice its square facts."""
    seed: Seed = 0

    task: ClassVar[TaskName] = "chain"

    def check(self) -> None:
        if self.longest < self.shortest:
            raise LimbeckError(
                f"prompts.generate.longest is {self.longest}, below prompts.generate.shortest, {self.shortest}; "
                "raise it"
            )

    def rows(self) -> Iterator[dict[str, Any]]:
        draw = random.Random(self.seed)
        for _ in range(self.count):
            numbers = [draw.randrange(self.modulus) for _ in range(draw.randint(self.shortest, self.longest))]
            signs = [draw.choice("+-") for _ in numbers[1:]]
            rests = [
                "".join(f"{s}{n}" for s, n in zip(signs[i:], numbers[i + 1 :], strict=True))
                for i in range(len(numbers))
            ]
            value, lines = numbers[0], []
            for sign, number, rest in zip(signs, numbers[1:], rests[1:], strict=True):
                value = (value + number if sign == "+" else value - number) % self.modulus
                lines.append(f"{value}{rest}")
            yield {"question": f"{numbers[0]}{rests[0]}\n", "answer": "\n".join([*lines[:-1], f"#### {value}"])}


_MEMBERS: dict[str, type[ProblemGenerator]] = {"chain": ChainedSums}
GENERATORS: Registry[ProblemGenerator] = Registry("generator", _MEMBERS, entry_points="limbeck.generators")
