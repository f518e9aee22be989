"""Engines in a recipe: which response sources they can write for, and rounds that ask them for weights and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from limbeck.recipe.load import Recipe, load_recipe
from limbeck.rollouts.engines import ENGINES, Vllm
from limbeck.rollouts.rounds import ProcessGroup
from limbeck.rollouts.sources import StepCounter
from limbeck.types import LimbeckError, Response
from tests.sampling.writing import FakeSampler, own_of, played

ENGINE = "{name: vllm, base_url: 'http://localhost:9/v1'}"
TOTAL = 6


def recipe(source: str, *more: str, engine: str = ENGINE) -> Recipe:
    tree = {"teacher": {"model": "t"}, "student": {"init": "depth_prune", "layers": 2}}
    return load_recipe(tree, [f"responses.source={source}", f"responses.engine={engine}", *more])


@pytest.mark.parametrize("source", ["{name: student, refresh: epoch}", "{name: mixed, refresh: 7}", "pairs"])
def test_it_writes_for_what_is_written_in_rounds(source: str) -> None:
    engine = recipe(source).responses.engine
    assert isinstance(engine, Vllm) and engine.elsewhere and engine.addresses == ("http://localhost:9/v1",)
    several = recipe(source, engine="{name: vllm, base_url: [http://a/v1, http://b/v1]}").responses.engine
    assert isinstance(several, Vllm) and several.addresses == ("http://a/v1", "http://b/v1")
    assert not recipe("teacher", engine="in_process").responses.engine.elsewhere and next(iter(ENGINES)) == "in_process"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("teacher", "writes the student's responses, but responses.source=teacher has none"),
        ("student", "with responses.source.refresh=step that is a whole model on disk in every step"),
        ("{name: mixed, refresh: step}", "set responses.source.refresh to epoch or a number of steps"),
        ("{name: mixed, refresh: 1}", "set responses.source.refresh to epoch or a number of steps"),
        ("replay", "writes rounds of responses, but responses.source=replay"),
        ("{name: speculative, refresh: 4}", "has the student alone, but with responses.source=speculative the teacher"),
        ("{name: student, refresh: 4, teacher_share: 0.2}", "the teacher draws tokens too"),
    ],
)
def test_other_sources_are_refused(source: str, why: str) -> None:
    with pytest.raises(LimbeckError) as error:
        recipe(source)
    assert why in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("addresses", ["[]", "[http://a/v1, http://a/v1]"])
def test_addresses_are_there_and_once(addresses: str) -> None:
    with pytest.raises(LimbeckError, match=r"responses\.engine\.base_url (is empty|names a server twice)"):
        recipe("pairs", engine=f"{{name: vllm, base_url: {addresses}}}")


def test_a_key_is_not_named_by_itself() -> None:
    with pytest.raises(LimbeckError, match=r"responses\.engine\.api_key_env is no name") as error:
        recipe("pairs", engine="{name: vllm, base_url: 'http://localhost:9/v1', api_key_env: sk-secret}")
    assert "sk-secret" not in str(error.value)


@dataclass
class Elsewhere(FakeSampler):
    """A sampler that is given weights; `live` stands for those of the student."""

    live: int = 0
    taken: list[int] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)

    def take(self, number: int, world: ProcessGroup) -> None:
        self.weights = self.live
        self.taken.append(number)

    def compare(self, number: int, responses: Sequence[Response], world: ProcessGroup) -> Mapping[str, float]:
        assert {r.response_ids[0] for r in responses} == {self.weights} and {r.round for r in responses} == {number + 1}
        self.compared.append(number)
        return {"engine/gap": float(number)}


def test_each_round_is_written_with_the_weights_as_they_are(tmp_path: Path) -> None:
    sampler = Elsewhere()
    own = own_of(sampler, tmp_path, refresh=2)
    for step in range(TOTAL):
        sampler.live = step
        clock = StepCounter(step=step, total=TOTAL)
        assert {r.response_ids[0] for r in own.step(clock).values()} == {step // 2 * 2}
        assert own.metrics(clock) == {"engine/gap": float(step // 2)}
    assert sampler.taken == sampler.compared == [0, 1, 2]


def test_a_round_that_is_on_disk_needs_no_weights(tmp_path: Path) -> None:
    played(own_of(Elsewhere(), tmp_path, refresh=2), range(3), TOTAL)
    late = Elsewhere()
    played(own_of(late, tmp_path, refresh=2), range(3, TOTAL), TOTAL)
    assert late.taken == [2] and late.compared == [1, 2]


def test_an_epoch_of_one_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match="an epoch is one step here"):
        own_of(Elsewhere(), tmp_path, prompts=3, step_rows=8, refresh=None)
