"""The groups rouge and diversity on tiny models, against what the answers on disk say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM

import limbeck
from limbeck.evaluation.context import Who, response_text
from limbeck.evaluation.diversity import diversity
from limbeck.evaluation.group import GroupResult
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.prompts.io import read_prompts, write_prompts
from limbeck.runtime.records import sealed
from limbeck.types import LimbeckError, Sampling
from tests.evaluation.tiny_exam import EVALUATE, SEEDS, Tiny, tokenizer_of, written
from tests.tiny_pair import TinyPair, questions
from tests.tiny_pair import write_prompts as write_rows

METRIC_OF: dict[Who, str] = {"student": "rouge_l_references", "teacher": "teacher_rouge_l_references"}
PREFIX_OF: dict[Who, str] = {"student": "", "teacher": "teacher_"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.write(tmp_path_factory.mktemp("pair"))


def over(**groups: Any) -> dict[str, Any]:
    """The groups of EVALUATE with other options for some."""
    return {"groups": EVALUATE["groups"] | groups}


@pytest.fixture(scope="module")
def evaluation(pair: Tiny, tmp_path_factory: pytest.TempPathFactory) -> RunEvaluation:
    return pair.evaluation(tmp_path_factory.mktemp("exam"), {})


@pytest.fixture(scope="module")
def rouge(evaluation: RunEvaluation) -> GroupResult:
    return evaluation.settings.groups["rouge"].measure(evaluation)


@pytest.fixture(scope="module")
def spread(evaluation: RunEvaluation) -> GroupResult:
    return evaluation.settings.groups["diversity"].measure(evaluation)


def test_the_two_tokenizers_differ(pair: Tiny) -> None:
    assert tokenizer_of(pair, "student").get_vocab() != tokenizer_of(pair, "teacher").get_vocab()


def test_rouge_to_the_references_is_the_packages_own_mean_over_seeds(
    pair: Tiny, evaluation: RunEvaluation, rouge: GroupResult
) -> None:
    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    references = {p.id: p.known_answers for p in read_prompts(evaluation.context.run.prompts)}
    assert sorted(len(texts) for texts in references.values()) == [1, 1, 1, 2, 2, 2]
    rows = {row.id: row.values for row in rouge.tables[""]}
    assert rows.keys() == references.keys()
    for who, metric in METRIC_OF.items():
        tokenizer, by_seed = tokenizer_of(pair, who), []
        for seed in SEEDS:
            answers = written(evaluation, who, Sampling(max_new_tokens=8, temperature=1.0, seed=seed))
            by_seed.append(
                {
                    name: own.score_multi(references[name], response_text(one, tokenizer))["rougeL"].fmeasure
                    for name, (one,) in answers.items()
                }
            )
        for name, values in rows.items():
            assert values[metric] == pytest.approx(fmean(scores[name] for scores in by_seed), abs=1e-9)
        means = [fmean(scores.values()) for scores in by_seed]
        assert 0.0 < means[0] != means[1] > 0.0
        record = rouge.detail["references"][who]
        assert record["means"] == pytest.approx(means, abs=1e-9)
        assert record["standard_deviation"] == pytest.approx(stdev(means), abs=1e-9)
    assert rouge.detail["references"]["with_several"] == 3
    assert all(0.0 <= values["rouge_l"] <= 1.0 for values in rows.values())


def test_rows_of_diversity_are_what_the_answers_say(pair: Tiny, evaluation: RunEvaluation, spread: GroupResult) -> None:
    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    prompts = read_prompts(evaluation.context.run.prompts)[:4]
    references = {p.id: p.known_answers for p in prompts}
    assert list(spread.tables) == ["T=0", "T=0.7", "T=1"]
    assert spread.detail["rouge_beside"] == "references"
    for temperature in (0.7, 1.0):
        rows = spread.tables[f"T={temperature:g}"]
        assert [row.id for row in rows] == [p.id for p in prompts]
        for who, prefix in PREFIX_OF.items():
            tokenizer = tokenizer_of(pair, who)
            samplings = [Sampling(max_new_tokens=8, temperature=temperature, seed=5 + n) for n in range(3)]
            answers = [written(evaluation, who, sampling, logp=True) for sampling in samplings]
            for row in rows:
                texts = [response_text(found[row.id][0], tokenizer) for found in answers]
                for name, value in diversity(texts).items():
                    assert row.values[prefix + name] == pytest.approx(value, abs=1e-12)
                f1 = [own.score_multi(references[row.id], text)["rougeL"].fmeasure for text in texts]
                assert row.values[f"{prefix}sample_rouge_l"] == pytest.approx(fmean(f1), abs=1e-9)


def test_greedy_samples_are_one_answer(evaluation: RunEvaluation, spread: GroupResult) -> None:
    for row in spread.tables["T=0"]:
        for prefix in ("", "teacher_"):
            assert row.values[f"{prefix}self_bleu"] == 1.0
            assert row.values[f"{prefix}distinct_1"] <= 1 / 3
    for who in PREFIX_OF:
        answers = written(evaluation, who, Sampling(max_new_tokens=8, temperature=0.0, seed=5), logp=True)
        assert [len(found) for found in answers.values()] == [1] * 4
        assert not written(evaluation, who, Sampling(max_new_tokens=8, temperature=0.0, seed=6), logp=True)


def test_hotter_samples_differ_more(spread: GroupResult) -> None:
    def mean(condition: str, metric: str) -> float:
        return fmean(row.values[metric] for row in spread.tables[condition])

    assert mean("T=1", "self_bleu") < mean("T=0", "self_bleu")
    assert mean("T=1", "distinct_1") > mean("T=0", "distinct_1")
    corpus = spread.detail["corpus"]
    assert corpus["T=1"]["student"]["distinct_2"] > corpus["T=0"]["student"]["distinct_2"]


def test_surprise_at_the_samples_is_the_models_own_at_temperature_1(
    pair: Tiny, evaluation: RunEvaluation, spread: GroupResult
) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair.student)
    answers = [
        written(evaluation, "student", Sampling(max_new_tokens=8, temperature=0.7, seed=5 + n), logp=True)
        for n in range(3)
    ]
    for row in spread.tables["T=0.7"]:
        total, tokens = 0.0, 0
        for found in answers:
            (response,) = found[row.id]
            ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
            with torch.inference_mode():
                logp_TV = model(ids).logits[0].double().log_softmax(-1)
            start = len(response.prompt_ids)
            for place, token in enumerate(response.response_ids):
                total -= float(logp_TV[start + place - 1, token])
                tokens += 1
        assert row.values["sample_nll"] == pytest.approx(total / tokens, abs=1e-4)


def test_without_references_the_samples_stand_beside_the_teachers_greedy_answers(pair: Tiny, tmp_path: Path) -> None:
    evaluation = pair.evaluation(
        tmp_path, over(diversity={"temperatures": [0.0], "samples": 2, "prompts": 3}), answered=False
    )
    found = evaluation.settings.groups["diversity"].measure(evaluation)
    assert found.detail["rouge_beside"] == "teacher"
    # The teacher's greedy samples are the very answers they stand beside, where ROUGE-L sees anything in them.
    assert {row.values["teacher_sample_rouge_l"] for row in found.tables["T=0"]} <= {0.0, 1.0}
    assert max(row.values["teacher_sample_rouge_l"] for row in found.tables["T=0"]) == 1.0
    with pytest.raises(LimbeckError, match=r"prompts\.jsonl, line \d.*one of 6 among 6.*rouge\.against=\[teacher\]"):
        evaluation.settings.groups["rouge"].measure(evaluation)


def test_references_that_rouge_cannot_read_leave_the_rest(
    pair: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = pair.evaluation(tmp_path, over(diversity={"temperatures": [1.0], "samples": 2, "prompts": 2}))
    write_prompts(
        evaluation.context.run.prompts,
        [replace(p, completion="你好", references=()) for p in read_prompts(evaluation.context.run.prompts)],
    )
    found = evaluation.settings.groups["diversity"].measure(evaluation)
    assert found.detail["rouge_beside"] is None
    assert "sample_rouge_l is left out" in capsys.readouterr().err
    assert all("self_bleu" in row.values and "sample_rouge_l" not in row.values for row in found.tables["T=1"])
    with pytest.raises(LimbeckError, match="leave rouge out"):
        evaluation.settings.groups["rouge"].measure(evaluation)


def test_a_student_alone_has_no_teacher_to_be_measured(pair: Tiny, tmp_path: Path) -> None:
    evaluation = pair.evaluation(tmp_path, over(rouge={"against": ["references"], "seeds": [3]}), where="none")
    group = evaluation.settings.groups["rouge"]
    assert group.needs() == {"prompts", "references"}
    found = group.measure(evaluation)
    assert {name for row in found.tables[""] for name in row.values} == {"rouge_l_references"}
    assert found.detail["references"]["student"]["standard_deviation"] is None
    assert "teacher" not in found.detail["references"]
    assert not list((evaluation.folder / "answers").glob("teacher-*"))


@pytest.mark.parametrize(
    ("group", "section", "message"),
    [
        ("rouge", {"against": []}, r"evaluate\.groups\.rouge\.against is empty"),
        (
            "rouge",
            {"against": ["references"], "seeds": []},
            r"evaluate\.groups\.rouge\.seeds is \[\]; expected one or more",
        ),
        ("rouge", {"against": ["references"], "seeds": [1, 1]}, r"seeds is \[1, 1\]; expected one or more different"),
        ("rouge", {"against": ["references"], "temperature": 0.0}, r"is 0, so all 5 seeds give the same answers"),
        ("diversity", {"temperatures": []}, r"evaluate\.groups\.diversity\.temperatures is \[\]"),
        (
            "diversity",
            {"temperatures": [0.7, 0.7]},
            r"temperatures is \[0\.7, 0\.7\]; expected one or more that differ",
        ),
    ],
)
def test_settings_that_measure_nothing_are_refused_at_once(
    pair: Tiny, tmp_path: Path, group: str, section: dict[str, Any], message: str
) -> None:
    evaluation = pair.evaluation(tmp_path, over(**{group: section}))
    with pytest.raises(LimbeckError, match=message) as caught:
        evaluation.settings.groups[group].check(evaluation)
    assert "\n" not in str(caught.value)


def test_a_run_has_them_in_its_scores_and_asks_the_teacher_once(tmp_path: Path) -> None:
    tiny = TinyPair.write(tmp_path)
    write_rows(tiny.prompts, [{"instruction": text, "output": [text, "Nobody knows"]} for text in questions()])
    evaluate = EVALUATE | over(
        rouge={"against": ["references"], "seeds": list(SEEDS)},
        diversity={"temperatures": [0.7], "samples": 2, "prompts": 3},
    )
    tree = tiny.tree(tmp_path / "run", train={"max_steps": 2}, evaluate=evaluate)
    run = limbeck.run(tree)
    for part in ("before", "after", "change"):
        assert {"rouge_l_references", "self_bleu@T=0.7", "sample_rouge_l@T=0.7"} <= set(run.scores[part])
    for name in ("teacher_rouge_l_references", "teacher_self_bleu@T=0.7", "teacher_sample_nll@T=0.7"):
        assert run.scores["before"][name] == run.scores["after"][name]
    described = run.scores["metrics"]["distinct_2@T=0.7"]
    assert (described["label"], described["teacher"]) == ("Distinct-2 (T=0.7)", "teacher_distinct_2@T=0.7")
    # Two seeds of rouge and two samples of diversity.
    assert len(list((tmp_path / "run" / "scores" / "answers").glob("teacher-*.jsonl"))) == 4
    assert run.report.is_file()

    scores = tmp_path / "run" / "scores"
    kept = {name: (scores / name).read_bytes() for name in ("after.diversity@T=0.7.jsonl", "after.diversity.json")}
    for name in kept:
        (scores / name).unlink()
    answers = {path: path.stat().st_mtime_ns for path in (scores / "answers").iterdir()}
    manifest = tmp_path / "run" / "stages" / "evaluate.json"
    record = json.loads(manifest.read_text())
    # As a run that was killed leaves it; `sealed` writes the hash that belongs to it.
    manifest.write_text(json.dumps(sealed(record | {"done": False})))
    limbeck.run(tree)
    assert {name: (scores / name).read_bytes() for name in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in (scores / "answers").iterdir()} == answers
    assert math.isfinite(run.scores["after"]["sample_nll@T=0.7"]["mean"])
