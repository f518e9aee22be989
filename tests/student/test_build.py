"""Students: as loaded, pruned, fresh; in full or with adapters; saved so that plain transformers loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.models.forward import hidden_states
from limbeck.models.heads import decoder_of, head_of, project
from limbeck.models.loading import LoadedModel, load_model
from limbeck.student.adapters import LoraSpec
from limbeck.student.build import StudentSpec, build_student
from limbeck.student.saving import merged_state, save_student
from limbeck.types import LimbeckError
from tests.models.tiny import DEPTH, FAMILIES, REAL, save_tiny, tiny_model, tiny_tokenizer

from .test_pruning import batch

IDS_BT = torch.tensor([[5, 6, 7, 8, 9, 3], [9, 4, 4, 30, 2, 1]])


@pytest.fixture
def teacher(tmp_path: Path) -> LoadedModel:
    return load_model(save_tiny(tmp_path / "teacher"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS_BT).logits


def test_pretrained_by_name(teacher: LoadedModel, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "student", "qwen2")
    student = build_student(StudentSpec(model=str(path)), teacher=teacher)
    assert torch.equal(logits(student.model), logits(tiny_model("qwen2")))
    assert student.source is not None
    assert student.source.location == str(path)
    assert student.parameters == student.trainable == sum(p.numel() for p in student.model.parameters())
    assert student.share_of_teacher == student.parameters / sum(p.numel() for p in teacher.model.parameters())


def test_pretrained_without_a_name_is_a_copy_of_the_teacher(teacher: LoadedModel) -> None:
    student = build_student(StudentSpec(), teacher=teacher)
    assert torch.equal(logits(student.model), logits(teacher.model))
    ours = {p.data_ptr() for p in student.model.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in teacher.model.parameters())


def test_depth_pruned_by_measurement_and_by_number(teacher: LoadedModel) -> None:
    measured = build_student(StudentSpec(init="depth_prune", layers=3), teacher=teacher, calibration=[batch()])
    assert measured.blocks is not None
    assert len(measured.blocks.keep) == 3
    assert measured.share_of_teacher is not None
    assert measured.share_of_teacher < 0.75
    again = build_student(StudentSpec(init="depth_prune", keep=measured.blocks.keep), teacher=teacher)
    assert again.blocks is None
    assert torch.equal(logits(again.model), logits(measured.model))
    half = build_student(StudentSpec(init="depth_prune", keep=(0, 4), dtype="bfloat16"), teacher=teacher)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_frozen_embeddings_stay_and_everything_else_trains(teacher: LoadedModel) -> None:
    student = build_student(StudentSpec(init="depth_prune", keep=(0, 2), freeze_embeddings=True), teacher=teacher)
    frozen = {name for name, p in student.model.named_parameters() if not p.requires_grad}
    assert frozen and all("embed" in name or "lm_head" in name for name in frozen)
    assert student.trainable == student.parameters - sum(
        p.numel() for name, p in student.model.named_parameters() if name in frozen
    )


def test_from_scratch_is_seeded_and_follows_the_changes(teacher: LoadedModel) -> None:
    spec = StudentSpec(init="scratch", config={"num_hidden_layers": 2, "hidden_size": 16}, seed=3)
    outside = torch.get_rng_state()
    first, second = (build_student(spec, teacher=teacher) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), outside)
    assert first.source is None
    assert torch.equal(logits(first.model), logits(second.model))
    other = build_student(StudentSpec(init="scratch", config=spec.config, seed=4), teacher=teacher)
    assert not torch.equal(logits(first.model), logits(other.model))
    config: Any = decoder_of(first.model).config
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 16, 4)
    assert teacher.model.config.num_hidden_layers == DEPTH
    head_of(first.model, REAL)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt2"])
def test_from_scratch_needs_nothing_but_a_configuration(family: str, tmp_path: Path) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    spec = StudentSpec(
        init="scratch", model=str(tmp_path), config={"num_hidden_layers": 2}, attn_implementation="eager"
    )
    student = build_student(spec)
    assert student.share_of_teacher is None
    save_student(student.model, student.tokenizer, tmp_path / "saved")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(student.model))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (StudentSpec(init="depth_prune"), "needs either student.layers"),
        (StudentSpec(init="depth_prune", layers=2, keep=(0, 1)), "needs either student.layers"),
        (StudentSpec(layers=2), "belong to init=depth_prune, not to init=pretrained"),
        (StudentSpec(config={"hidden_size": 8}), "belongs to init=scratch"),
        (StudentSpec(init="scratch", config={"hiden_size": 8}), r"no such field; did you mean hidden_size\?"),
        (
            StudentSpec(init="scratch", config={"hidden_size": "wide"}),
            "is refused: .*'hidden_size'.*expected int, got str",
        ),
        (StudentSpec(init="scratch", config={"hidden_act": "nothing"}), "no model can be built"),
        (StudentSpec(lora=LoraSpec(target_modules=("qproj",))), "LoRA cannot be put on .*linear layers are down_proj"),
        (StudentSpec(init="depth_prune", keep=(0, 9)), "ascending numbers from 0 to 4"),
        (StudentSpec(model="./nowhere/x"), "no such directory"),
    ],
)
def test_specs_that_cannot_be(teacher: LoadedModel, spec: StudentSpec, expected: str) -> None:
    with pytest.raises(LimbeckError, match=expected) as caught:
        build_student(spec, teacher=teacher)
    assert "\n" not in str(caught.value)


def test_no_model_and_no_teacher() -> None:
    with pytest.raises(LimbeckError, match="there is no teacher to take it from"):
        build_student(StudentSpec())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_adapters_are_merged_when_saved_and_the_model_goes_on(family: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base", family)
    student = build_student(StudentSpec(model=str(path), lora=LoraSpec(r=2, lora_alpha=8)))
    model = student.model
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(tiny_model(family)))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert 0 < student.trainable < student.parameters == sum(p.numel() for p in tiny_model(family).parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    before, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    save_student(model, student.tokenizer, tmp_path / "saved")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, logits(tiny_model(family)), atol=1e-3)


def test_adapters_are_seeded(teacher: LoadedModel) -> None:
    states = [
        build_student(StudentSpec(lora=LoraSpec(), seed=s), teacher=teacher).model.state_dict() for s in (1, 1, 2)
    ]
    drawn = next(key for key in states[0] if "lora_A" in key)
    assert torch.equal(states[0][drawn], states[1][drawn])
    assert not torch.equal(states[0][drawn], states[2][drawn])


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_gradient_checkpointing_changes_no_gradient(teacher: LoadedModel, lora: LoraSpec | None) -> None:
    grads = []
    for switch in (False, True):
        spec = StudentSpec(gradient_checkpointing=switch, lora=lora)
        model = build_student(spec, teacher=teacher).model.train()
        decoder: Any = decoder_of(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        recomputed = sum(m.gradient_checkpointing for m in decoder.modules() if "gradient_checkpointing" in m.__dict__)
        assert bool(recomputed) == switch
        hidden_ND = hidden_states(model, batch())
        project(head_of(model, REAL, verify=False), hidden_ND).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert grads[0]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_students_load_with_their_precision_and_generation_settings(family: str, tmp_path: Path) -> None:
    model = tiny_model(family).bfloat16()
    model.generation_config.max_new_tokens = 7
    tokenizer = tiny_tokenizer()
    tokenizer(["w1", "w2 w3"], padding=True)
    save_student(model, tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.bfloat16
    assert again.generation_config.max_new_tokens == 7
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.backend_tokenizer.padding is None


def test_saving_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "student"
    target.mkdir()
    (target / "old.txt").write_text("old")
    save_student(tiny_model(), tiny_tokenizer(), target)
    assert not (target / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    modes = {path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert modes == {target.stat().st_mode & 0o666}, "files of the student that others may not read"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LimbeckError, match="cannot write the student"):
        save_student(tiny_model(), tiny_tokenizer(), tmp_path / "file" / "student")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_other_than_lora_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(LimbeckError, match="use plain LoRA"):
        merged_state(model)
