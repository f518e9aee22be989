"""Money of a run with a hosted teacher: what was paid, what is under way, and the replies that were paid for.

    {"sent": 7, "usd": "0.0021"}                                  before a try is sent: the most that it can cost
    {"settled": 7, "usd": "0.0004", "key": "9f3c...", "reply": {...}}   its reply and its price; without one, an error

Every line is on disk before anything follows from it. A try without a second line, such as those that a kill cut off,
may have been charged: it counts with the most that it can cost. So what is counted is never less than what is charged,
and together with what is under way it never exceeds the budget.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

from limbeck.runtime.append_log import append_to_log, damaged, read_log
from limbeck.types import Json, LimbeckError

_MILLION = 1_000_000
NOTHING = Decimal(0)


def price_of(per_million: tuple[float, float], input_tokens: int, output_tokens: int) -> Decimal:
    """The price of a request, in dollars, exactly.

    Args:
        per_million: dollars for a million tokens read, and a million written.
    """
    reading, writing = (Decimal(str(price)) for price in per_million)
    return (reading * input_tokens + writing * output_tokens) / _MILLION


def dollars(amount: Decimal) -> str:
    """An amount for people: cents, and more digits where it is less."""
    return f"${amount:,.2f}" if amount >= 1 or not amount else f"${amount:,.6f}".rstrip("0")


@dataclass(frozen=True, kw_only=True)
class PaidReply:
    """A reply that was paid for.

    Attributes:
        content: what is kept of it.
        input_tokens, output_tokens: as the service counts them; None where it does not, and the most was paid.
    """

    content: Json
    input_tokens: int | None
    output_tokens: int | None
    usd: Decimal


class BudgetExceeded(LimbeckError):
    """The next request may cost more than is left."""


@dataclass
class Account:
    """The account of a run on disk. Safe for several threads of one process; the run's lock keeps others away.

    Attributes:
        budget: dollars; None refuses every request.
        replies: those that were paid for, by the key of their question.
        spent: dollars of replies and of tries that may have been charged.
        lost: the part of `spent` for tries without a reply.
    """

    path: Path
    budget: Decimal | None
    replies: dict[str, PaidReply] = field(default_factory=dict)
    spent: Decimal = NOTHING
    lost: Decimal = NOTHING
    lost_tries: int = 0
    _open: dict[int, Decimal] = field(default_factory=dict)
    _last: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @classmethod
    def open(cls, path: Path, budget: Decimal | None) -> Account:
        """The account at a path, empty where there is none. Half a line at its end is dropped.

        Raises:
            LimbeckError: a damaged line.
        """
        account = cls(path, budget)
        sent: dict[int, Decimal] = {}
        for number, entry in read_log(path):
            try:
                usd = Decimal(entry["usd"])
                if "sent" in entry:
                    sent[entry["sent"]] = usd
                    account._last = max(account._last, entry["sent"])
                    continue
                del sent[entry["settled"]]
                account.spent += usd
                if "reply" in entry:
                    account.replies[entry["key"]] = PaidReply(
                        content=dict(entry["reply"]),
                        input_tokens=entry["input_tokens"],
                        output_tokens=entry["output_tokens"],
                        usd=usd,
                    )
                elif usd:
                    account._lose(usd)
            except (KeyError, TypeError, ValueError, InvalidOperation) as error:
                raise damaged(path, number, error) from None
        for usd in sent.values():
            account.spent += usd
            account._lose(usd)
        return account

    def _lose(self, usd: Decimal) -> None:
        self.lost, self.lost_tries = self.lost + usd, self.lost_tries + 1

    def reserve(self, most: Decimal) -> int:
        """Set money aside for a try, noted on disk; waits where what is under way may leave enough.

        Raises:
            BudgetExceeded: it will not.
        """
        with self._changed:
            while not self._affordable(most):
                if not self._open:
                    raise BudgetExceeded(f"{dollars(self.spent)} of {dollars(self.budget or NOTHING)} are spent")
                self._changed.wait()
            self._last += 1
            number = self._last
            append_to_log(self.path, {"sent": number, "usd": str(most)})
            self._open[number] = most
            return number

    def _affordable(self, most: Decimal) -> bool:
        if self.budget is None:
            return False
        return self.spent + sum(self._open.values(), NOTHING) + most <= self.budget

    def settle(self, number: int, usd: Decimal) -> None:
        """End a try that gave no reply: with nothing, or with what it may have cost."""
        with self._changed:
            append_to_log(self.path, {"settled": number, "usd": str(usd)})
            if usd:
                self._lose(usd)
            self._close(number, usd)

    def pay(self, number: int, key: str, reply: PaidReply) -> None:
        """End a try with its reply; both are on disk when this returns."""
        entry: Json = {"settled": number, "usd": str(reply.usd), "key": key, "reply": reply.content}
        with self._changed:
            counts = {"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens}
            append_to_log(self.path, entry | counts)
            self.replies[key] = reply
            self._close(number, reply.usd)

    def _close(self, number: int, usd: Decimal) -> None:
        del self._open[number]
        self.spent += usd
        self._changed.notify_all()

    def record(self) -> Json:
        """The account for manifests and reports: what was paid, and for what."""
        replies = self.replies.values()
        return {
            "usd": float(self.spent),
            "replies": len(replies),
            "input_tokens": sum(reply.input_tokens or 0 for reply in replies),
            "output_tokens": sum(reply.output_tokens or 0 for reply in replies),
            "uncounted_replies": sum(reply.input_tokens is None or reply.output_tokens is None for reply in replies),
            "lost_tries": self.lost_tries,
            "lost_usd": float(self.lost),
        }


@dataclass
class PaidTries:
    """The tries of one question (`limbeck.client.openai.TryWatch`): money is set aside before each."""

    account: Account
    most: Decimal
    number: int | None = None

    def begin(self) -> None:
        self.number = self.account.reserve(self.most)

    def failed(self, *, perhaps_done: bool) -> None:
        self.settle(self.most if perhaps_done else NOTHING)

    def settle(self, usd: Decimal) -> None:
        assert self.number is not None, "a try has begun"
        self.account.settle(self.number, usd)

    def pay(self, key: str, reply: PaidReply) -> None:
        assert self.number is not None, "a try has begun"
        self.account.pay(self.number, key, reply)
