"""The template of a command that starts the runs of a sweep: words as a shell reads them, placeholders in braces."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from string import Formatter

from limbeck.types import LimbeckError

PLACEHOLDERS = ("command", "run", "arm")
# Stands for {command} alone and without quotes, which is several words.
_WORDS = "\0"


def words_of(template: str, command: Sequence[str], values: Mapping[str, str]) -> list[str]:
    """The words of a command.

    `{command}` between spaces becomes the words of the command; in quotes or inside of a longer word it is one text,
    which a shell reads as the command.

    Args:
        values: of the other placeholders.
    """
    filled = {"command": shlex.join(command), **values}
    found: list[str] = []
    for word in _split(template):
        found += command if word == _WORDS else [word.replace(_WORDS, "{command}").format(**filled)]
    return found


def check_template(template: str) -> None:
    """See that a template can start a run.

    Raises:
        LimbeckError: it cannot be read, has another placeholder, or none for the command.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        _split(template)
    except ValueError as error:
        raise LimbeckError(
            f"command: got {template!r} ({error}); expected quotes in pairs, and braces doubled where they are meant"
        ) from None
    for name in names:
        if name not in PLACEHOLDERS:
            near = get_close_matches(name, PLACEHOLDERS, 1)
            known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
            did = f"; did you mean {{{near[0]}}}?" if near else "; double the braces where they are meant"
            raise LimbeckError(f"command: got {{{name}}} in {template!r}; expected {known}{did}")
    if "command" not in names:
        raise LimbeckError(
            f"command: got {template!r}, which starts no run; put {{command}} where the run's command belongs, as in "
            "'srun --gres=gpu:1 {command}'"
        )


def _split(template: str) -> list[str]:
    return shlex.split(re.sub(r"(?<!\S)\{command\}(?!\S)", _WORDS, template))
