"""An answer in the student's tokens as the teacher reads it: its own tokens of the same bytes, and how they align."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from limbeck.teachers.alignment.groups import Group, Kind, groups_of
from limbeck.teachers.alignment.shared_ids import SharedIds, shared_ids_of
from limbeck.teachers.alignment.spelling import Speller, Spelling
from limbeck.teachers.alignment.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """An answer in both models' tokens.

    Attributes:
        teacher_ids: the teacher's.
        groups: tokens of both that cover the same bytes, in order.
        student_spans, teacher_spans: bytes that each token covers, (start, end).
    """

    teacher_ids: tuple[int, ...]
    groups: tuple[Group, ...]
    student_spans: tuple[tuple[int, int], ...]
    teacher_spans: tuple[tuple[int, int], ...]

    def tokens(self, kind: Kind) -> int:
        """Number of the student's tokens in groups of a kind."""
        return sum(group.student[1] - group.student[0] for group in self.groups if group.kind == kind)


@dataclass(frozen=True, kw_only=True)
class Aligner:
    """Aligns answers of a student with a teacher's tokens.

    Attributes:
        shared: the tokens that both have.
    """

    student_bytes: TokenBytes
    speller: Speller
    shared: SharedIds

    @classmethod
    def of(
        cls,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        ends: tuple[int, int] | None = None,
    ) -> Aligner:
        """The aligner of two tokenizers.

        Args:
            ends: the student's and the teacher's token that ends a turn; None where one has none.

        Raises:
            LimbeckError: one of them is neither byte-level nor sentencepiece.
        """
        speller, student_bytes = Speller.of(teacher), TokenBytes.read(student)
        shared = shared_ids_of(
            student, teacher, student_bytes=student_bytes, teacher_bytes=speller.token_bytes, ends=ends
        )
        return cls(student_bytes=student_bytes, speller=speller, shared=shared)

    @cached_property
    def _same_ids(self) -> bool:
        """Whether the two have the same tokens, so that the teacher reads the very ids that the student wrote."""
        mine, theirs = self.student_bytes.of, self.speller.token_bytes.of
        return self.shared.one_to_one and len(self.shared) == len(mine) == len(theirs)

    def align(self, ids: Sequence[int]) -> Alignment:
        """The teacher's tokens of an answer that is written in the student's."""
        mine, theirs = Spelling(), Spelling()
        groups: list[Group] = []
        for part, own in self._parts(ids):
            groups += self._groups(part, own, len(mine.ids), len(theirs.ids))
            mine, theirs = mine.then(part), theirs.then(own)
        return Alignment(
            teacher_ids=theirs.ids,
            groups=tuple(groups),
            student_spans=_spans(mine),
            teacher_spans=_spans(theirs),
        )

    def _parts(self, ids: Sequence[int]) -> Iterator[tuple[Spelling, Spelling]]:
        """Stretches of an answer in both models' tokens: control tokens that both have are kept apart."""
        ordinary: list[int] = []
        for index in ids:
            theirs = index if self._same_ids else self.shared.control.get(index)
            if theirs is None:
                ordinary.append(index)
                continue
            if ordinary:
                yield self._spelled(ordinary)
                ordinary = []
            size = len(self.student_bytes.of[index])
            yield Spelling(ids=(index,), ends=(size,), size=size), Spelling(ids=(theirs,), ends=(size,), size=size)
        if ordinary:
            yield self._spelled(ordinary)

    def _spelled(self, ids: Sequence[int]) -> tuple[Spelling, Spelling]:
        """Ordinary tokens of the student, and the teacher's of the same bytes."""
        of = self.student_bytes.of
        data = b"".join(of[index] for index in ids)
        mine, place = [], 0
        for index in ids:
            place += len(of[index])
            mine.append(place)
        return Spelling(ids=tuple(ids), ends=tuple(mine), size=len(data)), self.speller.spell(data)

    def _groups(self, part: Spelling, own: Spelling, student: int, teacher: int) -> list[Group]:
        """The groups of a stretch, numbered from the tokens before it on."""
        teacher_of = self.shared.teacher_of

        def same(s: int, t: int) -> bool:
            return teacher_of.get(part.ids[s]) == own.ids[t]

        return [
            replace(
                group,
                student=(group.student[0] + student, group.student[1] + student),
                teacher=(group.teacher[0] + teacher, group.teacher[1] + teacher),
            )
            for group in groups_of(part.ends, own.ends, same)
        ]


def _spans(spelling: Spelling) -> tuple[tuple[int, int], ...]:
    return tuple(zip((0, *spelling.ends), spelling.ends, strict=False))
