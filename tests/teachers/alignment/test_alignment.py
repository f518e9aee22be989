"""Alignment of two tokenisations by bytes: every byte once, exact where it says so, whatever the text."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations, product

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from limbeck.teachers.alignment.groups import groups_of
from limbeck.teachers.alignment.reading import Aligner
from limbeck.teachers.alignment.spelling import Speller
from limbeck.teachers.alignment.token_bytes import TokenBytes
from limbeck.types import LimbeckError
from tests.teachers.alignment.spans import require_whole
from tests.teachers.alignment.tokenizers_at_hand import KINDS, byte_level, llama_3, permuted, sentencepiece, texts


@pytest.mark.parametrize(("student", "teacher"), list(permutations(KINDS, 2)))
def test_every_byte_is_in_exactly_one_span(student: str, teacher: str) -> None:
    mine, theirs = KINDS[student](), KINDS[teacher]()
    aligner = Aligner.of(mine, theirs)
    of = aligner.student_bytes.of
    for text in texts(150, seed=len(student) + 100 * len(teacher)):
        ids = mine(text, add_special_tokens=False)["input_ids"]
        alignment = aligner.align(ids)
        require_whole(alignment, ids, sum(len(of[i]) for i in ids))
        for group in alignment.groups:
            if group.kind == "exact":
                index, other = ids[group.student[0]], alignment.teacher_ids[group.teacher[0]]
                assert aligner.shared.teacher_of[index] == other
                assert index in aligner.shared.control or of[index] == aligner.speller.token_bytes.of[other]


@pytest.mark.parametrize(("student", "teacher"), list(product(KINDS, KINDS)))
def test_tokens_that_no_text_becomes(student: str, teacher: str) -> None:
    """A model may write any ids: half characters, bytes that are no text, control tokens in the middle."""
    mine = KINDS[student]()
    aligner = Aligner.of(mine, KINDS[teacher]())
    rng = random.Random(0)
    for _ in range(60):
        ids = [rng.randrange(len(mine)) for _ in range(rng.randrange(0, 30))]
        alignment = aligner.align(ids)
        require_whole(alignment, ids, sum(len(aligner.student_bytes.of[i]) for i in ids))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_text_are_those_of_its_tokens(kind: str) -> None:
    tokenizer = KINDS[kind]()
    speller = Speller.of(tokenizer)
    for text in texts(150, seed=5):
        spelling = speller.spell(text.encode())
        assert spelling.ends == tuple(sorted(spelling.ends)) and (spelling.ends or (0,))[-1] == len(text.encode())
        if kind in ("byte-level", "llama-3"):
            assert b"".join(speller.token_bytes.of[i] for i in spelling.ids) == text.encode()
    half = "é".encode()[:1]
    spelling = speller.spell(b"tea " + half + b" rain")
    assert b"".join(speller.token_bytes.of[i] for i in spelling.ids).replace(b" ", b"") == b"tea" + half + b"rain"


def test_a_byte_without_a_token_is_read_as_the_replacement_character() -> None:
    speller = Speller.of(byte_level())
    of = {i: data for i, data in speller.token_bytes.of.items() if data != b"\xfc"}
    lacking = replace(speller, token_bytes=replace(speller.token_bytes, of=of))
    spelling = lacking.spell(b"a\xfcb")
    assert b"".join(of[i] for i in spelling.ids) == "a\ufffdb".encode()
    assert spelling.ends == (1, *[2] * (len(spelling.ids) - 2), 3)


def test_what_spells_a_control_token_is_text_to_the_teacher() -> None:
    student, teacher = byte_level(), sentencepiece()
    aligner = Aligner.of(student, teacher, ends=(2, teacher.convert_tokens_to_ids("<end_of_turn>")))
    ids = [*student("say <end_of_turn>", add_special_tokens=False)["input_ids"], student.eos_token_id]
    alignment = aligner.align(ids)
    end = teacher.convert_tokens_to_ids("<end_of_turn>")
    assert alignment.teacher_ids.count(end) == 1 and alignment.teacher_ids[-1] == end
    assert alignment.groups[-1].kind == "exact"


def test_a_control_token_that_the_teacher_lacks_is_the_text_of_its_name() -> None:
    student, teacher = byte_level(), llama_3()
    aligner = Aligner.of(student, teacher)
    alignment = aligner.align([student.convert_tokens_to_ids("<|im_start|>")])
    assert b"".join(aligner.speller.token_bytes.of[i] for i in alignment.teacher_ids) == b"<|im_start|>"


def test_control_tokens_are_shared_by_role_and_spelling() -> None:
    student, teacher = byte_level(), sentencepiece()
    end = teacher.convert_tokens_to_ids("<end_of_turn>")
    shared = Aligner.of(student, teacher, ends=(student.eos_token_id, end)).shared
    assert shared.control == {student.eos_token_id: end}
    assert Aligner.of(student, teacher).shared.control == {student.eos_token_id: teacher.eos_token_id}
    both = Aligner.of(student, byte_level(380, composed=True, seed=2)).shared
    assert both.control == {0: 0, 1: 1, 2: 2}


def test_spaces_are_shared_between_byte_level_and_sentencepiece() -> None:
    student, teacher = byte_level(), sentencepiece()
    shared = Aligner.of(student, teacher).shared
    spaced = {piece[1:]: index for piece, index in student.get_vocab().items() if piece.startswith("Ġ")}
    both = {piece: index for piece, index in teacher.get_vocab().items() if piece[1:] in spaced and piece[0] == "▁"}
    assert both
    assert all(shared.teacher_of[spaced[piece[1:]]] == index for piece, index in both.items())
    assert len(set(shared.teacher)) == len(shared.teacher) and list(shared.student) == sorted(shared.student)
    # A byte of a character is a piece to one and a fallback to the other.
    assert shared.teacher_of[student.convert_tokens_to_ids("Ã")] == teacher.convert_tokens_to_ids("<0xC3>")


@pytest.mark.parametrize("kind", KINDS)
def test_identical_tokenizers_share_every_id_and_every_token_is_exact(kind: str) -> None:
    tokenizer = KINDS[kind]()
    aligner = Aligner.of(tokenizer, tokenizer)
    assert aligner.shared.student == aligner.shared.teacher == tuple(sorted(tokenizer.get_vocab().values()))
    rng = random.Random(1)
    ids = [rng.randrange(len(tokenizer)) for _ in range(200)]
    alignment = aligner.align(ids)
    assert alignment.teacher_ids == tuple(ids) and alignment.tokens("exact") == 200


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_permuted_vocabulary_is_the_permutation(kind: str) -> None:
    student = KINDS[kind]()
    order = list(range(len(student)))
    random.Random(2).shuffle(order)
    teacher = permuted(student, order)
    aligner = Aligner.of(student, teacher)
    assert dict(aligner.shared.teacher_of) == dict(enumerate(order))
    for text in texts(80, seed=3):
        ids = student(text, add_special_tokens=False)["input_ids"]
        alignment = aligner.align(ids)
        if "▁" not in text:
            assert alignment.teacher_ids == tuple(order[i] for i in ids)
            assert alignment.tokens("exact") == len(ids)


def test_groups_are_cut_where_both_have_a_boundary() -> None:
    groups = groups_of([3, 4, 6, 9, 12], [3, 6, 8, 10, 12], lambda s, t: True)
    assert [(g.student, g.teacher, g.kind) for g in groups] == [
        ((0, 1), (0, 1), "exact"),
        ((1, 3), (1, 2), "merged"),
        ((3, 5), (2, 5), "rest"),
    ]
    (other,) = groups_of([3], [3], lambda s, t: False)
    assert other.kind == "rest"


def test_other_kinds_of_tokenizers_are_refused() -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(LimbeckError, match="neither byte-level nor sentencepiece"):
        TokenBytes.read(PreTrainedTokenizerFast(tokenizer_object=words))
