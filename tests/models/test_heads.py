"""The head is exact for every family, live, and refused where it is not understood."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel

from limbeck.models.heads import causal_model, decoder_of, head_of, project
from limbeck.types import LimbeckError

from .tiny import FAMILIES, REAL, ROWS, tiny_model

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 3], [9, 4, 4, 30, 2, 1]])


def _hidden(model: torch.nn.Module) -> torch.Tensor:
    return decoder_of(model)(input_ids=IDS_BT, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_head_of_hidden_states_is_the_models_logits(family: str) -> None:
    model = tiny_model(family)
    head = head_of(model, REAL)
    with torch.no_grad():
        torch.testing.assert_close(project(head, _hidden(model)), model(input_ids=IDS_BT).logits[..., :REAL])
    assert head.vocab_size == REAL
    assert head.weight_VD.shape[0] == ROWS


def test_known_scales_and_caps_are_read() -> None:
    heads = {family: head_of(tiny_model(family), REAL) for family in ("llama", "gemma2", "cohere", "granite", "phi")}
    assert (heads["llama"].scale, heads["llama"].softcap, heads["llama"].bias_V) == (1.0, None, None)
    assert heads["gemma2"].softcap == 5.0
    assert heads["cohere"].scale == 0.25
    assert heads["granite"].scale == 0.125
    assert heads["phi"].bias_V is not None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_head_is_the_parameter_itself(family: str) -> None:
    model = tiny_model(family)
    head = head_of(model, REAL)
    project(head, _hidden(model)).sum().backward()
    embedding = model.get_output_embeddings()
    assert isinstance(embedding, torch.nn.Linear)
    assert head.weight_VD is embedding.weight
    assert embedding.weight.grad is not None


def test_adapters_are_seen_through_and_get_gradients() -> None:
    model = tiny_model()
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    assert causal_model(adapted) is adapted.get_base_model()
    head = head_of(adapted, REAL)
    logits_BTV = project(head, _hidden(adapted))
    torch.testing.assert_close(logits_BTV, adapted(input_ids=IDS_BT).logits[..., :REAL])
    assert not torch.allclose(logits_BTV, project(head_of(model, REAL), _hidden(model)))
    logits_BTV.sum().backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_" in n]
    assert grads
    assert all(grad is not None for grad in grads)


def test_a_head_trained_in_full_beside_adapters_is_used() -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = head_of(adapted, REAL)
    assert head.weight_VD.requires_grad


def test_an_adapter_on_the_head_is_refused() -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(LimbeckError, match="covers the output head"):
        head_of(adapted, REAL)


def test_a_head_that_is_not_understood_is_refused() -> None:
    model = tiny_model()
    model.config.final_logit_softcapping = 1.0  # a cap the model does not apply
    with pytest.raises(LimbeckError, match="not understood"):
        head_of(model, REAL)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(LimbeckError, match="48 rows but its tokenizer has 50 ids"):
        head_of(tiny_model(), ROWS + 2)


def test_a_model_that_sees_the_future_is_refused() -> None:
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = BertLMHeadModel(BertConfig(vocab_size=ROWS, is_decoder=False, **sizes)).eval()
    with pytest.raises(LimbeckError, match=r"not understood|future tokens|linear"):
        head_of(encoder, REAL)


def test_damaged_weights_are_named_as_such() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(LimbeckError, match="NaN"):
        head_of(model, REAL)


def test_the_probe_leaves_the_mode_alone() -> None:
    model = tiny_model().train()
    head_of(model, REAL)
    assert model.training


def test_no_model_at_all() -> None:
    with pytest.raises(LimbeckError, match="Linear"):
        decoder_of(torch.nn.Linear(2, 2))
