"""The part of two vocabularies that is the same tokens, whatever their ids: a map by bytes, control tokens by role.

A token's spelling in the vocabulary's file says little: " the" is "Ġthe" to a byte-level tokenizer and "▁the" to a
sentencepiece one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from limbeck.teachers.alignment.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Named tokens that one model has and the other may call otherwise.
_ROLES = ("eos_token_id", "bos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True, kw_only=True)
class SharedIds:
    """Tokens that both models have.

    Attributes:
        teacher_of: the teacher's id of each shared token, by the student's, in the order of the student's ids.
        control: those of them that are control tokens, which are the same by spelling or by role.
    """

    teacher_of: Mapping[int, int]
    control: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.teacher_of)

    @cached_property
    def student(self) -> tuple[int, ...]:
        """The student's ids, ascending."""
        return tuple(self.teacher_of)

    @cached_property
    def teacher(self) -> tuple[int, ...]:
        """The teacher's ids of the same tokens in the same order."""
        return tuple(self.teacher_of.values())

    @property
    def one_to_one(self) -> bool:
        """Whether the ids that are shared are the same numbers on both sides."""
        return self.student == self.teacher


def shared_ids_of(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    student_bytes: TokenBytes,
    teacher_bytes: TokenBytes,
    ends: tuple[int, int] | None,
) -> SharedIds:
    """The tokens that two tokenizers share: ordinary ones of equal bytes, and control tokens of equal spelling or role.

    Args:
        ends: the student's and the teacher's token that ends a turn; None where one has none.
    """
    pairs: dict[int, int] = {}
    for data, indices in student_bytes.ids.items():
        pairs |= zip(indices, teacher_bytes.ids.get(data, ()), strict=False)
    control: dict[int, int] = {}
    for mine, theirs in _control_pairs(student, teacher, student_bytes.control, teacher_bytes.control, ends):
        if mine not in control and theirs not in control.values():
            control[mine] = theirs
    return SharedIds(teacher_of=dict(sorted((pairs | control).items())), control=control)


def _control_pairs(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    mine: Mapping[int, str],
    theirs: Mapping[int, str],
    ends: tuple[int, int] | None,
) -> Iterator[tuple[int, int]]:
    """Control tokens that mean the same, the surest first."""
    if ends is not None:
        yield ends
    by_spelling = {spelling: index for index, spelling in theirs.items()}
    for index, spelling in sorted(mine.items()):
        if spelling in by_spelling:
            yield index, by_spelling[spelling]
    for role in _ROLES:
        pair = getattr(student, role), getattr(teacher, role)
        if pair[0] in mine and pair[1] in theirs:
            yield pair
