"""The record of judgements, one JSON line each: a question is never asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from limbeck.evaluation.judge.opinions import NO_USE, Opinion, without_garbled
from limbeck.runtime.append_log import append_to_log, damaged, read_log
from limbeck.types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A judge's reply to one question.

    Attributes:
        key: of the question (`limbeck.evaluation.judge.questions.JudgeQuestion`).
        max_new_tokens: the reply's limit.
        greedy: whether temperature 0 was asked for; some models take their own alone.
        prompt_tokens, completion_tokens: as the server counts them; None where it does not.
    """

    key: str
    pair_id: str
    student_first: bool
    model: str
    opinion: Opinion
    max_new_tokens: int
    greedy: bool
    prompt_tokens: int | None
    completion_tokens: int | None

    def check(self) -> None:
        """See that the fields that are counted with and looked up are of their types, for a line of a file.

        Raises:
            TypeError: one is not.
        """
        counts = (self.max_new_tokens, self.prompt_tokens or 0, self.completion_tokens or 0)
        texts = (self.key, self.pair_id, self.model, self.opinion.text)
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(count, int) for count in counts):
            raise TypeError("a text or a count is none")


@dataclass
class JudgementLog:
    """Judgements on disk, by the key of their question, of whatever judge and answers."""

    path: Path
    known: dict[str, Judgement] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> JudgementLog:
        """The log at a path, empty where there is none. Half a line at its end is dropped.

        Raises:
            LimbeckError: a damaged line.
        """
        log = cls(path)
        for number, entry in read_log(path):
            try:
                judgement = Judgement(opinion=Opinion(**entry.pop("opinion")), **entry)
                judgement.check()
            except (KeyError, TypeError, ValueError) as error:
                raise damaged(path, number, error) from None
            log.known[judgement.key] = replace(judgement, opinion=without_garbled(judgement.opinion))
        return log

    def add(self, judgement: Judgement) -> None:
        """Append a judgement; it is on disk when this returns."""
        entry = asdict(judgement)
        if judgement.opinion.probabilities is None:
            # As lines of verdicts in text always were.
            del entry["opinion"]["probabilities"]
        append_to_log(self.path, entry)
        self.known[judgement.key] = judgement

    def holds(self, key: str, max_new_tokens: int) -> bool:
        """Whether a question has a usable reply that was not cut off at a lower limit."""
        known = self.known.get(key)
        if known is None or known.opinion.unread in NO_USE:
            return False
        return not (known.opinion.unread == "truncated" and known.max_new_tokens < max_new_tokens)

    def has_verdict_of(self, model: str) -> bool:
        """Whether a judge of this name answered before."""
        return any(
            known.model == model and known.opinion.unread not in ("refused", *NO_USE) for known in self.known.values()
        )


def used(judgements: Sequence[Judgement]) -> Json:
    """Tokens that the server counted, and how many replies came without a count."""
    return {
        "replies": len(judgements),
        "prompt_tokens": sum(j.prompt_tokens or 0 for j in judgements),
        "completion_tokens": sum(j.completion_tokens or 0 for j in judgements),
        "uncounted_replies": sum(j.prompt_tokens is None or j.completion_tokens is None for j in judgements),
    }
