"""`limbeck doctor TEACHER STUDENT`: whether a pair can be distilled, and what to know about it first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from limbeck.models.vocabulary import VocabularyCard, VocabularyReport, compare_vocabularies, describe_vocabulary
from limbeck.runtime.console import on_one_line

if TYPE_CHECKING:
    from rich.console import Group

_VERDICTS = {
    "same": "yes: the same tokens, heads without padding",
    "same_padded": "yes: the same tokens; padded head rows get no mass",
    "different": "not as it is: different tokens. With teacher.across where these coincide, or from text alone",
}

_TEXT_ONLY = (
    "- from text alone (sft, and seqkd with teacher.cache=false) the student learns with the objective ce, in its own "
    "template and tokens, on the teacher's answers or the data's; rouge, diversity, judge, tasks, cost and nll measure "
    "such a pair"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """Both cards and their comparison."""

    teacher: VocabularyCard
    student: VocabularyCard
    vocabulary: VocabularyReport

    @property
    def distillable(self) -> bool:
        return self.vocabulary.verdict != "different"


def doctor(
    teacher: str,
    student: str,
    *,
    teacher_revision: str | None = None,
    student_revision: str | None = None,
    trust_remote_code: bool = False,
) -> DoctorReport:
    """Examine a pair by configuration, tokenizer and weight-file headers; no weights are loaded.

    Raises:
        LimbeckError: one of the two is no model, or cannot be reached.
    """
    first = describe_vocabulary(teacher, revision=teacher_revision, trust_remote_code=trust_remote_code)
    second = describe_vocabulary(student, revision=student_revision, trust_remote_code=trust_remote_code)
    return DoctorReport(teacher=first, student=second, vocabulary=compare_vocabularies(first, second))


def doctor_rows(report: DoctorReport) -> list[tuple[str, str, str]]:
    """Rows of the comparison: (label, teacher, student)."""
    shown: list[tuple[str, Callable[[VocabularyCard], str]]] = [
        ("model", lambda card: card.name),
        ("architecture", lambda card: card.architecture),
        ("token ids", lambda card: f"{card.vocab_size:,}"),
        ("head rows", lambda card: f"{card.head_rows:,} ({card.head_rows - card.vocab_size:,} padding)"),
        ("added tokens", lambda card: f"{len(card.added):,}"),
        *((role.removesuffix("_token"), functools.partial(_token, role=role)) for role in report.teacher.roles),
        ("chat template", _template),
        ("context", lambda card: f"{card.context_length:,}" if card.context_length else "not stated"),
        ("images", lambda card: f"read, written as {card.image_token}" if card.image_token else "not read"),
        ("stored as", lambda card: card.dtype),
    ]
    return [(label, show(report.teacher), show(report.student)) for label, show in shown]


def doctor_table(report: DoctorReport, changes: Sequence[str] = ()) -> Group:
    """The report for `rich.console.Console.print`, which makes it plain where there is no terminal.

    Args:
        changes: what a run changes in the student.
    """
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in ("", "teacher", "student"):
        table.add_column(title, overflow="fold")
    for label, left, right in doctor_rows(report):
        style = None if left == right or label in ("model", "architecture") else "yellow"
        # What a model's files say may hold commands to a terminal.
        table.add_row(label, *(escape(on_one_line(cell)) for cell in (left, right)), style=style)
    found = report.vocabulary
    verdict = Text(
        f"Can be distilled? {_VERDICTS[found.verdict]}", style="bold green" if report.distillable else "bold red"
    )
    lines = [Text(f"- {on_one_line(line)}", style="red") for line in found.differences]
    lines += [Text(f"- {on_one_line(line)}") for line in (*found.notes, *changes)]
    if not report.distillable:
        lines.append(Text(_TEXT_ONLY))
    if report.distillable:
        lines.append(Text(f"Objectives run over {found.vocab_size:,} token ids."))
    return Group(table, Text(), verdict, *lines)


def _token(card: VocabularyCard, role: str) -> str:
    held = card.roles[role]
    return "none" if held is None else f"{held[0]} ({held[1]})"


def _template(card: VocabularyCard) -> str:
    return "none" if card.chat_template is None else f"{len(card.chat_template):,} characters"
