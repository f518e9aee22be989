"""The group `gap`: what the student took in of what its teacher alone sees, and what that cost elsewhere.

Between a student and a teacher that sees more (`teacher.sees`) lies a divergence already before training. How much of
it training closed on the held-out responses is the share recovered. Elsewhere, on answers of another data set
(`evaluate.groups.gap.others`, condition `others`), the student's negative log-likelihood before and after training
says what it lost, or gained, where it was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.groups.nll import surprise
from limbeck.evaluation.groups.recovery import closed_share, fidelity_rows
from limbeck.evaluation.scores.metrics import Metric
from limbeck.fields import STRICT, Count
from limbeck.prompts.readers import source_digest
from limbeck.prompts.references import require_references
from limbeck.types import Json, LimbeckError, Prompt, ScoredRow


@dataclass(config=STRICT, kw_only=True)
class GapGroup(EvaluationGroup):
    """How much of the divergence from a teacher that sees more training closed, and what other prompts lost."""

    others: str | None = None
    """A file of prompts with answers, in any of the known formats, that the training has nothing to do with."""
    others_limit: Count = 256
    """Use only so many of them, in the order of their hashes."""

    parts = ("after",)
    metrics: ClassVar[Mapping[str, Metric]] = {
        "gap_recovered": Metric(
            label="Gap to the teacher recovered",
            unit="",
            better="higher",
            meaning="of the forward KL to the teacher before training, the share that training closed; 1 is all of it, "
            "below 0 the student moved away",
            teacher_value=1.0,
        ),
        "nll_lost": Metric(
            label="Lost on other prompts",
            unit="nats/token",
            better="lower",
            meaning="negative log-likelihood of the answers to other prompts after training, less that before",
        ),
    }

    @classmethod
    def on_responses(cls, condition: str, options: Mapping[str, object]) -> bool:
        del options
        return not condition

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "tokens"})

    def check(self, evaluation: EvaluationContext) -> None:
        if self.others is not None:
            self._others()

    def inputs(self, evaluation: EvaluationContext) -> Json:
        return {} if self.others is None else {"others_content": source_digest(self.others)}

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        others = None if self.others is None else self._others()
        # One student is in memory at a time: all of the one before training is measured before the other is loaded.
        (gap, then), (left, now) = (
            (fidelity_rows(one, one.student.model), None if others is None else _nll(one, others))
            for one in (evaluation.before(), evaluation)
        )
        tables: dict[str, Sequence[ScoredRow]] = {"": closed_share(evaluation, gap, left, "gap_recovered")}
        if then is not None and now is not None:
            assert then.keys() == now.keys(), "both read the same answers in the same tokens"
            tables["others"] = [
                ScoredRow(id=name, weight=tokens, values={"nll_lost": (now[name][0] - total) / tokens})
                for name, (total, tokens) in then.items()
            ]
        return GroupResult(tables=tables)

    def _others(self) -> Sequence[Prompt]:
        """The other prompts.

        Raises:
            LimbeckError: there are none, or one has no answer.
        """
        from limbeck.prompts.sources import load_prompts

        assert self.others is not None
        try:
            prompts = load_prompts(self.others, heldout_fraction=1.0, limit=max(self.others_limit, 2)).prompts
        except LimbeckError as error:
            raise LimbeckError(f"evaluate.groups.gap.others: {error}") from None
        require_references(prompts, "give evaluate.groups.gap.others data with answers, or remove it")
        return prompts


def _nll(evaluation: EvaluationContext, prompts: Sequence[Prompt]) -> dict[str, tuple[float, int]]:
    """By prompt the sum of -log q over the tokens of its answer, and their number."""
    most = evaluation.settings.max_new_tokens
    fitting = {asked.id for asked in evaluation.encode("student", prompts, max_new_tokens=most)}
    responses = evaluation.encode_references("student", [prompt for prompt in prompts if prompt.id in fitting])
    found: dict[str, tuple[float, int]] = {}
    with evaluation.meter("other prompts", sum(r.tokens for r in responses), "tokens") as meter:
        for response, nll in surprise(evaluation, responses):
            total, tokens = found.get(response.prompt_id, (0.0, 0))
            found[response.prompt_id] = (total + nll, tokens + response.tokens)
            meter.advance(response.tokens)
    return found
