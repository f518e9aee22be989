"""A key of another tool in a recipe: the error names what says the same here, and that exists."""

from __future__ import annotations

import re

import pytest

from limbeck.recipe.foreign import FOREIGN, said_here
from limbeck.recipe.load import known_keys, load_recipe, member_keys, objective_of
from limbeck.types import LimbeckError


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("section", ["", "train."])
def test_a_foreign_key_is_answered_with_the_one_here(name: str, section: str) -> None:
    with pytest.raises(LimbeckError) as error:
        load_recipe("kd", [f"{section}{name}=1"])
    said = f"unknown key '{section}{name}'; what other tools call {name} is {FOREIGN[name]} here"
    assert str(error.value) == said


# In an order that every worker of the tests has: a set has one of its own in each process.
@pytest.mark.parametrize("here", sorted(set(FOREIGN.values())))
def test_what_is_named_exists(here: str) -> None:
    (key,) = re.findall(r"[a-z]+(?:\.[a-z_]+)*(?==|$)", here.removeprefix("the weights of "))[:1]
    assert key in (*known_keys(), *member_keys())


@pytest.mark.parametrize("here", [here for here in FOREIGN.values() if "..." in here])
def test_what_is_to_be_written_loads(here: str) -> None:
    override = here.removeprefix("the weights of ").replace("...", "0.5")
    objective_of(load_recipe("gkd", ["objective={name: fkl}", override]))


def test_options_of_members_and_flags_are_known_too() -> None:
    with pytest.raises(LimbeckError, match=r"what other tools call lmbda is responses\.source=\{name: mixed"):
        load_recipe("kd", ["responses.source={name: student, lmbda: 0.5}"])
    with pytest.raises(LimbeckError, match=r"what other tools call kd_ratio is the weights of objective="):
        objective_of(load_recipe("kd", ["objective.kd_ratio=0.5"]))
    assert said_here("--kd-ratio") == FOREIGN["kd_ratio"]


def test_what_no_tool_has_is_compared_by_its_letters() -> None:
    assert said_here("train.lerning_rate") is None
    with pytest.raises(LimbeckError, match=r"did you mean 'train\.learning_rate'"):
        load_recipe("kd", ["train.lerning_rate=1"])
