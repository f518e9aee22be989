"""The report of a synthetic run: complete, honest about what is missing, escaped, and free of requests."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from limbeck.report import write_report
from limbeck.report.read_run import FILES, read_run
from limbeck.types import LimbeckError
from tests.report.synthetic import RECIPE, SAMPLES, write_run

VOID = {"meta", "path", "circle", "link", "img", "br", "hr", "input", "source"}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; fails on tags that do not close."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.handlers, self.text, self.open = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open)
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parse(text):
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    text = write_report(run_dir).read_text(encoding="utf-8")
    return run_dir, text, parse(text)


def words(page):
    return " ".join(" ".join(page.text).split())


def test_it_tells_the_story_of_the_run(finished):
    run_dir, _, page = finished
    said = words(page)
    scores = json.loads((run_dir / "scores.json").read_text())
    assert "92M of 135M parameters (68 %)" in said
    before, after = (scores[part]["forward_kl"]["mean"] for part in ("before", "after"))
    assert f"forward KL {before:.2f} → {after:.2f} nats/token" in said
    for phrase in ("Loss", "Learning rate", "Gradient norm", "tokens/s", "Expected acceptance", "ROUGE-L", "3.56 GiB"):
        assert phrase in said, phrase
    assert "44 held-out examples" in said
    assert "This run is not complete" not in said
    assert page.tags.count("figure") == 7 and page.tags.count("article") == len(SAMPLES)


def test_the_recipe_is_there_to_the_letter(finished):
    _, text, _ = finished
    assert f'<pre id="recipe-text">{RECIPE}</pre>' in text


def test_the_kept_blocks_are_drawn(finished):
    _, text, _ = finished
    assert len(re.findall(r'class="block kept"', text)) == 18
    assert len(re.findall(r'class="block gone"', text)) == 12
    assert "block 13: removed, taken out as number 1" in text


def test_it_asks_the_network_for_nothing(finished):
    _, text, page = finished
    assert all(link.startswith("#") for link in page.links), page.links
    assert "default-src 'none'" in text
    assert "url(" not in text and "@import" not in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", text)
    assert not {"link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert len(text) < 400_000


def test_every_text_is_escaped(finished):
    _, text, page = finished
    assert page.tags.count("script") == 2 and page.handlers == []
    assert "<script>alert" not in text and "<img" not in text
    said = " ".join(page.text)
    assert "<script>alert('strong')</script>" in said and "<img src=x onerror=alert(1)>" in said


def test_hostile_text_anywhere_stays_text(tmp_path):
    evil = "</script><script>boom()</script>\"'><b onload=boom()>"
    run_dir = write_run(tmp_path / "run", steps=30)
    for name in ("student/student.json", "provenance.json", "stages/train.json", "scores.json"):
        document = json.loads((run_dir / name).read_text())
        document |= {"criterion": evil, "stage": evil, "fingerprint": evil, evil: {evil: [evil]}}
        if name == "scores.json":
            document["metrics"]["forward_kl"] = {"label": evil, "unit": evil, "meaning": evil, "better": evil}
        (run_dir / name).write_text(json.dumps(document))
    (run_dir / "recipe.resolved.yaml").write_text(f"name: {json.dumps(evil)}\nteacher: {{model: {json.dumps(evil)}}}\n")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join(json.dumps(json.loads(x) | {"objective": evil}) for x in lines))
    page = parse(write_report(run_dir).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 2 and page.handlers == [] and "b" in page.tags


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_the_rest_stands(tmp_path, name):
    run_dir = write_run(tmp_path / "run", steps=30)
    (run_dir / name).unlink()
    said = words(parse(write_report(run_dir).read_text(encoding="utf-8")))
    assert "This run is not complete" in said
    assert f"{name} is missing" in said.replace(" is missing", " is missing")
    assert "Provenance" in said and "Stages" in said


def test_a_run_that_has_just_begun(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.resolved.yaml").write_text(RECIPE)
    said = words(parse(write_report(run_dir).read_text(encoding="utf-8")))
    assert "Nothing has been measured yet" in said
    for phrase in ("No curves", "No sample answers", "No scores yet", "No student yet", "No stage has finished"):
        assert phrase in said, phrase


def test_a_stage_cut_short_is_marked_and_the_reports_own_is_left_out(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    for stage in ("train", "report"):
        (run_dir / "stages" / f"{stage}.json").write_text(json.dumps({"stage": stage, "done": False, "seconds": 3.0}))
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert text.count("<small>not finished</small>") == 1
    assert '<th scope="row">report' not in text


def test_a_run_evaluated_only_before_training(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    scores = json.loads((run_dir / "scores.json").read_text())
    (run_dir / "scores.json").write_text(json.dumps(scores | {"after": {}, "change": {}}))
    said = words(parse(write_report(run_dir).read_text(encoding="utf-8")))
    assert "nats/token before training" in said and "▼" not in said and "▲" not in said


def test_files_cut_short_are_said_to_be_so(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    (run_dir / "scores.json").write_text('{"before": {')
    (run_dir / "provenance.json").write_text("[1, 2]")
    (run_dir / "recipe.resolved.yaml").write_text("a: [1\n")
    (run_dir / "samples.jsonl").write_bytes(b"\xff\xfe")
    said = words(parse(write_report(run_dir).read_text(encoding="utf-8")))
    assert "metrics.jsonl: line 31 left out" in said
    assert "scores.json is not JSON" in said
    assert "provenance.json holds a list" in said
    assert "recipe.resolved.yaml is not YAML" in said
    assert "samples.jsonl cannot be read" in said
    assert len(read_run(run_dir).steps) == 30


def test_rows_that_were_left_out_are_counted(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=3)
    for stage, counts in (("prompts", {"duplicates": 2, "contradicted": 1}), ("respond", {"dropped_too_long": 5})):
        path = run_dir / "stages" / f"{stage}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | counts))
    said = words(parse(write_report(run_dir).read_text(encoding="utf-8")))
    assert "rows left out" in said
    assert "2 ask what an earlier row asks, 1 of them with another answer, 5 are too long" in said


def test_answers_are_missed_only_where_they_are_compared(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=3)
    (run_dir / "samples.jsonl").unlink()
    assert "samples.jsonl" in read_run(run_dir).missing
    scores = json.loads((run_dir / "scores.json").read_text())
    del scores["after"]["rouge_l"]
    (run_dir / "scores.json").write_text(json.dumps(scores))
    assert not read_run(run_dir).missing


def test_values_of_wrong_kinds_do_not_break_the_page(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    (run_dir / "student" / "student.json").write_text(
        json.dumps({"parameters": "many", "kept_blocks": "all", "teacher_layers": None, "block_scores": [None]})
    )
    (run_dir / "scores.json").write_text(
        json.dumps(
            {"metrics": [], "before": {"forward_kl": {"mean": None}}, "after": {"forward_kl": 3, "x": {"mean": 1}}}
        )
    )
    (run_dir / "samples.jsonl").write_text('{"prompt": null}\n{"teacher": 5, "rouge_teacher": "x"}\n{}\n')
    (run_dir / "stages" / "train.json").write_text('{"seconds": null, "started": [], "tokens": "x"}')
    (run_dir / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": "2"}\n{"loss": 1}\n[]\n{"step": 3, "loss": 1}'
    )
    parse(write_report(run_dir).read_text(encoding="utf-8"))


def test_writing_twice_gives_the_same_bytes(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    assert write_report(run_dir).read_bytes() == write_report(run_dir).read_bytes()
    assert not list(run_dir.glob("*.part"))


def test_long_runs_stay_small(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=20_000)
    assert write_report(run_dir).stat().st_size < 700_000


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match="expected a run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(LimbeckError, match="expected a run directory"):
        write_report(tmp_path)


def test_importing_is_light():
    code = (
        "import sys, limbeck.report\n"
        "heavy = {'torch', 'transformers', 'jinja2', 'yaml', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
