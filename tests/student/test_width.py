"""Width pruning: what carries nothing goes without a trace, for every family that is known; others are refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

from limbeck.models.heads import decoder_blocks
from limbeck.models.loading import LoadedModel
from limbeck.student.build import StudentSpec, build_student
from limbeck.student.width import Heads, WidthChoice, WidthSpec, require_cuttable, spread, width_config
from limbeck.student.width_importance import choose_width
from limbeck.student.width_pruning import width_prune
from limbeck.types import LimbeckError
from tests.models.tiny import FAMILIES, REAL, ROWS, tiny_model
from tests.student.test_pruning import batch

SIZES = WidthSpec(hidden_size=24, intermediate_size=28, num_attention_heads=2)
RMS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite")


def with_dead_parts(family: str, seed: int = 0) -> tuple[Any, WidthChoice]:
    """A model of which some dimensions, neurons and heads carry nothing, and what is left of it."""
    model = tiny_model(family, seed).double()
    text, heads = model.config.get_text_config(), Heads.of(model.config)
    draw = torch.Generator().manual_seed(seed)

    def some(count: int, size: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(size, generator=draw)[:count].tolist()))

    hidden = some(24, text.hidden_size)
    choice = WidthChoice(
        hidden=hidden,
        neurons=tuple(some(28, text.intermediate_size) for _ in range(text.num_hidden_layers)),
        groups=tuple(some(1, heads.groups) for _ in range(text.num_hidden_layers)),
    )
    dead_D = torch.ones(text.hidden_size, dtype=torch.bool)
    dead_D[list(hidden)] = False
    with torch.no_grad():
        for name, module in model.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.variance_epsilon = module.eps = 1e-30
                if "post_" in name and "gemma" in family and module.weight.shape == dead_D.shape:
                    module.weight[dead_D] = -1.0
        model.get_input_embeddings().weight[:, dead_D] = 0
        for number, block in enumerate(decoder_blocks(model)[1]):
            part: Any = block
            for projection in (part.self_attn.o_proj, part.mlp.down_proj):
                projection.weight[dead_D] = 0
                if projection.bias is not None:
                    projection.bias[dead_D] = 0
            queries = torch.ones(heads.count * heads.size, dtype=torch.bool)
            queries[spread(choice.groups[number], heads.size * heads.together)] = False
            part.self_attn.v_proj.weight[~kept_mask(choice.groups[number], heads)] = 0
            if part.self_attn.v_proj.bias is not None:
                part.self_attn.v_proj.bias[~kept_mask(choice.groups[number], heads)] = 0
            neurons = torch.ones(text.intermediate_size, dtype=torch.bool)
            neurons[list(choice.neurons[number])] = False
            part.mlp.up_proj.weight[neurons] = 0
            # Weights that would count if what they read were not zero.
            part.self_attn.o_proj.weight[:, queries] *= 7
            part.mlp.down_proj.weight[:, neurons] *= 7
    return model, choice


def kept_mask(groups: tuple[int, ...], heads: Heads) -> torch.Tensor:
    mask = torch.zeros(heads.groups * heads.size, dtype=torch.bool)
    mask[spread(groups, heads.size)] = True
    return mask


def same_epsilon(model: Any) -> Any:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.variance_epsilon = module.eps = 1e-30
    return model


@pytest.mark.parametrize("family", RMS)
def test_what_carries_nothing_is_found_and_goes_without_a_trace(family: str, tmp_path: Path) -> None:
    model, dead = with_dead_parts(family)
    before = copy.deepcopy(model.state_dict())
    choice = choose_width(model, [batch()], SIZES)
    assert (choice.hidden, choice.neurons, choice.groups) == (dead.hidden, dead.neurons, dead.groups)
    assert all(abs(share - 1) < 1e-9 for share in choice.importance.values())
    pruned = width_prune(model, choice)
    ids_BT = batch().input_ids_BT
    with torch.no_grad():
        expected = model(ids_BT).logits
        # The weights are in float64; transformers' norms compute in float32 all the same.
        gap = (same_epsilon(pruned)(ids_BT).logits - expected).abs().max()
        assert gap < 2e-6 * expected.abs().max()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    text = pruned.config.get_text_config()
    assert (text.hidden_size, text.intermediate_size, text.num_attention_heads) == (24, 28, 2)
    assert (text.num_key_value_heads, text.head_dim) == (1, 8)
    tied = model.config.tie_word_embeddings
    output: Any = pruned.get_output_embeddings()
    assert (output.weight is pruned.get_input_embeddings().weight) == tied
    pruned.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(same_epsilon(again)(ids_BT).logits, pruned(ids_BT).logits)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", ["cohere", *RMS])
def test_heads_and_neurons_alone_leave_the_norms_as_they_are(family: str) -> None:
    model = tiny_model(family).double()
    choice = choose_width(model, [batch()], WidthSpec(intermediate_size=47, num_attention_heads=2))
    assert not choice.norm_factors
    pruned = width_prune(model, choice)
    assert pruned.config.get_text_config().hidden_size == 32
    norms = [(name, p) for name, p in pruned.named_parameters() if "norm" in name]
    assert norms
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in norms)


def test_importance_is_the_mean_over_a_row_and_the_root_of_squares_over_rows() -> None:
    """Against the naive reading of the paper, over whole activations."""
    model, data, sizes = tiny_model(), batch(), WidthSpec(intermediate_size=20)
    seen: list[torch.Tensor] = []
    hook = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(data.input_ids_BT)
    hook.remove()
    rows = [seen[0][i, : int(n)].abs().mean(0) for i, n in enumerate(data.attention_mask_BT.sum(1))]
    importance = torch.stack(rows).square().sum(0).sqrt()
    expected = sorted(importance.topk(20).indices.tolist())
    assert list(choose_width(model, [data], sizes).neurons[2]) == expected


def test_norms_are_scaled_by_the_share_of_the_energy_that_stays() -> None:
    model, data = tiny_model(), batch()
    choice = choose_width(model, [data], WidthSpec(hidden_size=16))
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(data.input_ids_BT)
    hook.remove()
    real_ND = seen[0][data.attention_mask_BT.bool()].square()
    share = (real_ND[:, list(choice.hidden)].sum(1) / real_ND.sum(1)).mean()
    factor = float((share * 2).sqrt())
    assert choice.norm_factors["model.norm"] == pytest.approx(factor, rel=1e-5)
    pruned: Any = width_prune(model, choice)
    torch.testing.assert_close(pruned.model.norm.weight, model.model.norm.weight[list(choice.hidden)] * factor)


def test_blocks_go_first_and_what_stays_is_measured_in_those_that_are_left() -> None:
    model = tiny_model()
    teacher = LoadedModel(model=model, tokenizer=None, provenance=None)  # type: ignore[arg-type]
    spec = StudentSpec(init="width_prune", keep=(0, 3), width=WidthSpec(intermediate_size=20))
    student = build_student(spec, teacher=teacher, calibration=[batch()])
    inner: Any = student.model
    assert (inner.config.num_hidden_layers, inner.config.intermediate_size) == (2, 20)
    assert student.width is not None
    assert len(student.width.neurons) == 2
    again = build_student(
        StudentSpec(init="width_prune", keep=(0, 3), width=spec.width, stays=student.width), teacher=teacher
    )
    assert all(torch.equal(a, b) for a, b in zip(inner.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (WidthSpec(hidden_size=32), "hidden_size is 32; the model has 32, so expected fewer"),
        (WidthSpec(intermediate_size=49), "intermediate_size is 49; the model has 48, so expected fewer"),
        (
            WidthSpec(num_attention_heads=3),
            "4 heads in 2 groups that share keys and values, which go whole, so expected 2",
        ),
        (WidthSpec(num_attention_heads=4), "so expected 2"),
        (WidthSpec(hidden_size=25), "is refused: .*not a multiple"),
        (WidthSpec(), "names no size"),
    ],
)
def test_sizes_that_are_no_cut(sizes: WidthSpec, said: str) -> None:
    with pytest.raises(LimbeckError, match=said):
        width_config(tiny_model().config, sizes)


def test_heads_without_groups_of_their_own() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=1, vocab_size=8)
    with pytest.raises(LimbeckError, match="so expected the model's own"):
        width_config(config, WidthSpec(num_attention_heads=2))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*RMS, "cohere")])
def test_architectures_whose_weights_are_not_known(family: str) -> None:
    with pytest.raises(LimbeckError, match=r"cannot be width-pruned: of its weight .* it is not known"):
        require_cuttable(tiny_model(family), WidthSpec(num_attention_heads=2))


def test_norms_that_take_the_mean_away() -> None:
    with pytest.raises(LimbeckError, match=r"hidden_size cannot be cut: .* is a CohereLayerNorm"):
        require_cuttable(tiny_model("cohere"), WidthSpec(hidden_size=16))


def test_the_skeleton_of_a_model_can_be_checked() -> None:
    for config in (Qwen2Config, Gemma3TextConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config(
                    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=ROWS
                )
            )
        require_cuttable(model, SIZES)


def test_the_choice_repeats() -> None:
    model = tiny_model(seed=4)
    assert choose_width(model, [batch()], SIZES) == choose_width(model, [batch()], SIZES)
    assert REAL <= ROWS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
