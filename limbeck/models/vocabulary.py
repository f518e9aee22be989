"""Comparison of two vocabularies: whether, and over how many ids, a pair can be distilled.

Head widths say little: the Qwen2.5 family has one tokenizer and heads of 151936 and 152064 rows, while two models of
equal width may name entirely different tokens. What counts is the map from token to id.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from limbeck.models.fingerprints import backend_rules
from limbeck.models.headers import EMBEDDINGS, safetensors_header
from limbeck.models.processors import placeholder_of, source_processor
from limbeck.models.sources import Source, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


Compatibility = Literal["same", "same_padded", "different"]
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_SHOWN = 5
_UNLIMITED = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyCard:
    """Vocabulary of a model and its tokenizer, read without the weights.

    Attributes:
        ids: token to id, added tokens included.
        added: the added tokens, by id.
        control: ids of the control tokens, which no text is meant to spell.
        splits: how text becomes tokens (normalisation, pre-tokenisation, merges), as one comparable string.
        roles: bos, eos, pad and unk token as text and id; None where there is none.
        head_rows: rows of the output embedding, padding included.
        context_length: the model's window in tokens; None when it states none.
        image_token: what stands for an image in a text; None for a model that reads text alone.
    """

    name: str
    architecture: str
    ids: dict[str, int]
    added: dict[int, str]
    control: frozenset[int]
    roles: dict[str, tuple[str, int] | None]
    splits: str
    chat_template: str | None
    head_rows: int
    context_length: int | None
    dtype: str
    image_token: str | None = None

    @property
    def vocab_size(self) -> int:
        """Real token ids: the highest one plus 1."""
        return max(self.ids.values()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyReport:
    """The comparison of a teacher with a student.

    Attributes:
        vocab_size: the ids both share; what objectives run over. 0 when the vocabularies differ.
        differences: what makes the pair impossible, one sentence each.
        notes: what differs without harm, or deserves a look.
    """

    verdict: Compatibility
    vocab_size: int
    differences: tuple[str, ...]
    notes: tuple[str, ...]


def real_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id plus 1, added tokens included. Rows of a head from there on are padding."""
    return max(tokenizer.get_vocab().values()) + 1


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of the control tokens, which no text is meant to spell."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


def describe_vocabulary(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> VocabularyCard:
    """The card of a model by name, from configuration, tokenizer and the headers of the weight files.

    Raises:
        LimbeckError: as `limbeck.models.loading.load_model`.
    """
    from limbeck.models.loading import source_config, source_tokenizer

    source = resolve(name, revision=revision, weights=False, trust_remote_code=trust_remote_code)
    config = source_config(source, trust_remote_code=trust_remote_code)
    tokenizer = source_tokenizer(source, trust_remote_code=trust_remote_code)
    if placeholder_of(tokenizer) is not None:
        # Whatever is wrong with its processor is said before anything works.
        source_processor(source, config, tokenizer)
    rows, dtype = (None, "quantised GGUF") if source.gguf is not None else _stored_head(source)
    return _card(source.name, config, tokenizer, rows, dtype)


def _card(
    name: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, rows: int | None, dtype: str | None
) -> VocabularyCard:
    text = config.get_text_config()
    fields, ids = text.to_dict(), tokenizer.get_vocab()
    roles: dict[str, tuple[str, int] | None] = dict.fromkeys(_ROLES)
    for role in _ROLES:
        if token := tokenizer.special_tokens_map.get(role):
            roles[role] = (str(token), ids[str(token)])
    window = fields.get("max_position_embeddings") or fields.get("n_positions") or tokenizer.model_max_length
    return VocabularyCard(
        name=name,
        architecture=(config.architectures or [config.model_type])[0],
        ids=ids,
        added={index: str(token) for index, token in tokenizer.added_tokens_decoder.items()},
        control=control_ids(tokenizer),
        roles=roles,
        splits=_splitting_rules(tokenizer),
        chat_template=_template(tokenizer),
        head_rows=rows or int(fields["vocab_size"]),
        context_length=window if isinstance(window, int) and window < _UNLIMITED else None,
        dtype=dtype or str(fields.get("dtype") or "unknown").removeprefix("torch."),
        image_token=None if (placeholder := placeholder_of(tokenizer)) is None else placeholder.token,
    )


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template: Any = tokenizer.chat_template
    return json.dumps(template, sort_keys=True) if isinstance(template, dict) else template


def _splitting_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Rules of splitting text, apart from the vocabulary itself: two models can share ids and split differently."""
    if not tokenizer.is_fast:
        return type(tokenizer).__name__
    rules = backend_rules(tokenizer)
    model = rules["model"]
    parts = [rules["normalizer"], rules["pre_tokenizer"], model["type"], model.get("merges")]
    return json.dumps(parts, sort_keys=True)


def _stored_head(source: Source) -> tuple[int | None, str | None]:
    """Rows and dtype of the output embedding from the safetensors headers; None where they are not at hand."""
    for path in sorted(source.directory.glob("*.safetensors")):
        header = safetensors_header(path)
        for name, entry in header.items():
            if name.endswith(EMBEDDINGS) and entry["shape"]:
                return int(entry["shape"][0]), _DTYPE_NAMES.get(entry["dtype"], entry["dtype"])
    return None, None


_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def compare_vocabularies(teacher: VocabularyCard, student: VocabularyCard) -> VocabularyReport:
    """Whether every id means the same token to both, and what else differs."""
    differences, lacking = _token_differences(teacher, student)
    for card in (teacher, student):
        if card.vocab_size > card.head_rows:
            differences.append(
                f"{card.name} has {card.vocab_size} token ids but a head of {card.head_rows} rows; "
                "its tokenizer does not belong to it"
            )
    padded = teacher.head_rows != teacher.vocab_size or student.head_rows != student.vocab_size
    verdict: Compatibility = "different" if differences else ("same_padded" if padded else "same")
    return VocabularyReport(
        verdict=verdict,
        vocab_size=0 if differences else teacher.vocab_size,
        differences=tuple(differences),
        notes=(*lacking, *_notes(teacher, student)),
    )


def _token_differences(teacher: VocabularyCard, student: VocabularyCard) -> tuple[list[str], list[str]]:
    """Differences that make the pair impossible, and control tokens that one of the two lacks: no text spells those."""
    if teacher.ids == student.ids:
        return [], []
    by_id_teacher = {index: token for token, index in teacher.ids.items()}
    by_id_student = {index: token for token, index in student.ids.items()}
    moved = sorted(i for i in by_id_teacher.keys() & by_id_student.keys() if by_id_teacher[i] != by_id_student[i])
    found, lacking = [], []
    if moved:
        shown = ", ".join(f"{i} is {by_id_teacher[i]!r} / {by_id_student[i]!r}" for i in moved[:_SHOWN])
        found.append(f"{len(moved)} ids name different tokens (teacher / student: {shown})")
    sides = ((by_id_teacher, by_id_student, teacher, "teacher"), (by_id_student, by_id_teacher, student, "student"))
    for here, there, card, who in sides:
        only = sorted(here.keys() - there.keys())
        if not only:
            continue
        shown = ", ".join(f"{i} {here[i]!r}" for i in only[:_SHOWN])
        without_row = who == "teacher" and only[-1] >= student.head_rows
        if set(only) <= card.control and not without_row:
            why = "their rows of its head are untrained" if who == "teacher" else "they get no mass"
            other = "student" if who == "teacher" else "teacher"
            lacking.append(f"the {other} lacks {len(only)} control tokens of the {who} ({shown}); {why}")
        else:
            rows = f"; the student's head has {student.head_rows} rows" if without_row else ""
            found.append(f"{len(only)} ids only the {who} has ({shown}{rows})")
    return found, lacking


def _notes(teacher: VocabularyCard, student: VocabularyCard) -> list[str]:
    notes = []
    if teacher.head_rows != student.head_rows or teacher.head_rows != teacher.vocab_size:
        notes.append(
            f"heads have {teacher.head_rows} and {student.head_rows} rows for {teacher.vocab_size} ids; "
            "the rows above are padding and get no mass"
        )
    if teacher.ids == student.ids and teacher.splits != student.splits:
        notes.append("the tokenizers split text by different rules; the teacher's will be used for the prompts")
    for role in _ROLES:
        if teacher.roles[role] != student.roles[role]:
            notes.append(f"{role} is {_role(teacher, role)} for the teacher, {_role(student, role)} for the student")
    if teacher.chat_template != student.chat_template:
        notes.append(f"chat templates differ ({_has(teacher)} / {_has(student)}); the prompts follow the teacher's")
    if teacher.context_length != student.context_length:
        notes.append(f"context lengths differ: {teacher.context_length} and {student.context_length} tokens")
    if (teacher.image_token is None) != (student.image_token is None):
        seeing, blind = (teacher, student) if student.image_token is None else (student, teacher)
        notes.append(f"{seeing.name} reads images and {blind.name} does not: prompts with images are refused")
    if teacher.dtype != student.dtype:
        notes.append(f"weights are stored as {teacher.dtype} and {student.dtype}")
    return notes


def _role(card: VocabularyCard, role: str) -> str:
    held = card.roles[role]
    return "none" if held is None else f"{held[0]!r} ({held[1]})"


def _has(card: VocabularyCard) -> str:
    return "none" if card.chat_template is None else f"{len(card.chat_template)} characters"
