"""The group `likelihood`: how likely the teacher finds the student's answers, and how often likelier than others.

An answer's likelihood is the teacher's mean log-probability of its tokens at temperature 1. It says what the teacher
would say, not what is right, and it favours the probable over the informative; a judge (`judge`) reads both answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import AskedAnswers, EvaluationContext, Who, sampled
from limbeck.evaluation.group import GroupInPieces, GroupResult, Need
from limbeck.evaluation.pieces import Piece, longest_first
from limbeck.evaluation.scores.metrics import NATS, Metric
from limbeck.fields import STRICT, NonNegative, Seed
from limbeck.types import LimbeckError, Prompt, Response, Sampling, ScoredRow

Against = Literal["teacher", "references", "before", "distilled"]
_OTHERS = {
    "teacher": ("the teacher's answers", "the teacher's answer"),
    "references": ("the references", "the data's answer"),
    "before": ("the start", "its own answer before training"),
    "distilled": ("the distilled student", "its own answer before preference tuning"),
}


def metric_of(against: Against) -> str:
    """Name of the win rate over the answers of one author."""
    return "likelihood_win_rate" if against == "teacher" else f"likelihood_win_rate_{against}"


def _win_rate(against: Against) -> Metric:
    over, other = _OTHERS[against]
    return Metric(
        label=f"Likelihood win rate over {over}",
        unit="",
        better="higher",
        teacher_value=0.5 if against == "teacher" else None,
        meaning=f"how often the teacher finds the student's answer likelier per token than {other}; ties half",
    )


@dataclass(config=STRICT, kw_only=True)
class LikelihoodGroup(GroupInPieces):
    """How likely the teacher finds the student's answers, and how often likelier than others."""

    against: Against = "teacher"
    """Whose answers the student's are set beside: distilled is the student before preference tuning."""
    temperature: NonNegative = 0.0
    """Of the answers; their length is evaluate.max_new_tokens."""
    seed: Seed = 0

    metrics: ClassVar[Mapping[str, Metric]] = {
        "answer_logp": Metric(
            label="Likelihood of the answers",
            unit=NATS,
            better="higher",
            meaning="the teacher's mean log-probability of the tokens of the student's answers",
        ),
        **{metric_of(against): _win_rate(against) for against in ("teacher", "references", "before", "distilled")},
    }

    def needs(self) -> frozenset[Need]:
        answers: tuple[Need, ...] = ("teacher_answers",) if self.against == "teacher" else ()
        return frozenset({"teacher", "tokens", "prompts", *answers})

    @property
    def scores_fresh(self) -> bool:
        return True

    def check(self, evaluation: EvaluationContext) -> None:
        if self.against == "distilled":
            evaluation.require_preferred("evaluate.groups.likelihood.against")

    def asks(self, evaluation: EvaluationContext) -> Iterator[AskedAnswers]:
        writers: tuple[Who, ...] = ("student", "teacher") if self.against == "teacher" else ("student",)
        sampling, prompts = self._sampling(evaluation), _fitting(evaluation)
        yield from (AskedAnswers(who=who, sampling=sampling, prompts=prompts) for who in writers)

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        prompts, pairs = self._pairs(evaluation)
        if not pairs:
            raise LimbeckError(
                f"evaluate.groups.likelihood: none of {len(prompts)} held-out prompts has an answer of both sides; set "
                "another evaluate.groups.likelihood.against"
            )
        scores = self._scores(evaluation, _both(pairs))
        rows = [
            _row(pair, metric_of(self.against), scores[2 * place], scores[2 * place + 1])
            for place, pair in enumerate(pairs)
        ]
        detail = {"against": self.against, "pairs": len(pairs), "left_out": len(prompts) - len(pairs)}
        return GroupResult(tables={"": rows}, detail=detail)

    def _pairs(self, evaluation: EvaluationContext) -> tuple[list[Prompt], list[tuple[Response, Response]]]:
        """The prompts, and the answers of both sides to those that have both."""
        prompts = _fitting(evaluation)
        own, others = self._sampled(evaluation, prompts), self._others(evaluation, prompts)
        shared = [prompt.id for prompt in prompts if prompt.id in own and prompt.id in others]
        return prompts, [(own[name], others[name]) for name in shared]

    def pieces(self, evaluation: EvaluationContext, of: str, numbers: Iterable[int]) -> Iterator[Piece]:
        import torch

        from limbeck.evaluation.likelihood import token_logp_of

        responses = _both(self._pairs(evaluation)[1])
        batches = longest_first(responses, evaluation.scoring_batch_size)
        teacher = evaluation.scoring_teacher(stored=False, alone=True)
        for number in numbers:
            found = token_logp_of(teacher, responses, batches[number], device=evaluation.device)
            yield Piece(tensors={"logp": torch.stack([logp_T.mean() for logp_T in found])})

    def _scores(self, evaluation: EvaluationContext, responses: Sequence[Response]) -> list[float]:
        scores, batches = [0.0] * len(responses), longest_first(responses, evaluation.scoring_batch_size)
        with evaluation.meter("likelihood", len(responses), "answers") as meter:
            for rows, piece in zip(batches, evaluation.pieces(self, self.against, len(batches)), strict=True):
                for row, logp in zip(rows, piece.tensors["logp"].tolist(), strict=True):
                    scores[row] = logp
                    meter.advance(1)
        return scores

    def _sampled(
        self, evaluation: EvaluationContext, prompts: Sequence[Prompt], who: Who = "student"
    ) -> dict[str, Response]:
        return _by_prompt(evaluation.answers(who, self._sampling(evaluation), prompts))

    def _sampling(self, evaluation: EvaluationContext) -> Sampling:
        return sampled(evaluation.settings, self.temperature, self.seed)

    def _others(self, evaluation: EvaluationContext, prompts: Sequence[Prompt]) -> dict[str, Response]:
        if self.against == "references":
            return _by_prompt(evaluation.encode_references("teacher", [p for p in prompts if p.known_answers]))
        if self.against == "teacher":
            return self._sampled(evaluation, prompts, "teacher")
        earlier = evaluation.before() if self.against == "before" else evaluation.distilled()
        return self._sampled(earlier, prompts)


def _by_prompt(responses: Sequence[Response]) -> dict[str, Response]:
    return {response.prompt_id: response for response in responses if response.response_ids}


def _fitting(evaluation: EvaluationContext) -> list[Prompt]:
    """The prompts that leave room for an answer in the windows of both models."""
    held, most = evaluation.prompts[: evaluation.settings.prompts], evaluation.settings.max_new_tokens
    both: tuple[Who, Who] = ("teacher", "student")
    room = [{asked.id for asked in evaluation.encode(who, held, max_new_tokens=most)} for who in both]
    return [prompt for prompt in held if all(prompt.id in ids for ids in room)]


def _both(pairs: Sequence[tuple[Response, Response]]) -> list[Response]:
    """The answers of all pairs, the two of a pair one after the other."""
    return [response for pair in pairs for response in pair]


def _row(pair: tuple[Response, Response], metric: str, own: float, other: float) -> ScoredRow:
    # The same ids in another place of a batch may differ in the last bits of their score.
    tie = own == other or pair[0].response_ids == pair[1].response_ids
    win = 0.5 if tie else float(own > other)
    return ScoredRow(id=pair[0].prompt_id, weight=1.0, values={metric: win, "answer_logp": own})
