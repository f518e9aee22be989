"""Images at the door of a model: the naive line, whose tokens are images, and features that are computed once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL", reason="images need Pillow: pip install 'limbeck[vision]'")

from limbeck.models.doctor import doctor, doctor_rows
from limbeck.models.forward import hidden_states
from limbeck.models.heads import decoder_blocks, head_of, project
from limbeck.models.image_features import vision_tower
from limbeck.models.loading import load_model
from limbeck.models.tower_outputs import Kept
from limbeck.models.vision import bind_images, require_reader, see_first
from limbeck.models.vocabulary import describe_vocabulary, real_vocab_size
from limbeck.objectives import OBJECTIVES, Temperature
from limbeck.rollouts.collate import collate
from limbeck.student.saving import save_student
from limbeck.teachers.local import LocalTeacher
from limbeck.training.loss import LossPlan, StepSettings, StudentLoss
from limbeck.types import LimbeckError
from tests.models.vision_pairs import VisionPair, labels
from tests.tiny_pair import write_model
from tests.tiny_vision import FAMILIES, Family, write_processor, write_vision_model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionPair:
    return VisionPair.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> VisionPair:
    return VisionPair.write(tmp_path_factory.mktemp("llava"), "llava")


def unfrozen(model: Any, trained: str) -> None:
    """Let a part of the way from pixels to features, and all behind it, be trained."""
    model.requires_grad_(True)
    vision_tower(model).requires_grad_(trained == "tower")
    if trained == "nothing":
        rest = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in rest)


@pytest.mark.parametrize("trained", ["tower", "projector", "nothing"])
def test_loss_and_gradients_are_those_of_full_logits_from_the_plain_forward(pair: VisionPair, trained: str) -> None:
    """Forward KL of a padded batch with none, one and two images, teacher and student with other image tokens."""
    teacher, student = pair.load("teacher"), pair.load("student")
    vocab_size = real_vocab_size(student.tokenizer)
    responses = pair.responses(student.tokenizer)
    batch = collate(responses, range(len(responses)), pad_id=0)
    unfrozen(student.model, trained)

    head = head_of(teacher.model, vocab_size)
    loss = StudentLoss(
        student.model, LossPlan(objective=OBJECTIVES["fkl"]()), vocab_size=vocab_size, projection_ED=None, compile="off"
    )
    value = torch.zeros(())
    # Twice, so that what was kept of the first pass is read in the second.
    for _ in range(2):
        student.model.zero_grad()
        signal = LocalTeacher(teacher.model, head).signal(batch)
        value, _, _ = loss(batch, signal, torch.ones(len(batch.labels_N)), StepSettings(temperature=Temperature()))
        value.backward()
    got = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}

    student.model.zero_grad()
    with torch.no_grad():
        p_NV = pair.plain_logits(teacher.model, vocab_size).log_softmax(-1)
    q_NV = pair.plain_logits(student.model, vocab_size).log_softmax(-1)
    naive = (p_NV.exp() * (p_NV - q_NV)).sum()
    naive.backward()
    expected = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(value, naive, rtol=1e-4, atol=1e-5)
    reached = {name for name, gradient in expected.items() if gradient.abs().max() > 0}
    assert reached <= got.keys() and any("lm_head" in name for name in reached)
    for name in reached:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-5 + 1e-4 * scale, msg=name)
    in_tower = [name for name, p in student.model.named_parameters() if id(p) in tower_ids(student.model)]
    assert bool(set(in_tower) & reached) == (trained == "tower")


def tower_ids(model: Any) -> set[int]:
    return {id(parameter) for parameter in vision_tower(model).parameters()}


def test_image_tokens_and_prompts_are_out_of_the_loss(pair: VisionPair) -> None:
    """The loss mask covers the answers alone; image tokens are as many as each processor says."""
    teacher, student = pair.load("teacher"), pair.load("student")
    responses = pair.responses(student.tokenizer)
    batch = collate(responses, range(len(responses)), pad_id=0)
    assert batch.loss_mask_BT.sum(1).tolist() == [len(r.response_ids) for r in responses]
    assert torch.equal(batch.labels_N, labels(responses))
    rows = []
    for loaded in (teacher, student):
        reader = require_reader(loaded.model)
        row = reader.expand(responses[1].prompt_ids, responses[1].images)
        pictures = [pair.images.open(name) for name in responses[1].images]
        whole = reader.processor(text=[pair.texts()[1][0]], images=pictures, return_tensors="pt")
        assert list(row.ids) == whole["input_ids"][0].tolist()
        assert sum(row.from_image) == row.ids.count(reader.placeholder.id)
        rows.append(row)
        assert len(hidden_states(loaded.model, batch)) == len(batch.labels_N)
    assert len(rows[0].ids) > len(rows[1].ids)


def test_what_a_model_writes_is_never_an_image(pair: VisionPair) -> None:
    """A sampled image token is a token, as in generation: it neither asks for an image nor becomes one."""
    loaded = pair.load("teacher")
    placeholder = require_reader(loaded.model).placeholder
    response = pair.responses(loaded.tokenizer)[0]
    odd = replace(response, response_ids=(placeholder.id, *response.response_ids))
    with torch.no_grad():
        hidden_ND = hidden_states(loaded.model, collate([odd], [0], pad_id=0))
    assert len(hidden_ND) == len(odd.response_ids)
    plain = hidden_states(loaded.model, collate([response], [0], pad_id=0))
    torch.testing.assert_close(hidden_ND[0], plain[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["projector", "nothing"])
def test_a_frozen_tower_sees_each_image_once(pair: VisionPair, trained: str) -> None:
    loaded = pair.load("student")
    unfrozen(loaded.model, trained)
    reader = require_reader(loaded.model)
    reader.verified = True
    responses = pair.responses(loaded.tokenizer)
    for _ in range(3):
        hidden_states(loaded.model, collate(responses, range(len(responses)), pad_id=0))
    assert reader.computed == len({name for r in responses for name in r.images})
    unfrozen(loaded.model, "tower")
    hidden_states(loaded.model, collate(responses, range(len(responses)), pad_id=0))
    assert reader.computed == 2 * sum(len(r.images) for r in responses)


def test_features_do_not_depend_on_the_batch(pair: VisionPair) -> None:
    """Bit for bit: a resumed training computes what the first one read from memory."""
    loaded = pair.load("teacher")
    responses = pair.responses(loaded.tokenizer)
    reader = require_reader(loaded.model)
    names = [name for r in responses for name in r.images]
    together = reader.features(loaded.model, names)
    again = require_reader(pair.load("teacher").model)
    alone = torch.cat([again.features(loaded.model, [name]) for name in reversed(names)][::-1])
    assert torch.equal(together, alone)


def test_memory_of_features_is_bounded() -> None:
    kept = Kept(10)
    for name in "abc":
        kept.put(name, name.upper(), 4)
    assert [kept.get(name) for name in "abc"] == [None, "B", "C"] and kept.size == 8
    kept.put("huge", "H", 11)
    assert kept.get("huge") is None and kept.get("b") == "B"


def test_an_architecture_that_does_more_with_images_is_refused(llava: VisionPair, monkeypatch: Any) -> None:
    """The first image is compared with the model's own forward pass."""
    loaded = llava.load("teacher")
    inner = loaded.model.base_model
    plain = type(inner).forward

    def more(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        if kwargs.get("pixel_values") is not None:
            output.last_hidden_state = output.last_hidden_state + 0.1
        return output

    monkeypatch.setattr(type(inner), "forward", more)
    responses = llava.responses(loaded.tokenizer)
    with pytest.raises(LimbeckError, match="LlavaForConditionalGeneration reads images in a way that is not known"):
        hidden_states(loaded.model, collate(responses, [0], pad_id=0))


def test_a_student_is_saved_with_its_processor(pair: VisionPair, tmp_path: Path) -> None:
    """What plain transformers loads answers as the student in memory does."""
    from transformers import AutoModelForImageTextToText

    loaded = pair.load("student")
    folder = save_student(loaded.model, loaded.tokenizer, tmp_path / "saved")
    again = load_model(folder)
    bind_images(again.model, pair.images.path)
    vocab_size = real_vocab_size(loaded.tokenizer)
    with torch.no_grad():
        expected = pair.plain_logits(loaded.model, vocab_size)
        assert torch.equal(pair.plain_logits(again.model, vocab_size), expected)
        responses = pair.responses(again.tokenizer)
        batch = collate(responses, range(len(responses)), pad_id=0)
        got = project(head_of(again.model, vocab_size), hidden_states(again.model, batch))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    assert plain.state_dict().keys() == loaded.model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_those_of_the_language_model(family: Family, tmp_path: Path) -> None:
    """Though its tower has as many: what is pruned, sharded and placed are the language model's."""
    model = load_model(write_vision_model(tmp_path, family, layers=2)).model
    name, blocks = decoder_blocks(model)
    assert model.get_submodule(name) is blocks and len(blocks) == 2
    assert not set(blocks) & set(vision_tower(model).modules())


def test_doctor_says_who_reads_images(llava: VisionPair, tmp_path: Path) -> None:
    found = doctor(str(llava.folder / "teacher"), str(llava.folder / "student"))
    assert found.distillable
    assert ("images", "read, written as <image>", "read, written as <image>") in doctor_rows(found)
    blind = doctor(str(llava.folder / "teacher"), str(write_model(tmp_path / "text")))
    assert any("prompts with images are refused" in note for note in blind.vocabulary.notes)


def broken(family: Family, folder: Path) -> dict[str, tuple[Any, str]]:
    """Damages of a processor, and what is said of each."""

    def other_patch() -> None:
        write_processor(folder, family, patch=16)

    def other_model() -> None:
        write_processor(folder, "idefics3" if family == "llava" else "llava")

    def gone() -> None:
        for name in ("preprocessor_config.json", "processor_config.json"):
            (folder / name).unlink()

    def no_json() -> None:
        (folder / "preprocessor_config.json").write_text("{")

    return {
        "other_patch": (other_patch, "patch_size 16 and its vision tower 8; they do not belong together"),
        "other_model": (other_model, "expected a .*Processor: it belongs to another model"),
        "gone": (gone, "has no processor"),
        "no_json": (no_json, "preprocessor_config.json|its processor cannot be read"),
    }


@pytest.mark.parametrize("damage", ["other_patch", "other_model", "gone", "no_json"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_processor_of_another_model_is_refused(tmp_path: Path, family: Family, damage: str) -> None:
    """Before any weights are read."""
    folder = write_vision_model(tmp_path / "model", family)
    damaged, message = broken(family, folder)[damage]
    damaged()
    if family == "qwen2_vl" and damage == "other_patch":
        message = "patch_size 16 and its vision tower 8"
    with pytest.raises(LimbeckError, match=message) as caught:
        if damage == "gone":
            load_model(folder)
        else:
            describe_vocabulary(folder)
    assert "\n" not in str(caught.value)


OTHER_PIXELS: dict[str, dict[str, Any]] = {
    "class_of_another": {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 64}},
    "size_as_text": {"patch_size": "8"},
    "grey": {"image_mean": [0.5], "image_std": [0.5]},
}


@pytest.mark.parametrize("name", OTHER_PIXELS)
def test_a_processor_that_reads_no_picture_is_blamed_itself(tmp_path: Path, name: str) -> None:
    """Before any image of the data is."""
    folder = write_vision_model(tmp_path / "model", "qwen2_vl")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OTHER_PIXELS[name]))
    message = (
        rf"model: its Qwen2VLProcessor with \w+ \({path.name}\) reads no picture at all .*belongs to another model"
    )
    with pytest.raises(LimbeckError, match=message) as caught:
        describe_vocabulary(folder)
    assert "\n" not in str(caught.value)


LARGER = {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}}
MISFITS: dict[str, tuple[Family, str, dict[str, Any], str]] = {
    "larger": ("llava", "preprocessor_config.json", LARGER, r"its model fails on .* \(The size of tensor a \(64\)"),
    "one_more": ("llava", "processor_config.json", {"num_additional_image_tokens": 1}, "17 tokens .* 16 features"),
    "one_less": (
        "llava",
        "processor_config.json",
        {"vision_feature_select_strategy": "default"},
        "15 tokens of 1 images and its vision tower 16 features",
    ),
    "shorter": ("smolvlm", "processor_config.json", {"image_seq_len": 3}, "tokens of 1 images and its vision tower"),
    "tiles": (
        "smolvlm",
        "preprocessor_config.json",
        {"max_image_size": {"longest_edge": 64}},
        "tokens of 1 images and its vision tower|its model fails",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_processor_of_other_sizes_is_refused_at_the_first_image(tmp_path: Path, name: str) -> None:
    family, file, changes, message = MISFITS[name]
    pair = VisionPair(tmp_path, family)
    path = write_vision_model(tmp_path / "student", family, layers=1) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    loaded = pair.load("student")
    together = "they do not belong together: download the processor's files again"
    with pytest.raises(LimbeckError, match=f"student: .*({message}).*; {together}") as caught:
        see_first(loaded.model, pair.picture(0), "prompt x: image 1")
    assert "\n" not in str(caught.value)


def test_a_processor_with_another_token_is_refused(tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "model", "llava")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": 3, "image_token_id": 3}))
    with pytest.raises(LimbeckError, match="its processor writes <image> for an image and its model reads"):
        describe_vocabulary(folder)


def test_a_text_model_that_is_asked_about_images_says_so(llava: VisionPair, tmp_path: Path) -> None:
    loaded = load_model(write_model(tmp_path / "text"))
    responses = llava.responses(llava.load("student").tokenizer)
    with pytest.raises(LimbeckError, match="LlamaForCausalLM reads text alone"):
        hidden_states(loaded.model, collate(responses, [0], pad_id=0))
    shutil.rmtree(tmp_path / "text")
