"""What the teacher sees of a prompt: the registry of views, which make the teacher's prompt from the student's.

A view changes the prompt alone. The teacher scores and writes the same response ids behind its own prompt, so the
tokens that enter the loss are the same for both models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from string import Formatter
from typing import ClassVar

from pydantic.dataclasses import dataclass

from limbeck.fields import STRICT
from limbeck.registry import Registry
from limbeck.types import ImageRef, LimbeckError, Message, Prompt

SEES_KEY = "teacher.sees"


class View:
    """Base class of the members of the registry.

    Attributes:
        needs_turns: whether the prompt must go through a chat template.
    """

    needs_turns: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that it reads beside the prompt."""
        return ()

    def check(self) -> None:
        """Check the options.

        Raises:
            LimbeckError: they make no view.
        """
        return

    def of(self, prompt: Prompt) -> Prompt:
        """The prompt as the teacher sees it.

        Raises:
            LimbeckError: the prompt has no user turn to change.
        """
        return prompt


@dataclass(config=STRICT, kw_only=True)
class StudentsPrompt(View):
    """The prompt that the student reads."""


@dataclass(config=STRICT, kw_only=True)
class WithColumn(View):
    """The prompt with a column of the data behind it, a blank line between them (SDFT, arXiv 2601.19897)."""

    column: str = "privileged_context"
    """Name of the column; it may hold text or turns, whose texts are joined."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def of(self, prompt: Prompt) -> Prompt:
        return _around(prompt, "", f"\n\n{prompt.columns[self.column]}")


@dataclass(config=STRICT, kw_only=True)
class Template(View):
    """A text with {prompt}, and columns of the data by their names, in the place of the last user turn."""

    text: str
    """Such as "{prompt}\\n\\nA solution:\\n{answer}\\n\\nSolve it yourself." {{ and }} stand for braces."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self._parts() if name not in (None, "prompt")))  # type: ignore[misc]

    def check(self) -> None:
        names = [name for _, name in self._parts() if name is not None]
        if names.count("prompt") != 1:
            raise LimbeckError(
                f"{SEES_KEY}.text names {{prompt}} {names.count('prompt')} times; expected once, and columns of the "
                'data by their names, such as "{prompt}\\n\\n{hint}"'
            )
        if self.text == "{prompt}":
            raise LimbeckError(f"{SEES_KEY}.text is the prompt alone; add to it, or set {SEES_KEY}=prompt")

    def of(self, prompt: Prompt) -> Prompt:
        sides, side = ["", ""], 0
        for text, name in self._parts():
            sides[side] += text
            if name == "prompt":
                side = 1
            elif name is not None:
                sides[side] += prompt.columns[name]
        return _around(prompt, sides[0], sides[1])

    def _parts(self) -> list[tuple[str, str | None]]:
        """Each text with the name of the field that follows it, None at the end.

        Raises:
            LimbeckError: a brace that opens no field, or a field with a format of its own.
        """
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise LimbeckError(
                f"{SEES_KEY}.text has a brace that names no column ({error}); write {{{{ and }}}} for braces"
            ) from None
        for _, name, form, conversion in parts:
            if name is not None and (not name.strip() or form or conversion):
                raise LimbeckError(
                    f"{SEES_KEY}.text has a field {name!r} with a form of its own or without a name; "
                    "write {prompt} or the name of a column alone, {{ and }} for braces"
                )
        return [(text, name) for text, name, _, _ in parts]


@dataclass(config=STRICT, kw_only=True)
class SystemPrompt(View):
    """The prompt under a system prompt, which the student learns to do without (context distillation)."""

    text: str
    """It stands before the system turn of a prompt that has one."""

    needs_turns: ClassVar[bool] = True

    def check(self) -> None:
        if not self.text.strip():
            raise LimbeckError(f"{SEES_KEY}.text is blank; write the system prompt, or set {SEES_KEY}=prompt")

    def of(self, prompt: Prompt) -> Prompt:
        turns = prompt.messages or (Message(role="user", content=prompt.text or ""),)
        first, text = turns[0], self.text
        if first.role in ("system", "developer"):
            parts = _joined((f"{text}\n\n", *first.parts)) if first.parts else ()
            turns = (replace(first, content=f"{text}\n\n{first.content}", parts=parts), *turns[1:])
        else:
            turns = (Message(role="system", content=text), *turns)
        return replace(prompt, messages=turns, text=None, instruction=None)


def _around(prompt: Prompt, before: str, after: str) -> Prompt:
    """The prompt with text before and behind its last user turn, or its text."""
    if prompt.text is not None:
        instruction = prompt.instruction
        if instruction is not None:
            asked, given = instruction
            instruction = (before + asked, given + after) if given.strip() else (before + asked + after, given)
        return replace(prompt, text=before + prompt.text + after, instruction=instruction)
    turns = list(prompt.messages or ())
    place = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    if place is None:
        raise LimbeckError(
            f"prompt {prompt.where or prompt.id} has no user turn, which {SEES_KEY} changes; set {SEES_KEY}=prompt or "
            "system, or drop the row"
        )
    turn = turns[place]
    parts = _joined((before, *turn.parts, after)) if turn.parts else ()
    turns[place] = replace(turn, content=before + turn.content + after, parts=parts)
    return replace(prompt, messages=tuple(turns))


def _joined(parts: Iterable[str | ImageRef]) -> tuple[str | ImageRef, ...]:
    """Parts of a turn without empty texts, neighbouring texts made one."""
    found: list[str | ImageRef] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return tuple(found)


SEES: Registry[View] = Registry(
    "view",
    {"prompt": StudentsPrompt, "column": WithColumn, "template": Template, "system": SystemPrompt},
    entry_points="limbeck.views",
)
