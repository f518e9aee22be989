"""The group `judge`: how often another model prefers the student's greedy answers to others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.client.keys import without_key
from limbeck.client.openai import Server
from limbeck.evaluation.context import AskedAnswers, EvaluationContext, greedy
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.judge.asking import Judge, NoLogprobsError
from limbeck.evaluation.judge.log import Judgement, JudgementLog, used
from limbeck.evaluation.judge.opinions import printable_judgement
from limbeck.evaluation.judge.questions import AnswerPair, JudgeQuestion, estimate, questions_of, request_text
from limbeck.evaluation.judge.verdicts import JudgedPair, score_pairs, summarise_pairs, unread_warning
from limbeck.fields import LATER, NEUTRAL, STRICT, Count, NonNegative, Positive, VerdictBy
from limbeck.runtime.files import write_text
from limbeck.types import Json, LimbeckError, Prompt

# The win rate's name by whose answers the student's are set beside.
_METRIC = {
    "teacher": "win_rate",
    "references": "win_rate_references",
    "before": "win_rate_before",
    "distilled": "win_rate_distilled",
}
# What FastChat's pairwise files call a verdict, in the order where model_1, the student, is A; and where it is B.
_WINNERS = ({"A": "model_1", "B": "model_2", "C": "tie"}, {"A": "model_2", "B": "model_1", "C": "tie"})


@dataclass(config=STRICT, kw_only=True)
class JudgeGroup(EvaluationGroup):
    """How often another model prefers the student's greedy answers to others."""

    base_url: Annotated[str | None, NEUTRAL] = None
    """Of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    model: str | None = None
    """The judge's name there; null takes the only model it offers."""
    against: Literal["teacher", "references", "before", "distilled"] = "teacher"
    """Whose answers the student's are set beside: distilled is the student before preference tuning."""
    verdict: Annotated[VerdictBy, LATER] = "text"
    """How the judge is read: as [[A]] in its reasons, or by the log-probabilities of one letter."""
    concurrency: Annotated[Count, NEUTRAL] = 8
    timeout_s: Annotated[Positive, NEUTRAL] = 120.0
    retries: Annotated[int, Field(ge=0), NEUTRAL] = 5
    api_key_env: Annotated[str | None, NEUTRAL] = None
    """Environment variable that holds the key; never the key itself."""
    max_new_tokens: Count = 512
    """Length of a judgement in text."""
    price_per_million: Annotated[tuple[NonNegative, NonNegative] | None, NEUTRAL] = None
    """Of input and output tokens, in any currency, for the estimate."""

    parts = ("after",)
    # A verdict that could not be read is none.
    rows_may_lack = True

    def needs(self) -> frozenset[Need]:
        # Not "references": some of a data set may lack theirs, and are left out.
        return frozenset({"prompts", *(("teacher", "teacher_answers") if self.against == "teacher" else ())})

    def check(self, evaluation: EvaluationContext) -> None:
        if self.against == "distilled":
            evaluation.require_preferred("evaluate.groups.judge.against")
        if self.base_url is None:
            raise LimbeckError(
                "evaluate.groups names judge, but evaluate.groups.judge.base_url is missing; give the address of an "
                "OpenAI-compatible server, such as http://localhost:8000/v1, or leave judge out of evaluate.groups"
            )
        server = self._server()
        if evaluation.evaluated:
            return
        server.check_key()
        if self.verdict == "logprobs":
            self._check_logprobs(server.hurried)

    def _check_logprobs(self, server: Server) -> None:
        try:
            self._judge(server).require_logprobs()
        except NoLogprobsError:
            raise
        except LimbeckError:
            # A server that is down now may be up when it is needed, and if it is not, that is said then.
            return

    def asks(self, evaluation: EvaluationContext) -> Iterator[AskedAnswers]:
        sampling = greedy(evaluation.settings)
        if self.against == "references":
            prompts = evaluation.prompts[: evaluation.settings.prompts]
            yield AskedAnswers(who="student", sampling=sampling, prompts=[p for p in prompts if p.known_answers])
            return
        yield AskedAnswers(who="student", sampling=sampling)
        if self.against == "teacher":
            yield AskedAnswers(who="teacher", sampling=sampling)

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        pairs = _pairs(evaluation, self.against)
        evaluation.release_teacher()
        server = self._server()
        # A server is only needed while something is left to ask.
        model = self.model or server.model(None)
        asked = questions_of(pairs, model, self.verdict)
        # Beside the scores, not among them: those are set aside when another group is added, and this cost money.
        log = JudgementLog.open(evaluation.root / "judgements.jsonl")
        every = list({question.key: question for orders in asked for question in orders}.values())
        left = [question for question in every if not log.holds(question.key, self.max_new_tokens)]
        if left:
            self._ask(evaluation, self._judge(server), log, left, known=len(every) - len(left))
        judged = [_judged(pair, orders, log, server) for pair, orders in zip(pairs, asked, strict=True)]
        rows = score_pairs(judged, _METRIC[self.against], self.verdict)
        if (warning := unread_warning(judged)) is not None:
            evaluation.console.warn(warning)
        judgements = [log.known[question.key] for question in every]
        self._write_pairs(evaluation, model, pairs, judged)
        own = sum(not judgement.greedy for judgement in judgements)
        detail: Json = {"model": model, "against": self.against}
        detail |= ({} if self.verdict == "text" else {"verdict": self.verdict}) | summarise_pairs(judged)
        return GroupResult(
            tables={"": rows}, detail=detail | {"used": used(judgements), "at_the_judges_own_temperature": own}
        )

    def _server(self) -> Server:
        assert self.base_url is not None
        return Server.at(self.base_url, self, "evaluate.groups.judge")

    def _judge(self, server: Server) -> Judge:
        model = server.model(self.model)
        return Judge(server=server, model=model, max_new_tokens=self.max_new_tokens, concurrency=self.concurrency)

    def _ask(
        self,
        evaluation: EvaluationContext,
        judge: Judge,
        log: JudgementLog,
        left: Sequence[JudgeQuestion],
        *,
        known: int,
    ) -> None:
        """Ask the questions that are left; each judgement is on disk before the next one is counted."""
        guess = estimate(left, judge.max_new_tokens)
        price = self._price(guess.input_tokens, guess.output_tokens)
        evaluation.console.say(
            f"judge: {guess.requests} requests to {judge.model} ({known} judged earlier), about "
            f"{guess.input_tokens:,} tokens to read and at most {guess.output_tokens:,} to write"
            f"{f', at most {price}' if price else ''}"
        )
        got: list[Judgement] = []
        with evaluation.console.meter("judge", known + len(left), "judgements", known) as meter:
            for judgement in judge.ask(left, answered_before=log.has_verdict_of(judge.model)):
                with evaluation.stop.deferred():
                    log.add(judgement)
                got.append(judgement)
                meter.advance(1)
                evaluation.stop.raise_if_requested()
        spent = used(got)
        price = self._price(spent["prompt_tokens"], spent["completion_tokens"])
        lacking = spent["uncounted_replies"]
        uncounted = f"; the server did not count {lacking} replies" if lacking else ""
        evaluation.console.say(
            f"judge: {spent['prompt_tokens']:,} tokens read and {spent['completion_tokens']:,} written"
            f"{f', {price}' if price else ''}{uncounted}"
        )
        if not all(judgement.greedy for judgement in got):
            evaluation.console.warn(f"{judge.model} takes no temperature, so it judges at its own and not greedily")

    def _price(self, input_tokens: int, output_tokens: int) -> str:
        """In the unit of price_per_million; empty without it."""
        if self.price_per_million is None:
            return ""
        into, out_of = self.price_per_million
        spent = (input_tokens * into + output_tokens * out_of) / 1e6
        return f"{spent:.2f} at evaluate.groups.judge.price_per_million"

    def _masked(self, evaluation: EvaluationContext, pair: AnswerPair) -> AnswerPair:
        """A pair whose answers repeat no key: neither the judge's nor that of the teacher's server."""
        for name in (self.api_key_env, *evaluation.key_names):
            pair = replace(pair, student=without_key(pair.student, name), other=without_key(pair.other, name))
        return pair

    def _write_pairs(
        self, evaluation: EvaluationContext, model: str, pairs: Sequence[AnswerPair], judged: Sequence[JudgedPair]
    ) -> None:
        """The pairs with both judgements, in the fields of FastChat's pairwise judgements, whose tools read them."""
        lines = []
        for pair, verdicts in zip((self._masked(evaluation, pair) for pair in pairs), judged, strict=True):
            line = {"question_id": pair.id, "model_1": "student", "model_2": self.against, "judge": [model]}
            for game, (opinion, winner) in enumerate(
                zip((verdicts.first, verdicts.second), _WINNERS, strict=True), start=1
            ):
                line[f"g{game}_winner"] = winner[opinion.verdict] if opinion.verdict else "error"
                line[f"g{game}_judgment"] = opinion.text
                line |= {f"g{game}_probabilities": opinion.probabilities} if opinion.probabilities else {}
            line |= {"turn": 1, "prompt": pair.request, "answer_1": pair.student, "answer_2": pair.other}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(evaluation.folder / f"{evaluation.part}.judge.pairs.jsonl", "".join(lines))


def _pairs(evaluation: EvaluationContext, against: str) -> list[AnswerPair]:
    """Pairs of answers to the prompts that both answered."""
    settings, sampling = evaluation.settings, greedy(evaluation.settings)
    prompts = evaluation.prompts[: settings.prompts]
    if against == "before" and not evaluation.trained:
        raise LimbeckError(
            "evaluate.groups.judge.against is before, but nothing was trained here, so there is no student before it; "
            "set evaluate.groups.judge.against=teacher or references"
        )
    if against == "references":
        others = _references(evaluation, prompts)
        prompts = [prompt for prompt in prompts if prompt.id in others]
        student = evaluation.texts("student", sampling, prompts)
    else:
        student = evaluation.texts("student", sampling)
        if against == "teacher":
            others = evaluation.texts("teacher", sampling)
        else:
            earlier = evaluation.before() if against == "before" else evaluation.distilled()
            others = earlier.texts("student", sampling)
    pairs = [
        AnswerPair(id=prompt.id, request=request_text(prompt), student=student[prompt.id], other=others[prompt.id])
        for prompt in prompts
        if prompt.id in student and prompt.id in others
    ]
    if not pairs:
        raise LimbeckError(
            f"none of {len(prompts)} held-out prompts fits both models with {settings.max_new_tokens} tokens "
            "of answer, so the judge has nothing to compare; lower evaluate.max_new_tokens"
        )
    return pairs


def _references(evaluation: EvaluationContext, prompts: Sequence[Prompt]) -> dict[str, str]:
    """The reference answer of each prompt that has one, the first of several."""
    found = {prompt.id: prompt.known_answers[0].strip() for prompt in prompts if prompt.known_answers}
    lacking = len(prompts) - len(found)
    if not found:
        raise LimbeckError(
            f"evaluate.groups.judge.against is references, but none of {len(prompts)} held-out prompts has one; give "
            "data with answers (prompts.fields names the field), or set evaluate.groups.judge.against=teacher"
        )
    if lacking:
        evaluation.console.warn(f"judge: {lacking} of {len(prompts)} held-out prompts have no reference; left out")
    return found


def _judged(
    pair: AnswerPair, orders: tuple[JudgeQuestion, JudgeQuestion], log: JudgementLog, server: Server
) -> JudgedPair:
    heard = [printable_judgement(log.known[question.key].opinion) for question in orders]
    # Masked here as well: the record may be one that knew no mask.
    first, second = (replace(opinion, text=without_key(opinion.text, server.api_key_env)) for opinion in heard)
    return JudgedPair(id=pair.id, first=first, second=second, lengths=(len(pair.student), len(pair.other)))
