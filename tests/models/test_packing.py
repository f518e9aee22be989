"""Rows one after another without padding: the states and the gradient of padded rows, or a refusal."""

from __future__ import annotations

import pytest
import torch

from limbeck.models.forward import hidden_states, packed_states, require_rows_apart
from limbeck.rollouts.collate import collate
from limbeck.types import LimbeckError
from tests.training.play import tiny_model, tiny_responses

ROWS = (3, 8, 1, 13)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_packed_rows_have_the_states_and_the_gradient_of_padded_ones(family: str) -> None:
    model, batch = tiny_model(3, family=family).double(), collate(tiny_responses(), ROWS, pad_id=0)
    shapes, gradients = [], []
    for packed in (False, True):
        with model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        ):
            states_ND = hidden_states(model, batch, packed=packed)
        model.zero_grad()
        states_ND.square().sum().backward()
        gradients.append((states_ND, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for padded, other in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, other, rtol=1e-6, atol=1e-9)
    assert shapes == [tuple(batch.input_ids_BT.shape), (1, int(batch.attention_mask_BT.sum()))]
    require_rows_apart(model, batch)


def test_rows_without_padding_stay_side_by_side() -> None:
    model, batch = tiny_model(3), collate(tiny_responses(), [8], pad_id=0)
    assert torch.equal(hidden_states(model, batch, packed=True), hidden_states(model, batch))


def test_a_model_that_reads_on_from_one_row_into_the_next_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    model, batch = tiny_model(3), collate(tiny_responses(), ROWS, pad_id=0)
    assert not torch.allclose(packed_states(model, batch), hidden_states(model, batch), atol=1e-2)
    with pytest.raises(LimbeckError, match=r"does not keep rows apart.*set train\.packing=false$"):
        require_rows_apart(model, batch)
