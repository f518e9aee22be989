"""Teachers made of the student's weights: what they share, what they follow, and that nothing of them is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from limbeck.student.adapters import LoraSpec, with_adapters
from limbeck.teachers.of_student import MovingAverage, base_under_adapters
from limbeck.types import LimbeckError
from tests.training.play import tiny_teacher


def moved(model: Any, seed: int) -> None:
    """Change every trained weight, as a step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 5, 7, 9]])).logits


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_the_average_is_that_of_torch(decay: float) -> None:
    student = tiny_teacher().model
    average = MovingAverage.of(student, decay)
    # Its first update copies, where ours begins as the student: so it is given one before anything moves.
    oracle = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    oracle.update_parameters(student)
    start = logits(student)
    for step in range(3):
        moved(student, step)
        average.follow()
        oracle.update_parameters(student)
    torch.testing.assert_close(logits(average.network), logits(oracle.module), rtol=1e-5, atol=1e-6)
    if decay == 1.0:
        assert torch.equal(logits(average.network), start)
    if decay == 0.0:
        assert torch.equal(logits(average.network), logits(student))


def test_an_average_in_float32_is_the_teachers_own_memory() -> None:
    student = tiny_teacher().model
    average = MovingAverage.of(student, 0.9)
    own = {weight.data_ptr() for weight in average.network.parameters()}
    assert {value.data_ptr() for value in average.state().values()} <= own
    assert not own & {weight.data_ptr() for weight in student.parameters()}


def test_an_average_goes_on_from_its_state_bit_for_bit() -> None:
    student = tiny_teacher().model
    average = MovingAverage.of(student, 0.9)
    moved(student, 1)
    average.follow()
    state = {name: value.clone() for name, value in average.state().items()}
    other = MovingAverage.of(student, 0.9)
    other.restore(state)
    assert torch.equal(logits(other.network), logits(average.network))
    with pytest.raises(LimbeckError, match="of other weights"):
        other.restore(dict(list(state.items())[1:]))


def test_an_average_in_half_precision_is_kept_in_float32() -> None:
    """Steps that bfloat16 would round away add up."""
    student = tiny_teacher(dtype=torch.bfloat16).model
    average = MovingAverage.of(student, 0.999)
    before = {name: value.clone() for name, value in average.state().items()}
    moved(student, 1)
    average.follow()
    name = next(iter(before))
    assert average.state()[name].dtype == torch.float32
    assert not torch.equal(average.state()[name], before[name])


def test_the_base_under_adapters_is_the_students_own_memory() -> None:
    plain = tiny_teacher().model
    wanted = logits(plain)
    student = with_adapters(plain, LoraSpec(r=2), seed=0)
    trained = [name for name, weight in student.named_parameters() if weight.requires_grad]
    base = base_under_adapters(student)
    moved(student, 3)
    assert torch.equal(logits(base), wanted) and not torch.equal(logits(student), wanted)
    held = {weight.data_ptr() for weight in student.parameters()}
    assert {weight.data_ptr() for weight in base.parameters()} <= held
    assert [name for name, weight in student.named_parameters() if weight.requires_grad] == trained


def test_an_average_of_adapters_shares_what_is_frozen() -> None:
    student = with_adapters(tiny_teacher().model, LoraSpec(r=2), seed=0)
    average = MovingAverage.of(student, 0.5)
    moved(student, 4)
    average.follow()
    own = {weight.data_ptr() for weight in average.network.parameters()}
    frozen = {weight.data_ptr() for weight in student.parameters() if not weight.requires_grad}
    trained = {weight.data_ptr() for weight in student.parameters() if weight.requires_grad}
    assert frozen <= own and not trained & own
    assert not any(weight.requires_grad for weight in average.network.parameters())
    assert any(weight.requires_grad for weight in student.parameters())


def test_a_student_without_adapters_has_no_base_below() -> None:
    with pytest.raises(LimbeckError, match="trains adapters alone"):
        base_under_adapters(tiny_teacher().model)
