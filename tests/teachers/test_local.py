"""The teacher in this process: its signal is the full model's logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from limbeck.models.heads import head_of, project
from limbeck.rollouts.collate import collate
from limbeck.teachers.local import LocalTeacher
from tests.training.play import VOCAB, tiny_model, tiny_responses


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_signal_is_the_full_models_logits(family, tied):
    model = tiny_model(3, family=family, tied=tied)
    teacher = LocalTeacher(model, head_of(model, VOCAB))
    batch = collate(tiny_responses(), [3, 8, 1, 13], pad_id=0)
    signal = teacher.signal(batch)
    with torch.no_grad():
        full_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    # Three rows of the head are padding and not part of the signal.
    expected_NV = full_BTV[batch.loss_mask_BT][:, :VOCAB]
    torch.testing.assert_close(project(signal.head, signal.hidden_ND), expected_NV, rtol=1e-4, atol=1e-5)
    assert signal.hidden_ND.shape == (len(batch.labels_N), 32)


def test_every_row_is_judged_as_if_alone():
    model = tiny_model(3)
    teacher, responses = LocalTeacher(model, head_of(model, VOCAB)), tiny_responses()
    together = teacher.signal(collate(responses, [0, 5, 9], pad_id=0)).hidden_ND
    alone = torch.cat([teacher.signal(collate(responses, [row], pad_id=0)).hidden_ND for row in (0, 5, 9)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 20, 45, 10_000])
def test_a_large_batch_takes_several_passes(budget):
    model, responses = tiny_model(3), tiny_responses()
    teacher, batch = LocalTeacher(model, head_of(model, VOCAB)), collate(responses, range(9), pad_id=0)
    whole, shapes = teacher.signal(batch), []
    with model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    ):
        several = replace(teacher, max_tokens=budget).signal(batch)
    torch.testing.assert_close(several.hidden_ND, whole.hidden_ND, rtol=1e-4, atol=1e-5)
    assert sum(rows for rows, _ in shapes) == 9
    assert all(rows == 1 or rows * width <= budget for rows, width in shapes)
    assert (len(shapes) == 1) == (budget == 10_000)
    # A part is no wider than its longest row.
    assert budget != 1 or [width for _, width in shapes] == [response.length - 1 for response in responses[:9]]


def test_the_signal_can_stand_in_a_graph():
    model = tiny_model(3)
    signal = LocalTeacher(model, head_of(model, VOCAB)).signal(collate(tiny_responses(), [0], pad_id=0))
    assert not signal.hidden_ND.requires_grad and not signal.hidden_ND.is_inference()
    weight = torch.ones(32, requires_grad=True)
    (signal.hidden_ND * weight).sum().backward()
    assert weight.grad is not None
