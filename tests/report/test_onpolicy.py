"""The report of a run on the student's own responses: curves, alarms, and what both authors wrote."""

import json
import subprocess
import sys

import pytest

from limbeck.report import write_report
from limbeck.report.charts import MIX, OWN, charts
from limbeck.report.on_policy import decoder, exchanges, warned
from limbeck.report.read_run import read_run
from limbeck.rollouts.alarms import ALARMS
from limbeck.runtime.rundir import RunDirectory
from tests.report.synthetic import ANSWERS, SAMPLES, write_on_policy, write_run
from tests.report.test_report import parse, words


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_on_policy(write_run(tmp_path_factory.mktemp("runs") / "own"))


def page_of(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8")
    return text, parse(text)


def edited(tmp_path, edit, **options):
    """A run whose lines of examples.jsonl went through `edit`."""
    run_dir = write_on_policy(write_run(tmp_path / "run", steps=40), steps=40, **options)
    path = RunDirectory(run_dir).examples
    rows = [edit(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def test_curves_stand_in_groups(run_dir):
    groups = {}
    for chart in charts(read_run(run_dir)):
        groups.setdefault(chart.group, []).append(chart.name)
    assert list(groups) == ["", OWN, MIX]
    assert groups[OWN] == [
        "responses/truncated", "responses/repeated", "responses/empty", "responses/length", "log_q/student", "kl_p99",
    ]  # fmt: skip
    assert groups[MIX] == ["share", "alpha/teacher", "alpha/student", "beta"]
    marks = {chart.name: [mark.label for mark in chart.alarms] for chart in charts(read_run(run_dir)) if chart.alarms}
    assert marks == {"responses/truncated": ["truncation"], "responses/repeated": ["repetition", "repetition"]}


def test_alarms_stand_at_the_top_of_the_training(run_dir):
    found = warned(read_run(run_dir))
    assert [(alarm.name, alarm.steps) for alarm in found] == [
        ("of_tomorrow", "step 80"), ("repetition", "step 128, again at 160"), ("truncation", "step 144"),
    ]  # fmt: skip
    assert found[0].meaning == found[0].remedy == found[0].seen == ""
    assert found[1].seen.startswith("responses/repeated ") and found[1].seen.endswith(" %")
    text, page = page_of(run_dir)
    said = words(page)
    assert ALARMS["repetition"].meaning in said and ALARMS["truncation"].remedy in said
    at = [said.index(part) for part in ("Alarms while it trained", "per token", OWN, "Responses it was trained on")]
    assert at == sorted(at)
    assert text.count('class="alarm"') == 3 and page.tags.count("figure") == 7 + 10


def test_an_alarm_that_went_off_often_names_a_few_steps(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) | {"warnings": ["empty", 3]} for line in path.read_text("utf-8").splitlines()]
    rows[0]["warnings"] = rows[1]["warnings"] = "empty"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (alarm,) = warned(read_run(run_dir))
    assert alarm.steps == "step 3, again at 4, 5, 6 …"


def test_every_alarm_has_its_words():
    for name, kind in ALARMS.items():
        assert kind.keys and kind.meaning and kind.remedy and not (kind.meaning + kind.remedy).endswith("."), name


def test_responses_of_both_authors_side_by_side(run_dir):
    found = exchanges(read_run(run_dir))
    assert [exchange.prompt for exchange in found] == [sample["prompt"] for sample in SAMPLES]
    moments = found[0].moments
    assert [when for when, _ in moments] == [
        "epoch 0.46, step 37", "epoch 0.96, step 77", "epoch 1.46, step 117", "epoch 1.96, step 157",
    ]  # fmt: skip
    assert [sorted(said) for _, said in moments] == [["student", "teacher"]] * 2 + [["student"]] + [
        ["student", "teacher"]
    ]
    first, last = moments[0][1], moments[-1][1]
    assert first["teacher"].text == ANSWERS[0] and not first["teacher"].again and last["teacher"].again
    assert first["student"].text == ANSWERS[0][:60].strip() and first["student"].remarks == ("61 tokens",)
    assert last["student"].remarks == ("1,120 tokens", "cut off", "loops") and " characters…] " in last["student"].text
    _, page = page_of(run_dir)
    said = words(page)
    assert "(empty)" in said and "(the same as before)" in said and SAMPLES[0]["prompt"] in said
    assert "#responses" in page.links


def test_authors_of_different_steps_meet_within_an_epoch(tmp_path):
    run_dir = edited(tmp_path, lambda row: row | {"step": row["step"] + (row["author"] == "teacher")})
    moments = exchanges(read_run(run_dir))[0].moments
    assert sorted(moments[0][1]) == ["student", "teacher"]


def test_many_prompts_and_moments_become_a_handful(tmp_path):
    run_dir = write_on_policy(write_run(tmp_path / "run", steps=40), steps=40)
    row = {"author": "student", "prompt_ids": [65], "response_ids": [66, 256], "stop": "eos"}
    rows = [row | {"step": n, "epoch": n, "prompt_id": f"q{p}"} for n in range(1, 40) for p in range(30)]
    rows += [row | {"step": 9, "epoch": 9, "prompt_id": "q29", "author": "data"}]
    RunDirectory(run_dir).examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = exchanges(read_run(run_dir))
    assert [len(exchange.moments) for exchange in found] == [5] * 5
    assert found[0].moments[0][0] == "epoch 1, step 1" and found[0].moments[-1][0] == "epoch 39, step 39"
    assert found[0].prompt == "A"


def test_without_a_tokenizer_the_ids_are_shown(tmp_path):
    run_dir = write_on_policy(write_run(tmp_path / "run", steps=40), steps=40, tokenizer=False)
    assert "token ids 75 101 101 112" in words(page_of(run_dir)[1])
    (run_dir / "student" / "tokenizer.json").write_text("{")
    assert decoder(run_dir)([]) == "" and decoder(run_dir)([1]).startswith("token ids 1 ")


def test_special_tokens_in_a_response_stay_visible(run_dir):
    assert decoder(run_dir)([72, 105, 256, 72]) == "Hi<|im_end|>H"


@pytest.mark.parametrize(
    "nonsense",
    [
        {"response_ids": None}, {"response_ids": [1.5]}, {"response_ids": [-1]}, {"prompt_ids": "abc"}, {"author": 3},
        {"step": "1"}, {"step": None}, {"response_ids": [2**40]},
    ],
)  # fmt: skip
def test_lines_of_wrong_kinds_are_left_out(tmp_path, nonsense):
    run_dir = edited(tmp_path, lambda row: row | nonsense)
    assert exchanges(read_run(run_dir)) == []
    assert "Responses it was trained on" not in words(page_of(run_dir)[1])


def test_harmless_oddities_are_shown(tmp_path):
    run_dir = edited(tmp_path, lambda row: row | {"epoch": None, "stop": None, "prompt_id": 5, "response_ids": [10**6]})
    (run_dir / "prompts.jsonl").write_bytes(b"\xff")
    assert "step 7" in words(page_of(run_dir)[1])


def test_what_they_wrote_is_escaped(tmp_path):
    evil = list(b"</script><script>boom()</script><b onload=boom()>")
    run_dir = edited(tmp_path, lambda row: row | {"response_ids": evil, "prompt_ids": evil, "author": "<b>"})
    (run_dir / "prompts.jsonl").unlink()
    _, page = page_of(run_dir)
    assert page.tags.count("script") == 2 and page.handlers == []
    assert "<script>boom()" in " ".join(page.text)


def test_a_run_without_any_of_it_says_nothing_of_it(tmp_path):
    text, page = page_of(write_run(tmp_path / "run", steps=30))
    said = words(page)
    for phrase in ("Alarms while", OWN, MIX, "Responses it was", "examples.jsonl"):
        assert phrase not in said, phrase
    assert 'class="alarm"' not in text and "#responses" not in page.links


def test_reading_needs_no_torch(run_dir):
    code = (
        f"import sys; from pathlib import Path; from limbeck.report import write_report; "
        f"write_report(Path({str(run_dir)!r})); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
