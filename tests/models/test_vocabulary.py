"""Pairs: same tokens, same tokens with padded heads, and different ones; by name without weights, or loaded."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from limbeck.models.doctor import doctor, doctor_table
from limbeck.models.loading import load_model
from limbeck.models.vocabulary import (
    compare_vocabularies,
    describe_vocabulary,
    real_vocab_size,
)
from limbeck.types import LimbeckError

from .tiny import REAL, ROWS, save_gguf, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "teacher")


def test_real_ids_count_added_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert real_vocab_size(tokenizer) == REAL
    tokenizer.add_tokens(["<new>"])
    assert real_vocab_size(tokenizer) == REAL + 1


def test_the_same_tokens_with_another_head(teacher: Path, tmp_path: Path) -> None:
    tight = tiny_model("gpt2")
    tight.resize_token_embeddings(REAL, mean_resizing=False)
    tight.save_pretrained(tmp_path / "tight")
    tiny_tokenizer().save_pretrained(tmp_path / "tight")
    report = doctor(str(teacher), str(tmp_path / "tight"))
    assert report.distillable
    assert report.vocabulary.verdict == "same_padded"
    assert report.vocabulary.vocab_size == REAL
    assert (report.teacher.head_rows, report.student.head_rows) == (ROWS, REAL)
    assert any("heads have 48 and 40 rows for 40 ids" in note for note in report.vocabulary.notes)
    both_tight = compare_vocabularies(report.student, report.student)
    assert (both_tight.verdict, both_tight.notes) == ("same", ())


def test_equal_widths_with_different_tokens_do_not_fit(teacher: Path, tmp_path: Path) -> None:
    swapped = save_tiny(tmp_path / "swapped", tokenizer=tiny_tokenizer(swap=(7, 9)))
    report = doctor(str(teacher), str(swapped))
    assert report.teacher.head_rows == report.student.head_rows
    assert (report.distillable, report.vocabulary.vocab_size) == (False, 0)
    [difference] = report.vocabulary.differences
    assert re.search(r"2 ids name different tokens .*7 is 'w4' / 'w6'", difference)


def test_added_tokens_make_a_difference(teacher: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    more = save_tiny(tmp_path / "more", tokenizer=tokenizer)
    report = compare_vocabularies(describe_vocabulary(teacher), describe_vocabulary(more))
    assert report.differences == ("1 ids only the student has (40 '<tool>')",)


def test_a_tokenizer_larger_than_the_head(teacher: Path, tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "wide", tokenizer=tiny_tokenizer(words=ROWS))
    report = compare_vocabularies(describe_vocabulary(wide), describe_vocabulary(wide))
    assert report.verdict == "different"
    assert "51 token ids but a head of 48 rows" in report.differences[0]


def test_what_differs_without_harm_is_noted(teacher: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.pad_token = "</s>"
    model = tiny_model("mistral").bfloat16()
    model.config.max_position_embeddings = 32
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    report = doctor(str(teacher), str(tmp_path / "other"))
    notes = " | ".join(report.vocabulary.notes)
    assert report.distillable
    assert "pad_token is '<pad>' (0) for the teacher, '</s>' (2) for the student" in notes
    assert "chat templates differ (53 characters / none)" in notes
    assert "context lengths differ: 64 and 32 tokens" in notes
    assert "stored as float32 and bfloat16" in notes


def test_splitting_rules_are_compared(teacher: Path) -> None:
    card = describe_vocabulary(teacher)
    report = compare_vocabularies(card, dataclasses.replace(card, splits="other rules"))
    assert any("split text by different rules" in note for note in report.notes)


def test_by_name_and_loaded_agree(teacher: Path) -> None:
    """The card is made without the weights; it says what the loaded model has."""
    card, loaded = describe_vocabulary(teacher), load_model(teacher)
    assert card.head_rows == len(loaded.model.get_output_embeddings().weight)  # type: ignore[arg-type]
    assert card.dtype == str(loaded.model.dtype).removeprefix("torch.")
    assert card.ids == loaded.tokenizer.get_vocab()
    assert card.context_length == loaded.model.config.max_position_embeddings


def test_no_weights_are_needed(teacher: Path, tmp_path: Path) -> None:
    model = tiny_model()
    gguf = describe_vocabulary(save_gguf(tmp_path / "tiny.gguf", model))
    assert (gguf.head_rows, gguf.dtype) == (ROWS, "quantised GGUF")
    (teacher / "model.safetensors").unlink()
    assert describe_vocabulary(teacher).head_rows == ROWS


def test_a_weight_file_cut_short(teacher: Path) -> None:
    (teacher / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(LimbeckError, match="cut short"):
        describe_vocabulary(teacher)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_rendered_report(teacher: Path, tmp_path: Path, terminal: bool) -> None:
    swapped = save_tiny(tmp_path / "swapped", tokenizer=tiny_tokenizer(swap=(7, 9)))
    console = Console(width=200, record=True, force_terminal=terminal, file=(tmp_path / "out").open("w"))
    console.print(doctor_table(doctor(str(teacher), str(teacher))))
    console.print(doctor_table(doctor(str(teacher), str(swapped))))
    console.file.close()
    text = (tmp_path / "out").read_text()
    assert ("\x1b[" in text) == terminal
    plain = console.export_text()
    assert "Can be distilled? yes" in plain
    assert "Objectives run over 40 token ids" in plain
    assert "Can be distilled? not as it is: different tokens. With teacher.across" in plain
    assert "7 is 'w4' / 'w6'" in plain
    assert "48 (8 padding)" in plain


def test_what_a_strangers_model_says_reaches_no_terminal_as_a_command(teacher: Path) -> None:
    report = doctor(str(teacher), str(teacher))
    odd = dataclasses.replace(
        report.student,
        architecture="A\x1b[2J",
        dtype="F\x9b1m",
        roles=report.student.roles | {"eos_token": ("e\n\x07", 1)},
    )
    told = dataclasses.replace(report, student=odd, vocabulary=compare_vocabularies(report.teacher, odd))
    shown = io.StringIO()
    Console(width=200, file=shown).print(doctor_table(told, ["their template\x1b]0;owned\x07"]))
    said = shown.getvalue()
    assert not set("\x1b\x9b\x07") & set(said)
    for part in (r"A\x1b[2J", r"F\x9b1m", r"e\n\x07 (1)", r"template\x1b]0;owned\x07"):
        assert part in said
