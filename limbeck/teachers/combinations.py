"""How several teachers are combined: the registry. Each prompt has one of them, or all score every response."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import field
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from limbeck.fields import STRICT, Positive
from limbeck.registry import Registry
from limbeck.types import LimbeckError, Prompt

COMBINE_KEY = "combine"


class Combination:
    """Base class of the members of the registry; each is a `Routing` or a `Mixing`."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that it reads."""
        return ()

    def check(self, names: Collection[str]) -> None:
        """Check the options against the names of the teachers.

        Raises:
            LimbeckError: they name another.
        """
        return


class Routing(Combination, ABC):
    """Each prompt has one teacher."""

    @abstractmethod
    def member_of(self, prompt: Prompt, names: Collection[str]) -> str:
        """The name of a prompt's teacher.

        Raises:
            LimbeckError: it has none, or one that is not there.
        """


class Mixing(Combination, ABC):
    """All teachers score every response.

    Class attributes:
        of_p: the mean is of probabilities, else of log-probabilities.
    """

    of_p: ClassVar[bool]

    @abstractmethod
    def weights_of(self, names: Collection[str]) -> dict[str, float]:
        """The weight of each teacher; they add up to 1."""


@dataclass(config=STRICT, kw_only=True)
class ByColumn(Routing):
    """Each prompt's teacher by a column of the data, which holds its name."""

    column: str = "teacher_id"
    """Name of the column."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def member_of(self, prompt: Prompt, names: Collection[str]) -> str:
        name = prompt.columns[self.column]
        if name not in names:
            raise LimbeckError(
                f"{prompt.where or prompt.id}: the column {self.column!r} names the teacher {name!r}; teachers has "
                f"{', '.join(names)}: correct the row, or add the teacher"
            )
        return name


@dataclass(config=STRICT, kw_only=True)
class ByRule(Routing):
    """Each prompt's teacher by what it asks: the first whose pattern is found in the prompt."""

    patterns: Mapping[str, str]
    """Regular expressions by the names of teachers, in order; upper and lower case are one."""
    otherwise: str | None = None
    """The teacher of prompts in which none is found; null refuses them."""

    def check(self, names: Collection[str]) -> None:
        for name in (*self.patterns, *(() if self.otherwise is None else (self.otherwise,))):
            _require_known(name, names)
        for name, pattern in self.patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise LimbeckError(
                    f"{COMBINE_KEY}.patterns.{name} is {pattern!r}, which is no regular expression ({error}); "
                    "correct it"
                ) from None

    def member_of(self, prompt: Prompt, names: Collection[str]) -> str:
        asked = prompt.text if prompt.text is not None else "\n".join(turn.content for turn in prompt.messages or ())
        for name, pattern in self.patterns.items():
            if re.search(pattern, asked, re.IGNORECASE):
                return name
        if self.otherwise is None:
            raise LimbeckError(
                f"{prompt.where or prompt.id}: no pattern of {COMBINE_KEY}.patterns is found in the prompt "
                f"{asked[:40]!r}; add one, or set {COMBINE_KEY}.otherwise to a teacher"
            )
        return self.otherwise


@dataclass(config=STRICT, kw_only=True)
class Mean(Mixing):
    """A mean of all teachers for every response."""

    weights: Mapping[str, Positive] = field(default_factory=dict)
    """Of each teacher by name, divided by their sum; empty gives all the same."""

    def check(self, names: Collection[str]) -> None:
        for name in self.weights:
            _require_known(name, names)
        if missing := [name for name in names if self.weights and name not in self.weights]:
            raise LimbeckError(
                f"{COMBINE_KEY}.weights has none for teachers.{missing[0]}; add it, or remove the teacher"
            )

    def weights_of(self, names: Collection[str]) -> dict[str, float]:
        weights: dict[str, Any] = dict(self.weights) or dict.fromkeys(names, 1.0)
        return {name: float(weights[name]) / sum(weights.values()) for name in names}


@dataclass(config=STRICT, kw_only=True)
class MeanLogP(Mean):
    """All teachers for every response: the weighted mean of their log-probabilities, normalised (log-linear pool)."""

    of_p: ClassVar[bool] = False


@dataclass(config=STRICT, kw_only=True)
class MeanP(Mean):
    """All teachers for every response: the weighted mean of their probabilities (linear pool), its likeliest tokens."""

    of_p: ClassVar[bool] = True


def _require_known(name: str, names: Collection[str]) -> None:
    if name not in names:
        raise LimbeckError(f"{COMBINE_KEY} names the teacher {name!r}, but teachers has {', '.join(names)}; correct it")


COMBINATIONS: Registry[Combination] = Registry(
    "combination",
    {"column": ByColumn, "rule": ByRule, "mean_log_p": MeanLogP, "mean_p": MeanP},
    entry_points="limbeck.combinations",
)
