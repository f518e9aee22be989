"""Two tokenisations of the same bytes, cut where both have a boundary.

Between two such cuts stands a group: one token of each side where their spans coincide, one of one side and several of
the other, or several of both.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["exact", "merged", "rest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tokens of both sides that cover the same bytes, as half-open ranges of token numbers.

    Attributes:
        kind: "exact" where both sides have one token and it is the same one; "merged" where one token of one side is
            several of the other; else "rest".
    """

    student: tuple[int, int]
    teacher: tuple[int, int]
    kind: Kind


def groups_of(
    student_ends: Sequence[int], teacher_ends: Sequence[int], same: Callable[[int, int], bool]
) -> list[Group]:
    """The groups of two tokenisations, in order; every token of both sides is in exactly one.

    Args:
        student_ends: where the student's tokens end, in bytes, ascending; see `Spelling.ends`.
        teacher_ends: the teacher's. Both end with the number of bytes.
        same: whether two tokens, by their numbers, are the same token.
    """
    groups: list[Group] = []
    s = t = 0
    for cut in sorted(set(student_ends) & set(teacher_ends)):
        s_stop, t_stop = bisect_right(student_ends, cut, s), bisect_right(teacher_ends, cut, t)
        sizes = s_stop - s, t_stop - t
        kind: Kind = "merged" if 1 in sizes and sizes != (1, 1) else "rest"
        if sizes == (1, 1) and same(s, t):
            kind = "exact"
        groups.append(Group(student=(s, s_stop), teacher=(t, t_stop), kind=kind))
        s, t = s_stop, t_stop
    if s < len(student_ends) or t < len(teacher_ends):
        # One side has no tokens at all: they cover nothing, or the other tokenizer leaves nothing of the text.
        groups.append(Group(student=(s, len(student_ends)), teacher=(t, len(teacher_ends)), kind="rest"))
    return groups
