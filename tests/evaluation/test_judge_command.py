"""The group judge in a run and on its own: win rates, what is kept, what is asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.judge_server import JUDGE, JudgeState, always_a, answers_in, judging, lengths, longer
from tests.evaluation.odd_replies import ODD
from tests.limbeck_command import CommandServer, Finished
from tests.tiny_pair import TinyPair, write_model, write_prompts

PROMPTS = 12


@dataclass(frozen=True)
class Bench:
    """Two models beside a judge."""

    limbeck: CommandServer
    pair: TinyPair
    student: Path
    url: str
    state: JudgeState

    def arguments(self, output: Path, *overrides: str) -> list[str]:
        settings = (f"base_url={self.url}", "retries=0", "concurrency=4", "max_new_tokens=32")
        return [
            *("evaluate", str(self.student), "--teacher", str(self.pair.teacher), "--prompts", str(self.pair.prompts)),
            *(f"output_dir={output}", "evaluate.groups=[judge]", "evaluate.max_new_tokens=6"),
            *(f"evaluate.groups.judge.{setting}" for setting in settings),
            *overrides,
        ]

    def evaluate(self, output: Path, *overrides: str, **options: Any) -> Finished:
        return self.limbeck.run(*self.arguments(output, *overrides), **options)


@pytest.fixture(scope="module")
def served(limbeck: CommandServer, tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("judged")
    rows = [{"prompt": f"What is {i}?", "completion": "It is a number." * i if i else ""} for i in range(PROMPTS)]
    pair = TinyPair(teacher=tiny.teacher, prompts=write_prompts(folder / "prompts.jsonl", rows))
    with judging() as (url, state):
        yield Bench(limbeck, pair, write_model(folder / "student", layers=2, seed=3), url, state)


@pytest.fixture
def bench(served: Bench) -> Bench:
    """With a well behaved judge that prefers the longer answer."""
    for name, value in vars(JudgeState(tokenizer=served.state.tokenizer, models=[JUDGE])).items():
        setattr(served.state, name, value)
    return served


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def scores(output: Path) -> dict[str, float]:
    return {name: score["mean"] for name, score in json.loads((output / "scores.json").read_text())["after"].items()}


def detail(output: Path) -> dict[str, Any]:
    return json.loads((output / "scores/after.judge.json").read_text())["detail"]


def test_a_judge_of_length_gives_the_win_rate_that_the_lengths_give(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "run"
    end = bench.evaluate(output, "evaluate.groups.judge.price_per_million=[1000.0, 100000.0]")
    assert end.code == 0, end.stderr
    pairs = lines(output / "scores/after.judge.pairs.jsonl")
    assert len(pairs) == PROMPTS
    sides = [(len(p["answer_1"]), len(p["answer_2"])) for p in pairs]
    expected = [1.0 if s > t else 0.0 if s < t else 0.5 for s, t in sides]
    found = scores(output)
    assert found["win_rate"] == pytest.approx(sum(expected) / PROMPTS) and found["judge_consistency"] == 1.0
    assert found["judge_ties"] == pytest.approx(sum(s == t for s, t in sides) / PROMPTS)
    winners = {1.0: "model_1", 0.0: "model_2", 0.5: "tie"}
    assert [(p["g1_winner"], p["g2_winner"]) for p in pairs] == [(winners[v],) * 2 for v in expected]
    told = detail(output)
    assert told["length"]["longer_answer_wins"] == 1.0 and told["model"] == JUDGE and not told["unread"]
    asked = len(bench.state.judged)
    assert told["used"]["replies"] == asked == len(set(bench.state.judged))
    assert f"judge: {asked} requests to tiny-judge (0 judged earlier), about " in end.stderr
    assert f"at most {asked * 32:,} to write, at most " in end.stderr
    read, written = 100 * asked, 10 * asked
    price = (read * 1000 + written * 100000) / 1e6
    assert f"{read:,} tokens read and {written:,} written, {price:.2f} at evaluate.groups.judge.price" in end.stderr


def test_a_judge_that_always_says_a_is_at_par_with_itself_contradicted(bench: Bench, tmp_path: Path) -> None:
    bench.state.rule = always_a
    assert bench.evaluate(tmp_path / "run").code == 0
    assert scores(tmp_path / "run") == {"win_rate": 0.5, "judge_ties": 1.0, "judge_consistency": 0.0}
    assert detail(tmp_path / "run")["place"] == {"first": 2 * PROMPTS, "second": 0, "tie": 0}


def test_against_the_references_those_without_one_are_left_out(bench: Bench, tmp_path: Path) -> None:
    end = bench.evaluate(tmp_path / "run", "evaluate.groups.judge.against=references")
    assert end.code == 0 and "1 of 12 held-out prompts have no reference; left out" in end.stderr
    assert scores(tmp_path / "run").keys() == {"win_rate_references", "judge_ties", "judge_consistency"}
    answers = {answer for text in bench.state.judged for answer in answers_in(text)}
    assert {"It is a number." * i for i in range(1, PROMPTS)} <= answers
    bare = write_prompts(tmp_path / "bare.jsonl", [{"prompt": "Why?"}])
    end = bench.evaluate(tmp_path / "bare", "evaluate.groups.judge.against=references", f"prompts.source={bare}")
    assert "evaluate.groups.judge.against is references, but none of 1 held-out prompts has one" in end.error_line


def test_killed_and_resumed_nothing_is_asked_twice(bench: Bench, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert bench.evaluate(whole).code == 0
    bench.state.judged, bench.state.delay_s = [], 0.05
    log = output / "judgements.jsonl"
    command = bench.limbeck.start(*bench.arguments(output))
    assert command.wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") >= 6)
    command.kill()
    bench.state.settle()
    kept = lines(log)
    with log.open("ab") as file:
        file.write(b'{"key": "cut o')
    bench.state.judged, bench.state.delay_s = [], 0.0
    end = bench.evaluate(output)
    assert end.code == 0 and f"({len(kept)} judged earlier)" in end.stderr
    every = {line["key"] for line in lines(log)}
    assert len(lines(log)) == len(every) == len(kept) + len(bench.state.judged)
    for name in (
        "scores.json",
        "scores/after.judge.json",
        "scores/after.judge.jsonl",
        "scores/after.judge.pairs.jsonl",
    ):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_group_or_a_server_that_moved_costs_no_judgement(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert bench.evaluate(output).code == 0
    before, bench.state.judged = scores(output), []
    away = ("evaluate.groups.judge.base_url=http://127.0.0.1:9/v1", f"evaluate.groups.judge.model={JUDGE}", "--update")
    end = bench.evaluate(output, "evaluate.groups=[rouge, judge]", *away)
    assert end.code == 0, end.stderr
    assert not bench.state.judged and scores(output).items() > before.items()


def test_a_judge_that_fails_half_way_keeps_what_it_said(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "run"
    bench.state.faults = [*[None] * 7, *[{"status": 503}] * 9]
    assert "evaluate" not in bench.evaluate(output).error_line.split(";")[-1]
    assert len(lines(output / "judgements.jsonl")) == 7
    bench.state.judged, bench.state.faults = [], []
    assert bench.evaluate(output).code == 0
    assert len(bench.state.judged) == len(lines(output / "judgements.jsonl")) - 7


def test_what_cannot_be_read_is_warned_of_and_never_a_tie(bench: Bench, tmp_path: Path) -> None:
    bench.state.rule = lambda a, b: longer(a, b) if len(a) % 3 else "Hard to say."
    end = bench.evaluate(tmp_path / "run")
    assert end.code == 0, end.stderr
    told = detail(tmp_path / "run")
    assert 0 < told["counted"] < PROMPTS and told["unread"].keys() == {"none"}
    assert json.loads((tmp_path / "run/scores.json").read_text())["after"]["win_rate"]["n"] == told["counted"]
    left_out = PROMPTS - told["counted"]
    assert (f"for {left_out} of 12 pairs" in end.stderr) == (left_out > 0.2 * PROMPTS)
    pairs = lines(tmp_path / "run/scores/after.judge.pairs.jsonl")
    errors = [p for p in pairs if "error" in (p["g1_winner"], p["g2_winner"])]
    assert len(errors) == left_out
    # FastChat's arithmetic over such files (win_rate_adjusted): what is no error and no win for either is a tie.
    read = [p for p in pairs if p not in errors]
    wins = sum(p["g1_winner"] == p["g2_winner"] == "model_1" for p in read)
    losses = sum(p["g1_winner"] == p["g2_winner"] == "model_2" for p in read)
    adjusted = (wins + 0.5 * (len(read) - wins - losses)) / len(read)
    assert scores(tmp_path / "run")["win_rate"] == pytest.approx(adjusted)
    bench.state.rule = lambda a, b: "Hard to say."
    line = bench.evaluate(tmp_path / "silent").error_line
    assert (
        "a verdict in both orders for none of 12 pairs" in line
        and "heard 'Hard to say.', expected one of [[A]]" in line
    )


def test_before_is_the_student_that_training_began_with(bench: Bench, tiny: TinyPair, tmp_path: Path) -> None:
    judge = {"base_url": bench.url, "against": "before", "retries": 0}
    recipe = tiny.recipe(tmp_path / "run", evaluate={"groups": {"rouge": {}, "judge": judge}}, train={"max_steps": 4})
    end = bench.limbeck.run("run", recipe)
    assert end.code == 0, end.stderr
    document = json.loads((tmp_path / "run/scores.json").read_text())
    assert "win_rate_before" in document["after"] and "win_rate_before" not in document["before"]
    samples = {line["prompt"]: line for line in lines(tmp_path / "run/samples.jsonl")}
    shown = [p for p in lines(tmp_path / "run/scores/after.judge.pairs.jsonl") if p["prompt"] in samples]
    assert shown and all(p["answer_1"] == samples[p["prompt"]]["after"] for p in shown)
    assert all(p["answer_2"] == samples[p["prompt"]]["before"] for p in shown)
    line = bench.evaluate(tmp_path / "alone", "evaluate.groups.judge.against=before").error_line
    assert "evaluate.groups.judge.against is before, but nothing was trained here" in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("base_url=null", "evaluate.groups names judge, but evaluate.groups.judge.base_url is missing"),
        (
            "base_url=localhost",
            "evaluate.groups.judge.base_url is 'localhost', expected something like http://localhost:8000",
        ),
        ("base_url=http://127.0.0.1:9/v1", "cannot be reached (Connection refused); start the server, or correct eval"),
        ("api_key_env=sk-12345", "evaluate.groups.judge.api_key_env is no name of an environment variable"),
        ("api_key_env=NO_SUCH_KEY", "that evaluate.groups.judge.api_key_env names is not set; export it with the key"),
        ("model=nobody", "has no model 'nobody'; it offers tiny-judge: set evaluate.groups.judge.model"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(bench: Bench, tmp_path: Path, override: str, said: str) -> None:
    line = bench.evaluate(tmp_path / "run", f"evaluate.groups.judge.{override}").error_line
    assert said in line and "sk-12345" not in line
    assert (tmp_path / "run").exists() == (override.startswith("model") or "127" in override)


@pytest.mark.parametrize(
    ("name", "fields", "answers"),
    [
        ("alpaca_eval/alpaca_eval_text_davinci_003.jsonl", None, 803),
        ("evol_instruct/evol_inst_eval_ref.jsonl", {"prompt": "prompt", "completion": "generated_text"}, 217),
    ],
)
def test_the_fields_own_files_are_prompts_with_references(
    shared_data: Path, name: str, fields: dict[Any, str] | None, answers: int
) -> None:
    from limbeck.prompts.sources import load_prompts

    loaded = load_prompts(str(shared_data / name), heldout_fraction=1.0, fields=fields)
    assert loaded.with_completion == answers and all(p.text for p in loaded.prompts)


KEY = "sk-judge-0123456789"


def test_one_reply_that_is_no_text_and_a_key_that_is_repeated_end_nothing(bench: Bench, tmp_path: Path) -> None:
    """The odd reply is one unread pair, in this run and in those that find it in the record."""
    output, odd = tmp_path / "run", [True]

    def rule(a: str, b: str) -> str:
        half = "\ud800" if odd else ""
        odd.clear()
        return f"{half}I was asked with {KEY}. {longer(a, b)}"

    bench.state.rule, bench.state.key = rule, KEY
    settings = ("evaluate.groups.judge.api_key_env=JUDGE_KEY", "evaluate.groups.judge.concurrency=1")
    end = bench.evaluate(output, *settings, env={"JUDGE_KEY": KEY})
    assert end.code == 0, end.stderr
    told = detail(output)
    assert told["counted"] == PROMPTS - 1 and told["unread"].keys() == {"garbled"}
    assert told["unread"]["garbled"]["examples"][0]["text"].startswith("\\ud800I was asked with ***")
    pairs = lines(output / "scores/after.judge.pairs.jsonl")
    assert sum("\\ud800" in pair["g1_judgment"] + pair["g2_judgment"] for pair in pairs) == 1
    for path in [path for path in output.rglob("*") if path.is_file()]:
        assert KEY.encode() not in path.read_bytes(), path
    # The record of an earlier version: the verdict of the odd reply counted, and the key was in it.
    log, asked = output / "judgements.jsonl", len(bench.state.judged)
    kept = lines(log)
    for line in kept:
        line["opinion"]["text"] = line["opinion"]["text"].replace("***", KEY)
        if line["opinion"]["unread"]:
            line["opinion"] |= {"verdict": "A", "unread": None}
    log.write_text("".join(json.dumps(line) + "\n" for line in kept))
    end = bench.evaluate(output, *settings, "evaluate.groups=[rouge, judge]", "--update", env={"JUDGE_KEY": KEY})
    assert end.code == 0, end.stderr
    assert detail(output) == told and len(bench.state.judged) == asked
    for path in [path for path in output.glob("scores/after*") if path.is_file()]:
        assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("part", range(3))
def test_odd_replies_among_good_ones_are_counted_and_end_nothing(part: int, bench: Bench, tmp_path: Path) -> None:
    chosen = list(ODD.values())[part::3]
    bench.state.faults = [fault for body, _ in chosen for fault in (None, {"status": 200, "body": body})]
    end = bench.evaluate(tmp_path / "run", "evaluate.groups.judge.concurrency=1")
    assert end.code == 0, end.stderr
    told = detail(tmp_path / "run")
    expected = [unread for _, unread in chosen if unread]
    found = {kind: unread["replies"] for kind, unread in told["unread"].items()}
    # Equal answers are asked about once, and stand for both orders.
    assert found.keys() == set(expected) and sum(found.values()) >= len(expected)
    assert 0 < told["counted"] < PROMPTS
    report = bench.limbeck.run("report", str(tmp_path / "run"))
    assert "Traceback" not in report.stderr


LOGPROBS = "evaluate.groups.judge.verdict=logprobs"


def test_by_letters_the_win_rate_is_the_mean_probability(bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "run"
    end = bench.evaluate(output, LOGPROBS)
    assert end.code == 0, end.stderr
    asked = len(bench.state.judged)
    # One token each, and one more question before all.
    assert f"at most {asked} to write" in end.stderr and len(bench.state.requests) == asked + 1
    pairs = lines(output / "scores/after.judge.pairs.jsonl")
    expected = []
    for pair in pairs:
        own, other = pair["answer_1"], pair["answer_2"]
        one, two = (
            (p["A"] + p[" A"]) / (p["A"] + p[" A"] + p["B"]) for p in (lengths(own, other), lengths(other, own))
        )
        expected.append((one + 1 - two) / 2)
        assert pair["g1_probabilities"]["A"] == pytest.approx(0.9 * one)
        assert pair["g1_winner"] == ("model_1" if one > 0.5 else "model_2") or one == pytest.approx(0.5)
    found = scores(output)
    assert found["win_rate"] == pytest.approx(sum(expected) / PROMPTS) and 0.0 < found["win_rate"] < 1.0
    told = detail(output)
    assert told["verdict"] == "logprobs" and told["letters"]["mass"] == pytest.approx(0.9)
    # Its record serves another evaluation without a server, and none that reads verdicts in text.
    bench.state.judged = []
    away = ("evaluate.groups.judge.base_url=http://127.0.0.1:9/v1", f"evaluate.groups.judge.model={JUDGE}", "--update")
    end = bench.evaluate(output, LOGPROBS, "evaluate.groups=[rouge, judge]", *away)
    assert end.code == 0 and not bench.state.judged and scores(output)["win_rate"] == found["win_rate"]
    end = bench.evaluate(output, "evaluate.groups=[rouge, judge]", "--update")
    assert end.code == 0 and len(bench.state.judged) == asked
    assert len(lines(output / "judgements.jsonl")) == 2 * asked and "verdict" not in detail(output)


def test_a_server_without_log_probabilities_is_refused_before_anything_is_made(bench: Bench, tmp_path: Path) -> None:
    bench.state.letters = None
    line = bench.evaluate(tmp_path / "run", LOGPROBS).error_line
    assert "gives no log-probabilities" in line and "or set evaluate.groups.judge.verdict=text" in line
    assert not (tmp_path / "run").exists()
