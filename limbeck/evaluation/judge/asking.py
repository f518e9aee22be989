"""The requests that ask a judge its questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from limbeck.client.concurrency import concurrently
from limbeck.client.openai import Refusal, Server
from limbeck.client.replies import counted, short_json
from limbeck.evaluation.judge.letters import read_letters
from limbeck.evaluation.judge.log import Judgement
from limbeck.evaluation.judge.opinions import NO_USE, Opinion, no_completion, read_opinion
from limbeck.evaluation.judge.questions import JudgeQuestion
from limbeck.fields import VerdictBy
from limbeck.types import Json, LimbeckError

# Statuses by which a server declines this request; any other refusal would meet every request.
_DECLINES_ONE = frozenset({400, 413, 422, 451})
# So many refusals in a row before anything was answered, or replies in a row that are none, are not about what was
# asked. One that is none, such as an empty list of choices from a filter of contents, is about its question alone.
_PATIENCE = 8
# How many of the likeliest tokens are asked for: as many as servers give, or as those that give fewer.
_TOP_LOGPROBS = (20, 5)
# What servers call them in a refusal, in one way or another: logprobs, top_logprobs, sample logprobs.
_LOGPROBS = "logprobs"


class NoLogprobsError(LimbeckError):
    """The judge's server gives no log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class _Wording:
    """The request's settings. OpenAI's newer models take neither `max_tokens` nor a temperature.

    Attributes:
        top: how many of the likeliest tokens are asked for, where a letter is.
    """

    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    greedy: bool = True
    top: int = _TOP_LOGPROBS[0]

    def settings(self, max_new_tokens: int, verdict: VerdictBy) -> Json:
        letter: Json = {"logprobs": True, "top_logprobs": self.top} if verdict == "logprobs" else {}
        return {self.limit: max_new_tokens} | ({"temperature": 0.0} if self.greedy else {}) | letter

    def instead(self, refusal: Refusal, verdict: VerdictBy) -> _Wording | None:
        """Settings to try instead where the server refuses one by name; else None."""
        if verdict == "logprobs" and _LOGPROBS in refusal.message:
            return next((replace(self, top=fewer) for fewer in _TOP_LOGPROBS if fewer < self.top), None)
        if self.limit == "max_tokens" and "max_tokens" in refusal.message:
            return replace(self, limit="max_completion_tokens")
        if self.greedy and "temperature" in refusal.message:
            return replace(self, greedy=False)
        return None


@dataclass(kw_only=True)
class Judge:
    """A judge on a server, asked with greedy decoding where the server allows it."""

    server: Server
    model: str
    max_new_tokens: int
    concurrency: int = 8
    # Shared by the threads: what one of them found the server to take.
    _wording: _Wording = field(init=False, default_factory=_Wording)

    def ask(self, questions: Sequence[JudgeQuestion], *, answered_before: bool = False) -> Iterator[Judgement]:
        """Judgements as they come, `concurrency` questions at a time.

        Args:
            answered_before: this judge is known to take such questions, so that refusals are about what is asked.

        Raises:
            LimbeckError: whatever `Server` raises, or a refusal that would meet every request; replies that were under
                way are handed over first. Nothing but refusals at the start, or no chat completion many times in a row.
        """
        doubtful: list[Judgement] = []
        # Handed over when all have answered: one that crosses good replies may be the first of many.
        odd: list[Judgement] = []
        for judgement in concurrently(self._ask, questions, min(self.concurrency, len(questions))):
            unread = judgement.opinion.unread
            if unread not in NO_USE and (answered_before or unread != "refused"):
                answered_before = True
                odd += [one for one in doubtful if one.opinion.unread in NO_USE]
                yield from (one for one in doubtful if one.opinion.unread not in NO_USE)
                doubtful.clear()
                yield judgement
                continue
            doubtful.append(judgement)
            if len(doubtful) == min(_PATIENCE, len(questions)):
                raise self._useless(judgement)
        yield from (*odd, *doubtful)

    def _useless(self, last: Judgement) -> LimbeckError:
        """The error for a judge without any readable reply; it quotes the last one."""
        if last.opinion.unread == "odd":
            return no_completion(last.opinion.text)
        if last.opinion.unread == "bare":
            return self._no_logprobs(f"it answers {last.opinion.text[:80]!r} without them")
        return LimbeckError(
            f"{self.server.root} declines the first {_PATIENCE} requests ({last.opinion.text[:240]}); "
            f"correct {self.server.section}.model, or look at the server's log"
        )

    def require_logprobs(self) -> None:
        """See by one short question that the server gives log-probabilities.

        Raises:
            NoLogprobsError: it gives none.
            LimbeckError: whatever `Server` raises, or a refusal that would meet every request.
        """
        judgement = self._ask(
            JudgeQuestion(key="", pair_id="", student_first=True, text="Reply with one letter: A", verdict="logprobs")
        )
        if judgement.opinion.unread == "bare":
            raise self._useless(judgement)

    def _no_logprobs(self, what: str) -> NoLogprobsError:
        section = self.server.section
        return NoLogprobsError(
            f"{self.server.root} gives no log-probabilities ({what}), expected those of the reply's first token for "
            f"{section}.verdict=logprobs; let the server give them (vLLM: --max-logprobs 20), name another with "
            f"{section}.base_url, or set {section}.verdict=text"
        )

    def _ask(self, question: JudgeQuestion) -> Judgement:
        wording = self._wording
        reply = self._post(question, wording)
        while isinstance(reply, Refusal) and (other := wording.instead(reply, question.verdict)) is not None:
            wording, reply = other, self._post(question, other)
        if isinstance(reply, Refusal):
            if question.verdict == "logprobs" and _LOGPROBS in reply.message:
                raise self._no_logprobs(str(reply))
            if reply.status not in _DECLINES_ONE:
                raise LimbeckError(
                    f"{self.server.root} declines to judge ({reply}); correct {self.server.section}.model or "
                    f"{self.server.section}.base_url, or look at the server's log"
                )
            return self._judgement(question, Opinion(text=str(reply), unread="refused"), wording, {})
        self._wording = wording
        try:
            opinion = read_letters(reply) if question.verdict == "logprobs" else read_opinion(reply)
        except LimbeckError:
            opinion = Opinion(text=short_json(reply), unread="odd")
        return self._judgement(question, opinion, wording, reply)

    def _post(self, question: JudgeQuestion, wording: _Wording) -> Json | Refusal:
        body: Json = {"model": self.model, "messages": [{"role": "user", "content": question.text}]}
        limit = question.reply_tokens(self.max_new_tokens)
        return self.server.post("/chat/completions", body | wording.settings(limit, question.verdict))

    def _judgement(self, question: JudgeQuestion, opinion: Opinion, wording: _Wording, reply: Json) -> Judgement:
        return Judgement(
            key=question.key,
            pair_id=question.pair_id,
            student_first=question.student_first,
            model=self.model,
            opinion=opinion,
            max_new_tokens=question.reply_tokens(self.max_new_tokens),
            greedy=wording.greedy,
            prompt_tokens=counted(reply, "prompt_tokens"),
            completion_tokens=counted(reply, "completion_tokens"),
        )
