"""A hosted teacher: no request may exceed the budget, no answer is paid for twice, whatever happens on the way."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from limbeck.teachers.base import TeacherModel
from limbeck.teachers.hosted import HostedTeacher
from limbeck.teachers.hosted_account import Account, BudgetExceeded, PaidReply
from limbeck.teachers.hosted_asking import HostedQuestion
from limbeck.teachers.hosted_options import OnApi
from limbeck.types import LimbeckError, Sampling
from tests.teachers.hosted_service import MODEL, PRICE, Bill, hosted_service

Service = tuple[str, Bill]


@pytest.fixture
def service() -> Iterator[Service]:
    with hosted_service() as found:
        yield found


def questions(count: int, **sampling: Any) -> list[HostedQuestion]:
    how = replace(Sampling(max_new_tokens=10), **sampling)
    return [
        HostedQuestion(
            prompt_id=f"p{i}",
            name=f"prompt {i}",
            model=MODEL,
            api="chat",
            content=[{"role": "user", "content": f"number {i}"}],
            sampling=how,
            seed=i,
        )
        for i in range(count)
    ]


def teacher(url: str, paid: Path, budget: float = 100.0, **options: Any) -> HostedTeacher:
    where = OnApi(
        base_url=url, budget_usd=budget, **{"price_per_million": PRICE, "retries": 0, "timeout_s": 20.0} | options
    )
    found = where.open(TeacherModel(model="files", name=MODEL), device=None, progress=None)  # type: ignore[arg-type]
    found.paid = paid
    return found


def texts(found: HostedTeacher, asked: list[HostedQuestion]) -> dict[int, str]:
    return {place: reply.content["text"] for place, reply in found.ask(asked)}


def test_what_is_counted_is_what_is_charged_and_nothing_is_asked_twice(service: Service, tmp_path: Path) -> None:
    url, bill = service
    asked, paid = questions(12), tmp_path / "paid.jsonl"
    found = teacher(url, paid)
    assert texts(found, asked[:7]) == {i: f"It is number {i}" for i in range(7)}
    assert found.account.spent == bill.total and found.account.record()["usd"] == float(bill.total)
    again = teacher(url, paid)
    assert texts(again, asked) == {i: f"It is number {i}" for i in range(12)}
    assert len(bill.requests) == 12 and again.account.spent == bill.total
    # Other settings are other questions.
    assert len(texts(again, questions(2, temperature=0.5))) == 2 and len(bill.requests) == 14


def test_a_budget_is_never_exceeded_and_a_higher_one_goes_on(service: Service, tmp_path: Path) -> None:
    url, bill = service
    bill.delay_s = 0.02
    asked, paid = questions(30), tmp_path / "paid.jsonl"
    for budget in (0.3, 0.5, 0.7):
        with pytest.raises(LimbeckError, match=r"budget_usd does not allow another request.*raise it") as caught:
            texts(teacher(url, paid, budget, concurrency=6), asked)
        assert "\n" not in str(caught.value)
        account = Account.open(paid, None)
        assert bill.total == account.spent <= Decimal(str(budget))
        # What may be left is less than the most that one request can cost.
        assert account.spent + teacher(url, paid).most(asked[0]) > Decimal(str(budget))
    assert bill.most_at_once > 1
    assert len(texts(teacher(url, paid, 20.0), asked)) == 30
    assert [text for text, _ in bill.charged].count("number 3") == 1 and len(bill.charged) == 30


@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_events_exceeds_the_budget(tmp_path: Path, seed: int) -> None:
    """Against the naive rule: what is spent and all that is under way, at its most, is at most the budget."""
    account, rng = Account.open(tmp_path / "paid.jsonl", Decimal(1)), random.Random(seed)
    watching, worst, under_way = threading.Lock(), [Decimal(0)], [Decimal(0)]

    def work(own: random.Random) -> None:
        while True:
            most = Decimal(own.randrange(1, 200)) / 1000
            try:
                number = account.reserve(most)
            except BudgetExceeded:
                return
            with watching:
                under_way[0] += most
                worst[0] = max(worst[0], account.spent + under_way[0])
            usd, end = most * own.randrange(0, 11) / 10, own.randrange(3)
            with watching:
                under_way[0] -= most
                if end:
                    reply = PaidReply(content={}, input_tokens=1, output_tokens=1, usd=usd)
                    account.pay(number, f"{number}", reply)
                else:
                    account.settle(number, usd)

    workers = [threading.Thread(target=work, args=(random.Random(rng.random()),)) for _ in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert worst[0] <= 1 and account.spent <= 1
    read = Account.open(tmp_path / "paid.jsonl", None)
    assert (read.spent, read.lost, len(read.replies)) == (account.spent, account.lost, len(account.replies))


KILLED = """
import sys
from pathlib import Path
from tests.teachers.test_hosted import questions, teacher
url, paid, budget = sys.argv[1:]
print("begun", flush=True)
for place, reply in teacher(url, Path(paid), float(budget), concurrency=4).ask(questions(300)):
    print(place, flush=True)
"""


def test_kills_at_any_time_pay_for_no_reply_twice(service: Service, tmp_path: Path) -> None:
    url, bill = service
    bill.delay_s, budget, paid, rng = 0.01, 30.0, tmp_path / "paid.jsonl", random.Random(1)
    # Texts whose reply is on disk, with how often they had been asked for by then.
    kept: dict[str, int] = {}
    root = Path(__file__).resolve().parents[2]
    for _ in range(6):
        command = [sys.executable, "-c", KILLED, url, str(paid), str(budget)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "begun\n"
            time.sleep(rng.uniform(0.02, 0.12))
            process.kill()
        while bill.now:
            time.sleep(0.005)
        asked_since = [text for text, _ in bill.charged]
        # No reply on disk is asked for again, and nothing was charged that is not counted.
        assert {text: asked_since.count(text) for text in kept} == kept
        account = Account.open(paid, None)
        now = {reply.content["text"].removeprefix("It is ") for reply in account.replies.values()}
        assert now >= kept.keys()
        kept |= {text: asked_since.count(text) for text in now - kept.keys()}
        assert bill.total <= account.spent <= Decimal(str(budget))
    asked_before = len(bill.charged)
    # Answers take longer than all kills together, so that some are left.
    assert 0 < len(kept) < 300 and asked_before < 300 + 6 * 4
    assert len(texts(teacher(url, paid, budget), questions(300))) == 300
    assert len(bill.charged) == asked_before + 300 - len(kept)


def test_a_try_that_may_have_been_charged_counts_with_the_most_it_can_cost(service: Service, tmp_path: Path) -> None:
    url, bill = service
    bill.faults = [None, "hang up", 503, 429]
    found, asked = teacher(url, tmp_path / "paid.jsonl", retries=4, concurrency=1), questions(2)
    assert len(texts(found, asked)) == 2
    record = found.account.record()
    assert record["lost_tries"] == 1 and found.account.lost == found.most(asked[1])
    assert bill.total < found.account.spent < bill.total + found.most(asked[1])


def test_a_service_that_counts_nothing_is_paid_the_most(service: Service, tmp_path: Path) -> None:
    url, bill = service
    bill.counts = False
    found, asked = teacher(url, tmp_path / "paid.jsonl"), questions(3)
    texts(found, asked)
    assert found.account.spent == sum(found.most(one) for one in asked)
    assert found.account.record()["uncounted_replies"] == 3


def test_settings_that_a_service_does_not_know(service: Service, tmp_path: Path) -> None:
    url, bill = service
    bill.unknown = ("max_tokens", "temperature", "seed")
    assert len(texts(teacher(url, tmp_path / "paid.jsonl"), questions(3))) == 3
    assert bill.requests[-1].keys() == {"model", "messages", "max_completion_tokens", "top_p"}
    with pytest.raises(LimbeckError, match=r"does not take responses\.temperature=0\.5.*set responses\.temperature=1"):
        texts(teacher(url, tmp_path / "paid.jsonl"), questions(3, temperature=0.5))


def test_prompts_without_an_answer_end_nothing_once_others_have_one(service: Service, tmp_path: Path) -> None:
    url, bill = service
    bill.faults = [None, 400, None]
    bill.write = lambda asked, limit: (None, 1, "content_filter") if asked == "number 4" else ("Yes", 1, "length")
    replies = dict(teacher(url, tmp_path / "paid.jsonl", concurrency=1).ask(questions(6)))
    assert [place for place, reply in replies.items() if "none" in reply.content] == [1, 4]
    assert replies[0].content["finish"] == "length"
    # What was paid for is kept, an answer or not; what was declined may be answered another time.
    again = dict(teacher(url, tmp_path / "paid.jsonl").ask(questions(6)))
    assert len(bill.charged) == 6 and [p for p, reply in sorted(again.items()) if "none" in reply.content] == [4]


@pytest.mark.parametrize(
    ("fault", "options", "said"),
    [
        (None, {"budget": 0.0}, "teacher.where.budget_usd is 0, so that nothing may be asked of big-1"),
        (None, {"price_per_million": None}, "teacher.where.price_per_million is missing"),
        (None, {"base_url": "http://127.0.0.1:9/v1"}, "http://127.0.0.1:9/v1 cannot be reached"),
        (404, {}, "declines prompt 0 (HTTP 404: as ordered); correct teacher.model"),
        (401, {}, "does not let us in"),
        ("every 400", {}, "answers none of the first 8 prompts (HTTP 400: as ordered)"),
        ("more input", {}, "counts 510 tokens in a prompt of at most 24"),
        ("more output", {}, "writes 99 tokens where at most 10 were asked for"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_costs_nothing_more(
    service: Service, tmp_path: Path, fault: Any, options: dict[str, Any], said: str
) -> None:
    url, bill = service
    bill.faults = [400] * 8 if fault == "every 400" else [fault] if isinstance(fault, int) else []
    bill.added_tokens = 500 if fault == "more input" else 0
    if fault == "more output":
        bill.write = lambda asked, limit: ("long", 99, "stop")
    with pytest.raises(LimbeckError) as caught:
        found = teacher(options.pop("base_url", url), tmp_path / "paid.jsonl", concurrency=1, **options)
        found.check_service()
        list(found.ask(questions(10)))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert len(bill.charged) == ("more" in str(fault))
