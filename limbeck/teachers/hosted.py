"""A teacher behind a hosted service: nothing of it is here but its name, and every answer costs money.

It writes answers, as texts; the student reads them with its own tokenizer, which stands for the teacher's wherever one
is asked for. What is paid is never more than the budget (`hosted_account`), and no answer is paid for twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property

from limbeck.client.concurrency import concurrently
from limbeck.client.openai import Refusal, Server
from limbeck.client.replies import counted
from limbeck.teachers.base import Provision, Teacher
from limbeck.teachers.hosted_account import NOTHING, Account, BudgetExceeded, PaidReply, PaidTries, dollars, price_of
from limbeck.teachers.hosted_asking import HostedQuestion, Wording, kept_of
from limbeck.teachers.hosted_options import SECTION, OnApi
from limbeck.teachers.hosted_signal import OneToOne, ScoredAnswer
from limbeck.teachers.likeliest import at_temperature_one, vocabulary_alone
from limbeck.types import Head, LimbeckError, Signal, TokenBatch

# Statuses by which a service declines this prompt; any other refusal would meet every request.
_DECLINES_ONE = frozenset({400, 413, 422, 451})
# So many prompts without an answer before there was any are not about what was asked.
_PATIENCE = 8


@dataclass(kw_only=True)
class HostedTeacher(Teacher):
    """A teacher that answers for money; `model` names the files that stand for its own: the student's."""

    where: OnApi
    _wording: Wording = field(default_factory=Wording)

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"replies", "topk"} if self.where.top_logprobs else {"replies"})

    @property
    def head(self) -> Head:
        """The vocabulary, for hidden states of which there are none."""
        return vocabulary_alone(self.vocabulary.vocab_size, self.device)

    @property
    def service_model(self) -> str:
        """The service's name of the model."""
        assert self.model.name is not None, "set where the teacher is opened"
        return self.model.name

    @property
    def fingerprint(self) -> str:
        from limbeck.runtime.records import fingerprint

        return fingerprint({"hosted": self.service_model})

    @property
    def size(self) -> int | None:
        """Nothing is known of it."""
        return None

    @property
    def bytes_on_disk(self) -> int | None:
        """Nothing is known of it."""
        return None

    @property
    def blocks(self) -> int | None:
        """Nothing is known of it."""
        return None

    def signal(self, batch: TokenBatch) -> Signal:
        """What the service said of its own answers.

        Raises:
            LimbeckError: a response that is none of them.
        """
        import torch

        if not self.where.top_logprobs:
            raise self.lacks("topk")
        rows = [int(count) for count in batch.loss_mask_BT.sum(1)]
        answers = [
            self._answer_of(prompt, tuple(labels.tolist()))
            for prompt, labels in zip(batch.prompts, batch.labels_N.split(rows), strict=True)
        ]
        ids_NK = torch.tensor([row for one in answers for row in one.support], dtype=torch.int64, device=self.device)
        logp_NK = torch.tensor([row for one in answers for row in one.logp], device=self.device).clamp_max(0.0)
        return at_temperature_one(ids_NK, logp_NK)

    def scored(self, reply: PaidReply, name: str) -> ScoredAnswer:
        """The answer of a reply in the student's tokens, with the likeliest ones of each position.

        Raises:
            LimbeckError: the service has other tokens than the student, or says too little of one.
        """
        try:
            return self._one_to_one.answer(reply.content["tokens"])
        except ValueError as error:
            raise LimbeckError(
                f"{name}: {self.where.base_url} answers with {error}; choose a student with the tokens of "
                f"{self.service_model}, or set {SECTION}.top_logprobs=0 (with objective={{name: ce}} and "
                "teacher.cache=false) for answers alone"
            ) from None

    @cached_property
    def _one_to_one(self) -> OneToOne:
        from limbeck.teachers.alignment.token_bytes import TokenBytes

        return OneToOne(TokenBytes.read(self.tokenizer), self.where.top_logprobs)

    def _answer_of(self, prompt_id: str, labels: tuple[int, ...]) -> ScoredAnswer:
        for reply in self._scored_replies.get(prompt_id, ()):
            if (found := self.scored(reply, f"prompt {prompt_id}")).ids == labels:
                return found
        raise LimbeckError(
            f"{self.paid} has no log-probabilities of the response to prompt {prompt_id}; where its responses were "
            "taken over from another run, copy that run's file here"
        )

    @cached_property
    def _scored_replies(self) -> dict[str, list[PaidReply]]:
        """The replies to each prompt; asked for once all are there."""
        found: dict[str, list[PaidReply]] = {}
        for reply in self.account.replies.values():
            if "tokens" in reply.content:
                found.setdefault(reply.content["prompt"], []).append(reply)
        return found

    def price(self, input_tokens: int, output_tokens: int) -> Decimal:
        """The price of so many tokens in dollars.

        Raises:
            LimbeckError: the recipe names none.
        """
        if self.where.price_per_million is None:
            raise LimbeckError(
                f"{SECTION}.price_per_million is missing, without which no budget can be kept; give the service's "
                "dollars for a million tokens that it reads and writes, such as [0.15, 0.6]"
            )
        return price_of(self.where.price_per_million, input_tokens, output_tokens)

    @cached_property
    def account(self) -> Account:
        """What was paid in this run.

        Raises:
            LimbeckError: a damaged file.
        """
        assert self.paid is not None, "set where the teacher is opened"
        budget = self.where.budget_usd
        return Account.open(self.paid, None if budget is None else Decimal(str(budget)))

    def check_service(self) -> None:
        """Check budget and price, and that the service has the model; this costs nothing.

        Raises:
            LimbeckError: there is no money to ask for anything, or the service is down or lacks the model.
        """
        self.price(0, 0)
        if not self.where.budget_usd:
            said = "missing" if self.where.budget_usd is None else "0"
            raise LimbeckError(
                f"{SECTION}.budget_usd is {said}, so that nothing may be asked of {self.service_model}; set it to the "
                "dollars that this run may cost"
            )
        self.where.server().hurried.model(self.service_model)

    def most(self, question: HostedQuestion) -> Decimal:
        """The most that a question can cost."""
        tokens = question.most_input_tokens + self.where.added_tokens
        return self.price(tokens, question.sampling.max_new_tokens)

    def left(self, questions: Sequence[HostedQuestion]) -> list[int]:
        """The places of the questions that were not answered before."""
        return [place for place, one in enumerate(questions) if one.key not in self.account.replies]

    def ask(
        self, questions: Sequence[HostedQuestion], *, go_on: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, PaidReply]]:
        """The replies to questions with their places, those that were paid for before first.

        The first question goes alone: with it are found the settings that the service takes.

        Args:
            go_on: asked before each question; once it says no, what is under way is the end of it.

        Raises:
            LimbeckError: the budget does not allow another request, the service declines all of them, costs more than
                it may, or whatever `Server` raises. Replies under way are on disk and handed over first.
        """
        left = self.left(questions)
        yield from ((place, self.account.replies[questions[place].key]) for place in range(len(questions))
                    if questions[place].key in self.account.replies)  # fmt: skip
        none, answered = 0, bool(self.account.replies)
        try:
            for place, reply in self._replies(questions, left, go_on):
                answered = answered or "text" in reply.content
                none += "none" in reply.content
                if not answered and none >= min(_PATIENCE, len(left)):
                    raise LimbeckError(
                        f"{self.where.base_url} answers none of the first {none} prompts ({reply.content['none']}); "
                        "correct teacher.model, or look at the service's own account of the requests"
                    )
                yield place, reply
        except BudgetExceeded as error:
            raise self._used_up(questions, error) from None

    def _replies(
        self, questions: Sequence[HostedQuestion], left: Sequence[int], go_on: Callable[[], bool]
    ) -> Iterator[tuple[int, PaidReply]]:
        def wanted(places: Sequence[int]) -> Iterator[int]:
            for place in places:
                if not go_on():
                    return
                yield place

        def ask(place: int) -> tuple[int, PaidReply]:
            return place, self._ask(questions[place])

        yield from map(ask, wanted(left[:1]))
        yield from concurrently(ask, wanted(left[1:]), min(self.where.concurrency, len(left[1:])))

    def _ask(self, question: HostedQuestion) -> PaidReply:
        wording, most = self._wording, self.most(question)
        path = "/chat/completions" if question.api == "chat" else "/completions"
        watch = PaidTries(self.account, most)
        reply = self._server.post(path, wording.request(question), watch)
        while isinstance(reply, Refusal):
            watch.failed(perhaps_done=False)
            other = wording.instead(reply, question.sampling)
            if other is None:
                break
            wording, reply = other, self._server.post(path, other.request(question), watch)
        if isinstance(reply, Refusal):
            if reply.status not in _DECLINES_ONE:
                raise LimbeckError(
                    f"{self._server.root} declines {question.name} ({reply}); correct teacher.model or "
                    f"{SECTION}.base_url"
                )
            # It cost nothing, and is not kept: another time it may be answered.
            content = {"prompt": question.prompt_id, "none": str(reply)}
            return PaidReply(content=content, input_tokens=0, output_tokens=0, usd=NOTHING)
        self._wording = wording
        read, written = counted(reply, "prompt_tokens"), counted(reply, "completion_tokens")
        known = read is not None and written is not None
        usd = self.price(read, written) if read is not None and written is not None else most
        try:
            content = kept_of(reply, question)
        except LimbeckError:
            watch.settle(usd)
            raise
        paid = PaidReply(
            content=content,
            input_tokens=read if known else None,
            output_tokens=written if known else None,
            usd=usd,
        )
        watch.pay(question.key, paid)
        if usd > most:
            raise self._beyond(question, paid, most)
        return paid

    @cached_property
    def _server(self) -> Server:
        return self.where.server()

    def _beyond(self, question: HostedQuestion, paid: PaidReply, most: Decimal) -> LimbeckError:
        limit = question.sampling.max_new_tokens
        if (paid.output_tokens or 0) > limit:
            why = f"writes {paid.output_tokens} tokens where at most {limit} were asked for"
            remedy = "no budget can be kept with it: choose another service"
        else:
            over = (paid.input_tokens or 0) - question.most_input_tokens
            why = f"counts {paid.input_tokens} tokens in a prompt of at most {question.most_input_tokens}"
            remedy = f"set {SECTION}.added_tokens={over} or more; the same command then continues"
        return LimbeckError(
            f"{question.name}: {self.where.base_url} {why} ({dollars(paid.usd)}, set aside {dollars(most)}); {remedy}"
        )

    def _used_up(self, questions: Sequence[HostedQuestion], error: BudgetExceeded) -> LimbeckError:
        left = self.left(questions)
        rest = sum((self.most(questions[place]) for place in left), NOTHING)
        enough = self.account.spent + rest
        return LimbeckError(
            f"{SECTION}.budget_usd does not allow another request: {error} for {len(self.account.replies)} replies, "
            f"and {len(left)} prompts are left, which cost at most {dollars(rest)}; raise it (to {enough:.4g} at most) "
            f"and run the same command again: what was paid for is in {self.paid}, and is not asked again"
        )
