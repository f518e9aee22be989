"""Several teachers as one: routed responses have their teacher's distribution, a mean has the members' exact mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from limbeck.models.heads import project
from limbeck.rollouts.collate import collate
from limbeck.teachers.base import Provision, Teacher, TeacherModel
from limbeck.teachers.combinations import COMBINATIONS, Mixing, Routing
from limbeck.teachers.several import SeveralTeachers
from limbeck.types import DenseSignal, Head, LimbeckError, Prompt, TokenBatch, TopKSignal
from tests.training.play import tiny_responses, tiny_teacher


@dataclass(kw_only=True)
class Fixed(Teacher):
    """A teacher around a model in memory, with a head of its own."""

    local: Any

    @classmethod
    def of(cls, width: int, **head: Any) -> Fixed:
        local = tiny_teacher(width=width)
        return cls(
            model=TeacherModel(model=f"w{width}"),
            device=torch.device("cpu"),
            local=replace(local, head=replace(local.head, **head)),
        )

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"hidden", "weights"})

    @property
    def head(self) -> Head:
        return self.local.head

    def signal(self, batch: TokenBatch) -> DenseSignal:
        return self.local.signal(batch)


def logits(signal: Any) -> torch.Tensor:
    return project(signal.head, signal.hidden_ND).double()


def members() -> dict[str, Fixed]:
    first = tiny_teacher(width=48).head
    bias_V = torch.randn(len(first.weight_VD), generator=torch.Generator().manual_seed(1))
    return {"a": Fixed.of(48), "b": Fixed.of(32, scale=0.5, bias_V=bias_V), "c": Fixed.of(64, scale=3.0)}


def several(**options: Any) -> SeveralTeachers:
    found = members()
    first = found["a"]
    return SeveralTeachers(model=first.model, device=first.device, members=found, combination="x", **options)


def test_routed_responses_have_the_distribution_of_their_teacher() -> None:
    batch = collate(tiny_responses(7), range(7), pad_id=0)
    names = {prompt: "abc"[row % 3] for row, prompt in enumerate(batch.prompts)}
    signal = several(member_of=names.__getitem__).signal(batch)
    sequence_N = batch.sequence_N
    for name, member in members().items():
        own = torch.tensor([names[batch.prompts[row]] == name for row in sequence_N])
        wanted = logits(member.signal(batch))[own]
        torch.testing.assert_close(logits(signal)[own], wanted, rtol=1e-4, atol=1e-4)


def test_a_mean_of_log_probabilities_is_that_of_the_members_at_every_temperature() -> None:
    batch = collate(tiny_responses(4), range(4), pad_id=0)
    mixing = COMBINATIONS.build("mean_log_p", weights={"a": 2.0, "b": 1.0, "c": 1.0})
    assert isinstance(mixing, Mixing)
    weights = mixing.weights_of(("a", "b", "c"))
    assert weights == {"a": 0.5, "b": 0.25, "c": 0.25}
    found = several(weights_of=weights)
    mean_NV = sum(weights[n] * logits(m.signal(batch)).log_softmax(-1) for n, m in members().items())
    assert isinstance(mean_NV, torch.Tensor)
    for tau in (0.5, 1.0, 2.0):
        wanted = (mean_NV / tau).log_softmax(-1)
        got = (logits(found.signal(batch)) / tau).log_softmax(-1)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert found.provides == {"hidden"}


def test_a_capped_head_is_refused_among_others() -> None:
    found = {"a": Fixed.of(48), "g": Fixed.of(32, softcap=30.0)}
    mixed = SeveralTeachers(
        model=found["a"].model,
        device=torch.device("cpu"),
        members=found,
        weights_of={"a": 0.5, "g": 0.5},
        combination="",
    )
    with pytest.raises(LimbeckError, match=r"teachers\.g caps its logits"):
        _ = mixed.head


@pytest.mark.parametrize("k", [7, None])
def test_a_mean_of_probabilities_is_that_of_the_members(monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
    monkeypatch.setattr("limbeck.teachers.likeliest._BLOCK_BYTES", 10_000)
    batch = collate(tiny_responses(4), range(4), pad_id=0)
    found = members() | {"d": Fixed.of(32, softcap=30.0)}
    weights = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    k = k or found["a"].head.vocab_size
    mixed = SeveralTeachers(
        model=found["a"].model,
        device=torch.device("cpu"),
        members=found,
        weights_of=weights,
        of_p=True,
        sparse=True,
        temperatures=(1.0, 2.0),
        support_k=k,
        combination="",
    )
    signal = mixed.signal(batch)
    assert isinstance(signal, TopKSignal) and mixed.provides == {"topk"}
    parts = [weight * logits(found[name].signal(batch)).softmax(-1) for name, weight in weights.items()]
    whole_NV = torch.stack(parts).sum(0).log()
    torch.testing.assert_close(signal.logp_NK.double(), whole_NV.topk(k).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole_NV.gather(-1, signal.ids_NK), whole_NV.topk(k).values, rtol=1e-4, atol=1e-4)
    for column, tau in enumerate((1.0, 2.0)):
        wanted_N = (whole_NV / tau).logsumexp(-1)
        torch.testing.assert_close(signal.log_z_NG[:, column].double(), wanted_N, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "text", "member"),
    [
        ("rule", {"patterns": {"code": r"\bdef\b|python", "math": r"\d"}}, "Write PYTHON that adds 2.", "code"),
        ("rule", {"patterns": {"code": "def", "math": r"\d"}}, "What is 2 + 2?", "math"),
        ("rule", {"patterns": {"code": "def"}, "otherwise": "math"}, "Hello", "math"),
        ("column", {"column": "domain"}, "Hello", "math"),
    ],
)
def test_a_prompt_has_its_teacher(name: str, options: dict[str, Any], text: str, member: str) -> None:
    combination = COMBINATIONS.build(name, **options)
    assert isinstance(combination, Routing)
    combination.check(("math", "code"))
    prompt = Prompt(id="p", text=text, columns={"domain": "math"})
    assert combination.member_of(prompt, ("math", "code")) == member


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rule", {"patterns": {"physics": "x"}}, "combine names the teacher 'physics', but teachers has math, code"),
        ("rule", {"patterns": {"math": "("}}, "no regular expression"),
        ("rule", {"patterns": {"math": "x"}, "otherwise": "art"}, "names the teacher 'art'"),
        ("mean_log_p", {"weights": {"math": 1.0}}, "none for teachers.code"),
        ("mean_log_p", {"weights": {"math": 1.0, "code": 1.0, "x": 1.0}}, "names the teacher 'x'"),
    ],
)
def test_options_that_name_no_teacher(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        COMBINATIONS.build(name, **options).check(("math", "code"))
    assert message in str(caught.value) and "\n" not in str(caught.value)
