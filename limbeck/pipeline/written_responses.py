"""Responses on their way to disk, counted as they pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from limbeck.types import Author, Json, LimbeckError, Response, Split


@dataclass
class WrittenResponses:
    """Counts of the responses of an author for the record of their stage."""

    author: Author
    count: int = 0
    empty: int = 0
    ended: int = 0
    tokens: int = 0
    _with_empty: set[Split] = field(default_factory=set)
    _with_text: set[Split] = field(default_factory=set)

    def counted(self, responses: Iterable[Response]) -> Iterator[Response]:
        """The same responses."""
        for response in responses:
            empty = _is_empty(response)
            self.count += 1
            self.empty += empty
            self.ended += response.stop != "length"
            self.tokens += response.tokens
            (self._with_empty if empty else self._with_text).add(response.split)
            yield response

    def checked(self, responses: Iterable[Response]) -> Iterator[Response]:
        """The same, refused after the last one where all of a split are empty.

        Raises:
            LimbeckError: they are.
        """
        yield from self.counted(responses)
        splits: tuple[Split, ...] = ("train", "heldout")
        for split in splits:
            if split in self._with_empty - self._with_text:
                raise LimbeckError(
                    f"all {split} responses are empty: the {self.author} ended every answer at once; "
                    "check prompts.template, or the teacher"
                )

    def record(self, dropped: int) -> Json:
        """Their record, with the number of prompts that were too long."""
        return {
            "responses": self.count,
            "empty": self.empty,
            "dropped_too_long": dropped,
            "ended": self.ended,
            "tokens": self.tokens,
        }


def _is_empty(response: Response) -> bool:
    """Whether a response has no tokens beside its end."""
    return response.tokens <= (response.stop == "eos")
