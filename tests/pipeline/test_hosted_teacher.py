"""Runs whose teacher is a hosted service: from answers to a student, within a budget, without a file of the teacher."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from limbeck.models.devices import fleet_of
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.hosted_cost import hosted_costs, hosted_teachers, questions_of
from limbeck.pipeline.plan.outcome import plan
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import open_teacher
from limbeck.prompts.io import read_prompts
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import read_json
from limbeck.teachers.alignment.token_bytes import TokenBytes
from limbeck.teachers.hosted import HostedTeacher
from limbeck.types import LimbeckError, Message, Prompt, Sampling, TopKSignal
from tests.limbeck_command import CommandServer, KillAt
from tests.teachers.hosted_service import MODEL, PRICE, Bill, hosted_service
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts, write_recipe

Hosted = tuple[TinyPair, str, Bill]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A student with answers to prompts; there is no teacher."""
    folder = tmp_path_factory.mktemp("pair")
    rows = [{"prompt": text, "completion": f"An answer to {text}"} for text in questions()]
    return TinyPair(
        teacher=write_model(folder / "student", layers=2), prompts=write_prompts(folder / "prompts.jsonl", rows)
    )


@pytest.fixture
def hosted(student: TinyPair) -> Iterator[Hosted]:
    with hosted_service() as (url, bill):
        yield student, url, bill


def tree_of(hosted: Hosted, output: Path, **sections: Any) -> dict[str, Any]:
    tiny, url, _ = hosted
    where = {
        "name": "api",
        "base_url": url,
        "budget_usd": 50.0,
        "price_per_million": list(PRICE),
        "retries": 0,
        "timeout_s": 20.0,
    }
    where |= sections.pop("where", {})
    tree = tiny.tree(output, **{"responses": {"source": "teacher"}, "objective": {"name": "ce"}} | sections)
    tree["teacher"] = {"model": MODEL, "cache": False, "where": where} | sections.get("teacher", {})
    tree["student"] = {"init": "pretrained", "model": str(tiny.teacher)}
    tree["evaluate"] |= {"groups": {"nll": {}, "rouge": {"against": ["references"]}}}
    tree["train"]["max_steps"] = 2
    return tree


def test_a_student_learns_from_answers_that_were_paid_for(hosted: Hosted, tmp_path: Path) -> None:
    tiny, _, bill = hosted
    bill.write = lambda asked, limit: (f"On {asked.split()[2]}.", 4, "length" if "tea" in asked else "stop")
    run = run_pipeline(load_recipe(tree_of(hosted, tmp_path / "run")), stages=STAGES)
    assert len(bill.charged) == len(questions()) and {"role": "user", "content": "What is rain?"} in [
        request["messages"][-1] for request in bill.requests
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    prompts = {row["id"]: row["text"] for row in map(json.loads, run.prompts.read_text("utf-8").splitlines())}
    for response in read_responses(run.responses / "teacher.jsonl"):
        asked = prompts[response.prompt_id]
        ended = response.stop == "eos"
        assert ended == ("tea" not in asked)
        wanted = f"On {asked.split()[2]}." + ("<|im_end|>" if ended else "")
        assert tokenizer.decode(response.response_ids).rstrip("\n") == wanted
    paid = read_json(run.root / "stages/respond.json")["paid"][MODEL]
    assert Decimal(str(paid["usd"])) == bill.total and paid["replies"] == 24 and paid["output_tokens"] == 24 * 4
    assert read_json(run.root / "provenance.json")["paid"] == {MODEL: paid}
    report = (run.root / "report.html").read_text("utf-8")
    assert f"{float(bill.total):,.2f} dollars to {MODEL} for 24 replies" in report
    about = read_json(run.student / "student.json")
    assert about["teacher_parameters"] is about["teacher_size_mb"] is about["teacher_layers"] is None


def test_training_on_the_answers_of_the_data_asks_nothing(hosted: Hosted, tmp_path: Path) -> None:
    tree = tree_of(hosted, tmp_path / "run", responses={"source": "data"}, where={"budget_usd": 0})
    run = run_pipeline(load_recipe(tree), stages=STAGES)
    assert run.report.exists() and not hosted[2].requests and "paid" not in read_json(run.root / "provenance.json")


def test_a_budget_ends_a_run_and_a_higher_one_continues_it(
    hosted: Hosted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bill = hosted[2]
    with pytest.raises(LimbeckError, match=r"budget_usd does not allow another request.*not asked again"):
        run_pipeline(load_recipe(tree_of(hosted, tmp_path / "run", where={"budget_usd": 0.6})), stages=STAGES)
    assert "the budget does not cover that" in capfd.readouterr().err and 0 < len(bill.charged) < 24
    assert bill.total <= Decimal("0.6")
    paid = read_json(tmp_path / "run/provenance.json")["paid"][MODEL]
    assert Decimal(str(paid["usd"])) == bill.total
    # Neither the budget nor the price is part of what the answers are.
    more = {"budget_usd": 30.0, "price_per_million": [900.0, 4000.0]}
    run = run_pipeline(load_recipe(tree_of(hosted, tmp_path / "run", where=more)), stages=STAGES)
    assert len(bill.charged) == 24 and run.report.exists()
    # A change that only the training reads pays for nothing; so does one of the answers that is taken back.
    tree = tree_of(hosted, tmp_path / "run", responses={"temperature": 0.5}, where=more)
    run_pipeline(load_recipe(tree), stages=STAGES, until="respond", update=True)
    assert len(bill.charged) == 48
    run_pipeline(load_recipe(tree_of(hosted, tmp_path / "run", where=more)), stages=STAGES, update=True)
    assert len(bill.charged) == 48


def test_a_killed_run_goes_on_and_pays_for_nothing_twice(
    hosted: Hosted, tmp_path: Path, limbeck: CommandServer
) -> None:
    bill = hosted[2]
    recipe = write_recipe(tmp_path / "recipe.yaml", tree_of(hosted, tmp_path / "run", where={"concurrency": 2}))
    for writes in (1, 8, 15):
        end = limbeck.run("respond", recipe, killed=KillAt(tmp_path / "run", "paid.jsonl", writes, signal.SIGKILL))
        assert end.code != 0
    assert limbeck.run("respond", recipe).code == 0
    record = read_json(tmp_path / "run/stages/respond.json")["paid"][MODEL]
    assert record["replies"] == 24 and len(bill.charged) <= 24 + record["lost_tries"]
    assert float(bill.total) <= record["usd"]


def test_the_teacher_sees_more_than_the_student(hosted: Hosted, tmp_path: Path) -> None:
    tree = tree_of(hosted, tmp_path / "run", teacher={"sees": {"name": "system", "text": "Be short."}})
    run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
    assert hosted[2].requests[0]["messages"][0] == {"role": "system", "content": "Be short."}


K = 5


def says_logprobs(tiny: TinyPair, bill: Bill, *, end: bool = False) -> dict[str, list[dict[int, float]]]:
    """Have the service say log-probabilities, made up; they by the text of the answer."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.teacher)
    said: dict[str, list[dict[int, float]]] = {}
    rng = random.Random(0)

    def entry(index: int, logp: float) -> dict[str, Any]:
        token = tokenizer.convert_ids_to_tokens(index)
        raw = None if index in tokenizer.all_special_ids else list(TokenBytes.read(tokenizer).of[index])
        return {"token": token, "logprob": logp, "bytes": raw}

    def choice(plain: dict[str, Any]) -> dict[str, Any]:
        text = plain["message"]["content"]
        ids = [*tokenizer(text)["input_ids"], *([tokenizer.eos_token_id] if end else [])]
        content, rows = [], []
        for index in ids:
            others = rng.sample([other for other in range(3, 250) if other != index], K)
            # The drawn token is one of the likeliest, or far behind them.
            among = rng.random() < 0.5
            drawn = -1.0 if among else -5.0
            row = {other: -2.0 - 0.1 * place for place, other in enumerate(others)}
            if among:
                row = {index: drawn} | {other: row[other] for other in others[:-1]}
            top = [entry(other, logp) for other, logp in row.items()]
            content.append(entry(index, drawn) | {"top_logprobs": top})
            rows.append(row | {index: drawn})
        said[text] = rows
        return plain | {"logprobs": {"content": content}}

    bill.choice = choice
    return said


def of_logprobs(hosted: Hosted, output: Path, **sections: Any) -> dict[str, Any]:
    return tree_of(
        hosted,
        output,
        **{
            "where": {"top_logprobs": K} | sections.pop("where", {}),
            "teacher": {"cache": True, "support": "topk_tail", "support_k": K},
            "objective": {"name": "fkl", "temperature": 1.0},
        }
        | sections,
    )


@pytest.mark.parametrize("end", [False, True])
def test_log_probabilities_of_its_own_answers_are_a_signal(hosted: Hosted, tmp_path: Path, end: bool) -> None:
    tiny, _, bill = hosted
    every = questions()
    bill.write = lambda asked, limit: (f"On {every.index(asked)}.", 4, "length" if "tea" in asked else "stop")
    said = says_logprobs(tiny, bill, end=end)
    recipe = load_recipe(of_logprobs(hosted, tmp_path / "run"))
    run = run_pipeline(recipe, stages=STAGES, until="train")
    context = RunContext(recipe)
    tokenizer, responses = AutoTokenizer.from_pretrained(tiny.teacher), load_responses(context, "train")
    stored = open_teacher(context)
    for row, response in responses.items():
        text = tokenizer.decode(response.response_ids, skip_special_tokens=True)
        signal = stored.signal(collate({row: response}, [row], pad_id=0))
        assert isinstance(signal, TopKSignal) and len(signal.ids_NK) == len(said[text])
        for ids, logps, whole, label in zip(
            signal.ids_NK.tolist(), signal.logp_NK.tolist(), said[text], response.label_ids, strict=True
        ):
            assert label in ids and len(set(ids)) == K
            # The naive line: the K likeliest, the drawn one in the last place where it is not among them.
            best = sorted(whole, key=lambda one: -whole[one])[:K]
            assert set(ids) == set(best if label in best else [*best[:-1], label])
            assert logps == pytest.approx([whole[one] for one in ids], abs=1e-6)
        cut = response.stop == "length"
        assert bool(response.spans) == (not end and not cut)
        assert cut or response.response_ids[-1] == tokenizer.eos_token_id
    paid = len(bill.charged)
    assert paid == len(questions()) and (run.root / "signal").exists()


def test_tokens_that_the_student_has_not_are_found_with_the_first_answer(hosted: Hosted, tmp_path: Path) -> None:
    tiny, _, bill = hosted
    says_logprobs(tiny, bill)
    honest = bill.choice

    def foreign(plain: dict[str, Any]) -> dict[str, Any]:
        choice = honest(plain)
        choice["logprobs"]["content"][0]["top_logprobs"][1] |= {"token": "Zwölf", "bytes": list("Zwölf".encode())}
        return choice

    bill.choice = foreign
    with pytest.raises(LimbeckError, match=r"the token 'Zwölf', which the student has not.*top_logprobs=0"):
        run_pipeline(load_recipe(of_logprobs(hosted, tmp_path / "run")), stages=STAGES)
    bill.choice = lambda plain: plain
    with pytest.raises(LimbeckError, match=r"gives no log-probabilities of its answer.*top_logprobs=0"):
        run_pipeline(load_recipe(of_logprobs(hosted, tmp_path / "other")), stages=STAGES)
    assert len(bill.charged) == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.support_k=7", "but teacher.support_k is 7; set teacher.support_k=5"),
        ("responses.temperature=0.5", "but responses.temperature is 0.5; set responses.temperature=1"),
        ("objective.temperature=2", "objective fkl is impossible on what teacher.where=api gives"),
        ("responses.source=data", "those of the service's own answers, and the responses are another's"),
        ("teacher.support=full", "set teacher.support=topk_tail"),
    ],
)
def test_log_probabilities_that_cannot_be_had(hosted: Hosted, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        run_pipeline(load_recipe(of_logprobs(hosted, tmp_path / "run"), [override]), stages=STAGES)
    assert said in str(caught.value) and "\n" not in str(caught.value) and not hosted[2].requests


@pytest.mark.parametrize("scored", [False, True])
def test_a_hosted_teacher_among_others(hosted: Hosted, tmp_path: Path, scored: bool) -> None:
    """Prompts about uses are the service's, the others those of a model in this process."""
    tiny, _, bill = hosted
    every = questions()
    bill.write = lambda asked, limit: (f"On {every.index(asked)}.", 4, "stop")
    said = says_logprobs(tiny, bill)
    tree = of_logprobs(hosted, tmp_path / "run") if scored else tree_of(hosted, tmp_path / "run")
    service = tree.pop("teacher")
    rest = {key: value for key, value in service.items() if key not in ("model", "where")}
    tree["teachers"] = {"local": {"model": str(tiny.teacher)} | rest, "hosted": service}
    tree["combine"] = {"name": "rule", "patterns": {"hosted": "uses"}, "otherwise": "local"}
    recipe = load_recipe(tree)
    run = run_pipeline(recipe, stages=STAGES, until="train")
    asked = [text for text in every if "uses" in text]
    assert sorted(text for text, _ in bill.charged) == sorted(asked) and run.paid("hosted").exists()
    context = RunContext(recipe)
    responses, tokenizer = load_responses(context, "train"), AutoTokenizer.from_pretrained(tiny.teacher)
    owned = {row for row, one in responses.items() if context.member_of(one.prompt_id) == "hosted"}
    texts = {row: tokenizer.decode(one.response_ids, skip_special_tokens=True) for row, one in responses.items()}
    assert owned and {row for row, text in texts.items() if text in said} == owned
    if scored:
        stored = open_teacher(context)
        for row in owned:
            signal = stored.signal(collate(responses, [row], pad_id=0))
            assert isinstance(signal, TopKSignal)
            for ids, logps, whole in zip(
                signal.ids_NK.tolist(), signal.logp_NK.tolist(), said[texts[row]], strict=True
            ):
                assert logps == pytest.approx([whole[one] for one in ids], abs=1e-6)


def test_a_service_that_continues_texts(hosted: Hosted, tmp_path: Path) -> None:
    hosted[2].write = lambda asked, limit: (" Yes.", 3, "stop")
    tree = tree_of(hosted, tmp_path / "run", where={"api": "completions"}, prompts={"template": "plain"})
    run = run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
    assert {request["prompt"] for request in hosted[2].requests} == set(questions())
    assert all(response.stop == "eos" for response in read_responses(run.responses / "teacher.jsonl"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.where.budget_usd=0", "teacher.where.budget_usd is 0, so that nothing may be asked of big-1"),
        ("teacher.where={name: api, base_url: 'http://localhost:9'}", "teacher.where.price_per_million is missing"),
        ("teacher.cache=true", "teacher.cache=true asks the teacher for its distributions, but teacher.where=api"),
        ("objective={name: fkl}", "objective fkl asks the teacher for its distributions"),
        ("responses.source=student", "teacher for its distributions"),
        ("responses.top_k=5", "responses.top_k is 5, which a hosted teacher"),
        ("responses.stop=[x]", "responses.stop is ['x'], which a hosted teacher"),
        ("teacher.where.api=completions", "continues a text, and prompts.template is auto"),
        ("student={init: depth_prune, layers: 1}", "gives answers and no weights to begin a student from"),
        ("teacher.model=base", "teacher.model=base is the student in this process; remove teacher.where"),
        ("teacher.model=small-2", "has no model 'small-2'; it offers big-1"),
        ("teacher.where.api_key_env=sk-123", "teacher.where.api_key_env is no name of an environment variable"),
        ("evaluate=[fidelity]", "evaluate.groups.fidelity asks the teacher for its distributions"),
    ],
)
def test_what_cannot_be_had_of_it_is_said_before_anything_is_paid(
    hosted: Hosted, tmp_path: Path, override: str, said: str
) -> None:
    tree = tree_of(hosted, tmp_path / "run")
    with pytest.raises(LimbeckError) as caught:
        run_pipeline(load_recipe(tree, [override]), stages=STAGES)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not hosted[2].requests and not (tmp_path / "run/paid.jsonl").exists()


def test_what_a_prompt_has_beside_text_is_named(hosted: Hosted, tmp_path: Path) -> None:
    context = RunContext(load_recipe(tree_of(hosted, tmp_path / "run")))
    (teacher,) = hosted_teachers(context).values()
    assert isinstance(teacher, HostedTeacher)

    def asked(**fields: Any) -> Any:
        answer = Message(role="assistant", content="Hm.", fields=fields)
        turns = (
            Message(role="user", content="Hi", fields={"name": "Ann"}),
            answer,
            Message(role="user", content="So?"),
        )
        return next(questions_of(context, teacher, [Prompt(id="p", messages=turns)], "chat", Sampling())).content

    assert asked(reasoning_content="so") == asked() and "Ann" not in str(asked())
    with pytest.raises(LimbeckError, match="has tool_calls in a turn of the assistant, which a hosted teacher is not"):
        asked(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])


def test_the_most_that_a_run_can_cost_is_known_before_it_asks(hosted: Hosted, tmp_path: Path) -> None:
    """Against the naive sum over the prompts, and with the attempts of best of n; nothing is asked for it."""
    _, _, bill = hosted
    recipe = load_recipe(tree_of(hosted, tmp_path / "run", where={"added_tokens": 7}))
    run = run_pipeline(recipe, stages=STAGES, until="prompts")
    prompts, context = read_prompts(run.prompts), RunContext(recipe)
    cost = hosted_costs(context, prompts)[""]
    limit = recipe.responses.max_new_tokens
    read = sum(len((prompt.text or "").encode()) + 16 for prompt in prompts)
    assert (cost.answers, cost.prompt_bytes, cost.answer_tokens) == (24, read, 24 * limit)
    reading, writing = (Decimal(str(price)) for price in PRICE)
    assert cost.usd == (reading * (read + 24 * 7) + writing * 24 * limit) / 1_000_000 and cost.budget == 50
    assert plan(recipe, fleet_of("cpu")).hosted_usd == cost.usd
    assert cost.model == MODEL and not bill.requests, "nothing was asked"
    verify = {"by": "math", "samples": 3}
    tree = tree_of(hosted, tmp_path / "best", responses={"source": "teacher", "verify": verify})
    held = sum(prompt.split == "heldout" for prompt in prompts)
    assert hosted_costs(RunContext(load_recipe(tree)), prompts)[""].answers == 3 * (24 - held) + held
    run_pipeline(recipe, stages=STAGES, until="respond")
    assert bill.total <= cost.usd
    assert hosted_costs(RunContext(recipe), prompts)[""].answers == 0, "all are paid for"
