"""Blocks: left out, chosen, cut away; for every family, and as transformers loads the result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from limbeck.models.heads import decoder_blocks, decoder_of, head_of, project
from limbeck.student.blocks import depth_prune, left_out
from limbeck.student.pruning import calibration_rows, choose_blocks
from limbeck.types import LimbeckError, TokenBatch
from tests.models.tiny import DEPTH, FAMILIES, REAL, tiny_model


def batch(rows: int = 3, prompt: int = 4, length: int = 12, seed: int = 0) -> TokenBatch:
    """Rows of falling length, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, REAL, (rows, length), generator=draw)
    mask_BT = torch.ones_like(ids_BT)
    loss_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row in range(rows):
        mask_BT[row, length - row :] = 0
        loss_BT[row, prompt - 1 : length - row - 1] = True
    labels_N = ids_BT.roll(-1, 1)[loss_BT]
    return TokenBatch(
        input_ids_BT=ids_BT,
        attention_mask_BT=mask_BT,
        loss_mask_BT=loss_BT,
        labels_N=labels_N,
        rows=tuple(range(rows)),
        ids=tuple(map(str, range(rows))),
        partners=(-1,) * rows,
        by_student_B=torch.zeros(rows, dtype=torch.bool),
        drawn_logp_N=torch.full((len(labels_N),), float("nan")),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_saves_loads_and_generates_like_any_other(family: str, tmp_path: Path) -> None:
    model, ids_BT = tiny_model(family), batch().input_ids_BT
    keep = (0, 2, 3, 4)
    pruned = depth_prune(model, keep)
    assert pruned.config.get_text_config().num_hidden_layers == len(keep)
    pruned.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids_BT).logits, pruned(ids_BT).logits)
        out = decoder_blocks(model)[1]
        as_tuple = family == "falcon"
        with left_out(list(out), [1], as_tuple=as_tuple):
            torch.testing.assert_close(model(ids_BT).logits, pruned(ids_BT).logits, rtol=1e-4, atol=1e-4)
    cached, plain = (again.generate(ids_BT[:1], max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)


def test_the_whole_model_is_left_untouched() -> None:
    model = tiny_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = depth_prune(model, (0, 4))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert model.training
    assert model.config.num_hidden_layers == DEPTH
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_that_is_given_up_hands_its_tensors_on(family: str) -> None:
    model = tiny_model(family)
    own = {weight.data_ptr() for weight in model.parameters()}
    taken, copied = depth_prune(model, (0, 4), take=True), depth_prune(model, (0, 4))
    assert {weight.data_ptr() for weight in taken.parameters()} <= own
    assert not own & {weight.data_ptr() for weight in copied.parameters()}
    for name, weight in copied.state_dict().items():
        assert torch.equal(weight, taken.state_dict()[name])
    assert not own & {weight.data_ptr() for weight in depth_prune(model, (0, 4), dtype=torch.bfloat16).parameters()}


def test_fields_with_one_entry_a_block_follow() -> None:
    pruned: Any = depth_prune(tiny_model("qwen2"), (0, 1, 4))
    assert pruned.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert [block.self_attn.layer_idx for block in pruned.model.layers] == [0, 1, 2]


def test_precision_can_be_changed_on_the_way() -> None:
    assert depth_prune(tiny_model(), (0, 4), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [(), (1, 0), (0, 0), (0, 5), (-1, 0)])
def test_blocks_that_are_no_blocks(keep: tuple[int, ...]) -> None:
    with pytest.raises(LimbeckError, match="ascending numbers from 0 to 4"):
        depth_prune(tiny_model(), keep)


def test_an_architecture_without_a_list_of_blocks() -> None:
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList(list(model.model.layers)[:3])
    with pytest.raises(LimbeckError, match="no list of 5 blocks"):
        depth_prune(model, (0, 4))


def test_blocks_that_do_nothing_go_first() -> None:
    """Blocks 1 and 3 add nothing to the hidden states; removing them changes nothing."""
    model = tiny_model()
    with torch.no_grad():
        for index in (1, 3):
            block = model.model.layers[index]
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    choice = choose_blocks(model, [batch()], 3, vocab_size=REAL)
    assert choice.keep == (0, 2, 4)
    assert choice.kl == pytest.approx(0, abs=1e-6)
    assert choice.influence[1] == pytest.approx(0, abs=1e-5)
    assert choice.influence[0] > 0.01


def test_the_reported_kl_is_that_of_the_pruned_model() -> None:
    model, data = tiny_model("gemma2"), batch()
    choice = choose_blocks(model, [data], 3, vocab_size=REAL)
    pruned = depth_prune(model, choice.keep)
    with torch.no_grad():
        logp, logq = (
            torch.log_softmax(
                project(head_of(m, REAL), decoder_of(m)(data.input_ids_BT).last_hidden_state[data.loss_mask_BT]), -1
            )
            for m in (model, pruned)
        )
    assert choice.kl == pytest.approx(float((logp.exp() * (logp - logq)).sum(-1).mean()), rel=1e-4)
    assert len(choice.path) == len(choice.removed) == 2
    assert sorted(choice.keep + choice.removed) == list(range(DEPTH))
    assert choice.tokens == int(data.attention_mask_BT.sum())


def test_greedy_takes_the_block_with_the_smallest_kl() -> None:
    """Against trying every block, the slow way."""
    model, data = tiny_model(seed=3), batch()
    tried = {}
    for block in range(1, DEPTH - 1):
        keep = [i for i in range(DEPTH) if i != block]
        pruned = depth_prune(model, keep)
        with torch.no_grad():
            logp, logq = (torch.log_softmax(m(data.input_ids_BT).logits[..., :REAL], -1) for m in (model, pruned))
        tried[block] = float((logp.exp() * (logp - logq)).sum(-1)[data.loss_mask_BT].mean())
    choice = choose_blocks(model, [data], DEPTH - 1, vocab_size=REAL)
    assert choice.removed == (min(tried, key=lambda i: tried[i]),)


def test_the_choice_repeats_and_leaves_the_model_alone() -> None:
    model = tiny_model().train()
    forwards = [block.forward for block in model.model.layers]
    said: list[str] = []
    first = choose_blocks(model, [batch()], 2, vocab_size=REAL, progress=said.append)
    assert choose_blocks(model, [batch()], 2, vocab_size=REAL) == first
    assert (first.keep[0], first.keep[-1]) == (0, DEPTH - 1)
    assert len(said) == 3
    assert model.training
    assert [block.forward for block in model.model.layers] == forwards
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_windows_start_shortly_before_the_response() -> None:
    data = batch(rows=4, prompt=20, length=40)
    ids_BT, mask_BT, loss_BT = calibration_rows([data], rows=2, window=16)
    assert torch.equal(ids_BT, data.input_ids_BT[:2, 12:28])
    assert mask_BT.all()
    assert torch.equal(loss_BT, data.loss_mask_BT[:2, 12:28])
    short, mask_BT, _ = calibration_rows([data], rows=9, window=100)
    assert short.shape == (4, 28)
    assert mask_BT.sum(1).tolist() == [28, 27, 26, 25]


@pytest.mark.parametrize("layers", [0, 1, DEPTH, 99])
def test_impossible_depths(layers: int) -> None:
    with pytest.raises(LimbeckError, match="the model has 5 blocks, so expected 2 to 4"):
        choose_blocks(tiny_model(), [batch()], layers, vocab_size=REAL)


def test_nothing_to_measure_on() -> None:
    with pytest.raises(LimbeckError, match="got none"):
        choose_blocks(tiny_model(), [], 3, vocab_size=REAL)
