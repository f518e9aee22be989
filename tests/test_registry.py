"""Registries of frozen dataclasses: building, listing, and members that come from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as strict_dataclass

from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.models.quantization import FORMATS
from limbeck.objectives import OBJECTIVES
from limbeck.objectives.sequence.rules import RULES
from limbeck.registry import Registry
from limbeck.rollouts.registry import SOURCES
from limbeck.types import LimbeckError


@dataclass(frozen=True)
class Plain:
    """A member with options of every kind.

    More of it.
    """

    size: int = 3
    share: float = 0.5
    name: str = "x"
    on: bool = True


@strict_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Strict:
    seeds: tuple[int, ...] = (1, 2)
    least: int = field(default=1)


@pytest.fixture
def registry() -> Registry[Any]:
    return Registry("thing", {"plain": Plain, "strict": Strict}, entry_points="limbeck.tests")


def test_options_are_the_fields(registry: Registry[Any]) -> None:
    assert registry.build("plain", size=4, share=1, on=False) == Plain(4, 1.0, "x", False)
    assert registry.build("strict", seeds=[3]) == Strict(seeds=(3,))
    assert {name: option.default for name, option in registry.options("plain").items()} == {
        "size": "3",
        "share": "0.5",
        "name": "'x'",
        "on": "True",
    }
    assert registry.summary("plain") == "A member with options of every kind."


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("plian", {}, "thing 'plian' is unknown (nearest: 'plain'): choose from plain, strict"),
        ("plain", {"share": 10**400}, f"plain share={10**400}: expected a number of less than 309 digits"),
        ([1], {}, "thing [1] is unknown: choose from plain, strict"),
        (1.5, {}, "thing 1.5 is unknown: choose from plain, strict"),
        ("plain", {"sise": 1}, "thing 'plain' has no option 'sise' (nearest: 'size'): it has size, share, name, on"),
        ("plain", {"size": True}, "plain size=True: expected a int, such as 3"),
        ("plain", {"size": 1.5}, "plain size=1.5: expected a int, such as 3"),
        ("strict", {"least": "x"}, "thing 'strict' least='x': input should be a valid integer"),
    ],
)
def test_mistakes_are_one_line(registry: Registry[Any], name: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        registry.build(name, **options)
    assert str(caught.value) == said


def test_a_member_from_outside(registry: Registry[Any]) -> None:
    @dataclass(frozen=True)
    class Mine:
        """Mine."""

    registry.register("mine", Mine)
    assert registry.build("mine") == Mine() and list(registry) == ["plain", "strict", "mine"]
    with pytest.raises(LimbeckError, match="thing 'mine' is registered already"):
        registry.register("mine", Plain)
    with pytest.raises(LimbeckError, match="expected a frozen dataclass"):
        registry.register("other", dict)
    registry.unregister("mine")
    assert "mine" not in registry


def test_entry_points_are_looked_for_once_and_when_needed(
    registry: Registry[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def installed(group: str) -> Iterator[EntryPoint]:
        asked.append(group)
        yield EntryPoint("theirs", f"{__name__}:Plain", group)

    monkeypatch.setattr("limbeck.registry.installed", installed)
    assert registry.build("plain") and not asked, "our own need no look"
    assert registry.build("theirs", size=1) == Plain(size=1)
    assert "unknown" not in registry and asked == ["limbeck.tests"]


@pytest.mark.parametrize(
    "registry", [OBJECTIVES, RULES, SOURCES, EVALUATION_GROUPS, FORMATS], ids=lambda registry: registry.kind
)
def test_every_member_says_what_it_is(registry: Registry[Any]) -> None:
    for name in registry:
        assert registry.summary(name).endswith((".", ":"))
        assert all(option.kind for option in registry.options(name).values())
