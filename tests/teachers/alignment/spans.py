"""What holds of every alignment, whatever the text."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.teachers.alignment.reading import Alignment


def require_whole(alignment: Alignment, ids: Sequence[int], size: int) -> None:
    """Check that every byte is in one span of each side and every token in one group."""
    for spans in (alignment.student_spans, alignment.teacher_spans):
        places = [0, *(end for _, end in spans)]
        assert [start for start, _ in spans] == places[:-1] and places == sorted(places)
        assert not spans or places[-1] == size
    for side, count in (("student", len(ids)), ("teacher", len(alignment.teacher_ids))):
        ranges = [getattr(group, side) for group in alignment.groups]
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(count))
    for group in alignment.groups:
        (s, s_stop), (t, t_stop) = group.student, group.teacher
        if s < s_stop and t < t_stop:
            mine, theirs = alignment.student_spans, alignment.teacher_spans
            assert (mine[s][0], mine[s_stop - 1][1]) == (theirs[t][0], theirs[t_stop - 1][1])
