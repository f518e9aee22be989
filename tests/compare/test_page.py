"""The comparison of synthetic runs: what is ranked, what is refused, and the same numbers on page, Markdown and CSV."""

import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise

import pytest
import yaml

from limbeck.compare import write_comparison
from limbeck.compare.charts import spread
from limbeck.compare.costs import bill
from limbeck.compare.frontier import _front
from limbeck.compare.labels import arm_label, titled
from limbeck.compare.learning_curves import _between
from limbeck.compare.page import View
from limbeck.compare.runs import gather
from limbeck.compare.svg import svg_figure
from limbeck.compare.tables import MetricTables
from limbeck.evaluation.scores.bootstrap import summarise
from limbeck.evaluation.scores.files import read_rows
from limbeck.types import LimbeckError, ScoredRow
from tests.compare.compare_runs import write_arm_run, write_sweep
from tests.report.test_report import parse, words


def view_of(folders, metric=None):
    comparison = gather(folders, None, folders[0])
    return View(title="x", comparison=comparison, tables=MetricTables(comparison), metric=metric)


def text_of(page):
    return words(parse(page.read_text("utf-8")))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = write_sweep(tmp_path_factory.mktemp("sweeps") / "temperature")
    return root, write_comparison([root], root / "compare.html", title="temperature")


@pytest.fixture
def pair(tmp_path):
    """Two arms with three seeds each, far apart."""
    return [
        write_arm_run(tmp_path / f"{name}-{seed}", objective=name, seed=seed, kl=kl)
        for name, kl in (("fkl", 0.5), ("rkl", 0.9))
        for seed in (0, 1, 2)
    ]


def test_a_sweep_is_ranked_with_everything_that_became_of_it(sweep):
    root, page = sweep
    said = text_of(page)
    assert "fkl, temperature=2 leads by Forward KL with 0.776 nats/token, but is not separated from" in said
    assert "26 of 29" in said and "the loss became NaN at step 31" in said and "late, seed 0: waiting" in said
    for phrase in (
        "Fidelity and diversity",
        "objective.temperature",
        "Forward KL while training",
        "Samples",
        "1 h 03 min",
    ):
        assert phrase in said, phrase
    assert "6 runs that served to choose a setting" in said
    assert "Fewer than 3 seeds: csd, temperature=4" in said
    assert (root / "compare.md").is_file() and (root / "compare.csv").is_file()


def test_its_first_charts_are_a_picture(sweep):
    root, _ = sweep
    picture = ElementTree.fromstring((root / "compare.svg").read_text("utf-8"))
    said = " ".join(text for text in picture.itertext())
    assert "temperature" in said and "fkl" in said and "leads by Forward KL" in said
    view = view_of([root])
    assert len(view.pictured) == 2 and all(plate.title in said for plate in view.pictured)
    circles = sum(element.tag.endswith("circle") for element in picture.iter())
    assert circles >= sum(len(curve.dots) for plate in view.pictured for curve in plate.curves) > 0
    assert not any(word in (root / "compare.svg").read_text("utf-8") for word in ("<script", "http://w3", "NaN"))


def test_arms_without_a_setting_to_draw_over_are_drawn_by_rank(pair, tmp_path):
    view = view_of(pair)
    assert not view.panels and view.frontier is None
    ranked = view.pictured[0]
    assert ranked.title == "Forward KL" and "lower is better" in ranked.unit
    dots = {curve.name: curve.dots[0] for curve in ranked.curves}
    # The best on top, and at the left.
    assert dots["fkl"].y < dots["rkl"].y and dots["fkl"].x < dots["rkl"].x
    assert dots["fkl"].mark == "best" and dots["rkl"].mark == ""
    assert all(curve.bars and curve.label_at for curve in ranked.curves)


def test_a_step_that_one_run_alone_logged_is_no_spike():
    whole = dict.fromkeys(range(0, 10, 2), 1.0)
    other = {**dict.fromkeys(range(0, 10, 2), 3.0), 3: 3.0}
    assert [_between(one, 3) for one in (whole, other)] == [1.0, 3.0]
    assert _between(whole, 9) is None and _between(whole, -1) is None


def test_a_unit_that_is_too_long_for_its_chart_is_cut(sweep):
    long = replace(view_of([sweep[0]]).pictured[0], title="Loss", unit="nats " * 40)
    drawn = ElementTree.fromstring(svg_figure("x", "y", [long]))
    heading = next("".join(one.itertext()) for one in drawn.iter() if one.get("font-size") == "17")
    assert heading.startswith("Loss") and heading.endswith("…") and len(heading) <= 70


def test_it_asks_the_network_for_nothing_and_runs_no_script(sweep):
    text = sweep[1].read_text("utf-8")
    page = parse(text)
    assert all(link.startswith("#") for link in page.links) and page.handlers == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text


def test_page_and_markdown_say_the_same(sweep):
    root, page = sweep
    said = text_of(page)
    lines = [line for line in (root / "compare.md").read_text("utf-8").splitlines() if re.match(r"\| \d", line)]
    assert len(lines) == 9
    for line in lines:
        place, arm, _, mean, group, _ = (cell.strip() for cell in line.strip("| ").split(" | "))
        value, _, interval = mean.rstrip(")").partition(" (")
        assert f"{place}. {arm.replace(chr(92), '')}" in said and value in said and interval in said and group in said


def test_the_csv_is_what_the_runs_measured(sweep):
    root, _ = sweep
    rows = list(csv.DictReader((root / "compare.csv").read_text("utf-8").splitlines()))
    places = {(row["run"], row["metric"]) for row in rows}
    assert len(rows) == len(places) and {row["tuning"] for row in rows} == {"yes", "no"}
    for row in rows[:: len(rows) // 25]:
        scores = json.loads((root / row["run"] / "scores.json").read_text())["after"][row["metric"]]
        assert float(row["mean"]) == pytest.approx(scores["mean"], rel=1e-9) and int(row["n"]) == scores["n"]
        assert float(row["low"]) == pytest.approx(scores["low"], rel=1e-9)
        assert row["objective.name"] in row["arm"] and int(row["seed"]) in (0, 1, 2)


def test_arms_come_out_of_the_recipes(pair):
    comparison = gather(pair, None, pair[0])
    assert [(arm.name, [m.seed for m in arm.members]) for arm in comparison.arms] == [
        ("fkl", [0, 1, 2]),
        ("rkl", [0, 1, 2]),
    ]
    assert comparison.varied == ("objective.name",)


MANY = ("responses.source.name", "train.reduction", "evaluate.more", "prompts.more", "student.more")


def test_arms_apart_in_many_keys_are_named_as_their_recipes(tmp_path):
    def runs(names, seeds=(0, 1)):
        return [
            write_arm_run(
                tmp_path / f"{name}-{seed}",
                seed=seed,
                name=name if names else f"{name}-{seed}",
                recipe=dict.fromkeys(MANY, name),
            )
            for name in ("kd", "distillm2")
            for seed in seeds
        ]

    comparison = gather(runs(names=True), None, tmp_path)
    assert [(arm.name, len(arm.members)) for arm in comparison.arms] == [("kd", 2), ("distillm2", 2)]
    assert set(comparison.varied) == set(MANY)
    page = view_of(runs(names=True)).rankings[0]
    assert {line.arm.name for line in page.lines} == {"kd", "distillm2"}
    # A name a run, and so none for the arm.
    comparison = gather(runs(names=False), None, tmp_path)
    assert [len(arm.members) for arm in comparison.arms] == [2, 2]
    assert all("source=" in arm.name for arm in comparison.arms)


def test_one_name_for_two_recipes_tells_nothing_apart(tmp_path):
    runs = [write_arm_run(tmp_path / f"r{n}", seed=0, name="kd", recipe=dict.fromkeys(MANY, f"v{n}")) for n in range(2)]
    assert ["source=v0" in arm.name for arm in gather(runs, None, tmp_path).arms] == [True, False]


def test_the_mean_of_an_arm_is_that_of_its_runs(pair):
    ranking = view_of(pair).rankings[0]
    means = [summarise(read_rows(run / "scores" / "after.fidelity.jsonl"))["forward_kl"].mean for run in pair[:3]]
    assert ranking.lines[0].arm.name == "fkl"
    assert ranking.lines[0].estimate.mean == pytest.approx(sum(means) / 3)
    assert ranking.winner and "is the best of 2 by Forward KL" in ranking.verdict and ranking.caution == ""


def test_a_winner_needs_an_interval_without_zero(tmp_path):
    runs = [
        write_arm_run(tmp_path / f"{name}-{seed}", objective=name, seed=seed, kl=0.8)
        for name in ("fkl", "rkl")
        for seed in (0, 1, 2)
    ]
    ranking = view_of(runs).rankings[0]
    assert not ranking.winner and "No arm is separated" in ranking.verdict
    assert {line.letters for line in ranking.lines} == {"a"}


def test_one_seed_an_arm_is_said_to_be_so(pair):
    ranking = view_of([pair[0], pair[3]]).rankings[0]
    assert "one seed" in ranking.caution and "nothing is known of how far another seed" in ranking.caution


def test_a_match_is_ranked_by_the_distance_from_the_teacher(pair):
    found = next(r for r in view_of(pair, "student_entropy").rankings if r.name == "student_entropy")
    assert [line.arm.name for line in found.lines] == ["fkl", "rkl"] and found.teacher == "1.10"
    assert found.lines[0].estimate.mean > 1.1


def test_higher_is_better_where_it_is(pair):
    ranking = view_of(pair, "rouge_l").rankings[0]
    assert ranking.name == "rouge_l" and ranking.lines[0].arm.name == "fkl"
    assert ranking.lines[0].estimate.mean > ranking.lines[1].estimate.mean


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"recipe": {"evaluate.max_new_tokens": 128}}, "evaluate.max_new_tokens is 128 there, 64 elsewhere"),
        ({"recipe": {"responses.temperature": 0.1}}, "responses.temperature is 0.1 there, 0.8 elsewhere"),
        ({"examples": 40}, "other examples: 40 of 60 are the same"),
    ],
)
def test_what_was_measured_otherwise_is_listed_and_not_ranked(tmp_path, pair, changes, why):
    other = write_arm_run(tmp_path / "other", objective="js", kl=0.1, **changes)
    page = write_comparison([*pair, other], tmp_path / "compare.html", title="x")
    said = text_of(page)
    assert why in said and "is not ranked by fidelity" in said
    assert re.search(r"fkl(, \w+=[\d.]+)? is the best of 2 by Forward KL", said)
    assert "other" in (tmp_path / "compare.csv").read_text()


@pytest.mark.parametrize("table", ["nll", "gap", "recovery", "perplexity", "fidelity@teacher=a"])
def test_whatever_is_measured_on_the_held_out_responses_needs_the_same_ones(tmp_path, table):
    """The arm whose own text is sharper would win its own likelihood."""
    metric = {"gap": "gap_recovered", "recovery": "recovered", "perplexity": "perplexity"}.get(table)
    rows = [
        ScoredRow(id=str(n), weight=1.0, values={}, sums={metric: (1.0 + n, 2.0)})
        if metric
        else ScoredRow(id=str(n), weight=1.0, values={"nll": 1.0} if table == "nll" else {"forward_kl": 1.0})
        for n in range(6)
    ]
    runs = [
        write_arm_run(tmp_path / f"{n}", objective=f"o{n}", recipe={"responses.temperature": t}, tables={table: rows})
        for n, t in enumerate((0.8, 0.8, 0.1))
    ]
    apart = view_of(runs).apart
    assert [one.place.endswith("2") for one in apart] == [True]
    assert table in apart[0].tables and "responses.temperature is 0.1 there" in apart[0].why
    if table in ("nll", "perplexity"):
        # On other text the responses of the run do not count.
        groups = {"nll": {"nll": {"whose": "references"}}, "perplexity": {"perplexity": {"source": "text.jsonl"}}}
        for run in runs:
            tree = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
            tree["evaluate"]["groups"] |= groups[table]
            (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(tree))
        assert not any(table in one.tables for one in view_of(runs).apart)


def test_unread_verdicts_leave_out_prompts_and_not_runs(tmp_path):
    def judged(*unread: int) -> list[ScoredRow]:
        return [ScoredRow(id=str(n), weight=1.0, values={"win_rate": n % 3 / 2}) for n in range(20) if n not in unread]

    runs = [
        write_arm_run(tmp_path / f"{n}", objective=f"o{n}", tables={"judge": judged(*unread)})
        for n, unread in enumerate([(), (3,), (4, 5), tuple(range(4, 20))])
    ]
    view = view_of(runs, "win_rate")
    assert [(one.place.endswith("3"), one.why) for one in view.apart] == [
        (True, "it was measured on other examples: 4 of 20 are the same")
    ]
    assert "judge is compared on 17 of 20 examples: those that all runs have" in view.notes
    (ranking,) = [one for one in view.rankings if one.name == "win_rate"]
    assert len(ranking.lines) == 3


def test_another_teacher_is_seen_in_what_it_thinks_of_the_responses(tmp_path, pair):
    path = pair[0] / "scores" / "after.fidelity.jsonl"
    path.write_text(
        "".join(json.dumps(json.loads(x) | {"teacher_nll": 2.0}) + "\n" for x in path.read_text().splitlines())
    )
    assert "the teacher or the responses differ" in view_of(pair).apart[0].why


def test_unfinished_and_broken_runs_never_break_the_page(tmp_path, pair):
    (pair[0] / "scores.json").write_text('{"after": {')
    (pair[1] / "scores" / "after.fidelity.jsonl").write_text("{}\n")
    (pair[2] / "scores" / "after.rouge.jsonl").unlink()
    begun = tmp_path / "begun"
    (begun / "stages").mkdir(parents=True)
    (begun / "recipe.resolved.yaml").write_text("name: begun\nobjective: {name: tv}\n")
    (begun / "stages" / "train.json").write_text('{"stage": "train", "done": false, "seconds": 3}')
    said = text_of(write_comparison([*pair, begun], tmp_path / "compare.html", title="x"))
    assert "scores.json is not JSON" in said and "fidelity is not compared" in said
    assert "after.rouge.jsonl is missing" in said and "train was begun and is not finished" in said


def test_nothing_evaluated_yet_still_gives_a_page(tmp_path):
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        run.mkdir()
        (run / "recipe.resolved.yaml").write_text(f"name: {run.name}\nobjective: {{name: {run.name}}}\n")
    said = text_of(write_comparison(runs, tmp_path / "compare.html", title="x"))
    assert "nothing can be ranked" in said and "the student has not been evaluated" in said


def test_hostile_text_anywhere_stays_text(tmp_path):
    evil = "</style><script>boom()</script>\"'|<b onload=boom()>"
    runs = [write_arm_run(tmp_path / f"r{n}", objective=f"{evil}{n}", kl=0.5 + n) for n in range(2)]
    (runs[0] / "samples.jsonl").write_text(json.dumps({"prompt": evil, "teacher": evil, "after": evil}))
    (runs[1] / "stages" / "train.json").write_text(json.dumps({"stage": evil, "seconds": 3, "done": False}))
    page = write_comparison(runs, tmp_path / "compare.html", title=evil)
    parsed = parse(page.read_text("utf-8"))
    assert "script" not in parsed.tags and parsed.handlers == []
    assert "<script>" not in (tmp_path / "compare.md").read_text().replace("\\<", "")


def test_the_same_recipe_and_seed_counts_once(tmp_path, pair):
    again = write_arm_run(tmp_path / "again", objective="fkl", seed=0, kl=0.5)
    view = view_of([*pair, again])
    assert any("again" in note and "is left out" in note for note in view.notes)
    assert view.rankings[0].lines[0].estimate.seeds == 3


def test_of_a_killed_run_and_the_one_in_its_place_the_finished_one_counts(tmp_path, pair):
    killed = tmp_path / "a-killed"
    (killed / "stages").mkdir(parents=True)
    (killed / "recipe.resolved.yaml").write_text((pair[0] / "recipe.resolved.yaml").read_text())
    (killed / "stages" / "train.json").write_text('{"stage": "train", "done": false, "seconds": 3}')
    view = view_of([killed, *pair])
    assert any("a-killed" in note and "is left out" in note for note in view.notes)
    assert view.rankings[0].lines[0].estimate.seeds == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: [], "at least two"),
        (lambda p: [write_arm_run(p / "a")], "got one run"),
        (lambda p: [p / "nowhere", p], "expected a run directory"),
        (lambda p: [p / "empty"], "sweep without runs"),
        (lambda p: [p / "torn"], "arms.jsonl:1"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, make, message):
    for name, text in (("empty", ""), ("torn", '{"arm": \n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "arms.jsonl").write_text(text)
    with pytest.raises(LimbeckError, match=message):
        write_comparison(make(tmp_path), tmp_path / "compare.html", title="x")


def test_an_unknown_metric_is_refused_with_those_there_are(pair, tmp_path):
    with pytest.raises(LimbeckError, match=r"expected one that was measured: forward_kl"):
        write_comparison(pair, tmp_path / "compare.html", title="x", metric="rouge")
    assert not (tmp_path / "compare.html").exists()


def test_writing_twice_gives_the_same_bytes(pair, tmp_path):
    pages = [write_comparison(pair, tmp_path / f"{n}.html", title="x").read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (["arms/csd/seed=0"], "1 run in arms/ is not part of this sweep: arms/csd/seed=0;"),
        ([f"arms/csd/seed={n}" for n in range(9)], "9 runs in arms/ are not part of this sweep: .*seed=3 and 5 more;"),
    ],
)
def test_runs_that_a_sweep_no_longer_names_are_said(tmp_path, lost, said):
    """A grid or seeds that were changed leave finished runs behind."""
    for place in ("arms/fkl/seed=0", *lost):
        write_arm_run(tmp_path / place)
    line = {"arm": "fkl", "seed": 0, "keys": {}, "tuning": False, "state": "done", "directory": "arms/fkl/seed=0"}
    (tmp_path / "arms.jsonl").write_text(json.dumps(line) + "\n")
    page = write_comparison([tmp_path], tmp_path / "compare.html", title="x")
    for text in (text_of(page), page.with_suffix(".md").read_text("utf-8")):
        assert re.search(said, text)
    note = gather([tmp_path, tmp_path / lost[0]], None, tmp_path).notes[0]
    assert note.startswith(f"{tmp_path}: ") and re.search(said, note)


def test_lines_of_the_arms_may_be_handed_in(sweep, tmp_path):
    root, _ = sweep
    lines = [json.loads(line) for line in (root / "arms.jsonl").read_text().splitlines()]
    page = write_comparison([root / line["directory"] for line in lines], root / "again.html", title="x", arms=lines)
    assert "26 of 29" in text_of(page)


def test_sharing_is_counted_once(sweep):
    comparison = gather([sweep[0]], None, sweep[0])
    found = bill(comparison)
    whole = sum(cost.seconds for cost in found.costs) / len(found.costs)
    runs = len([m for m in [*comparison.members, *comparison.tuning] if m.run])
    assert found.spent + found.saved == pytest.approx(runs * whole, rel=1e-6) and found.saved > 0


def test_a_tuned_setting_is_no_axis_and_splits_no_line(sweep):
    view = view_of([sweep[0]])
    assert [panel.key for panel in view.panels] == ["objective.temperature"]
    assert {curve.name for curve in view.panels[0].plates[0].curves} == {"fkl", "rkl", "csd"}


def test_the_front_is_what_nothing_beats_in_both():
    class Spot:
        def __init__(self, good):
            self.good = good

    spots = [Spot((x * 7 % 11, y * 5 % 13)) for x in range(6) for y in range(6)]
    slow = {
        spot.good
        for spot in spots
        if not any(o.good != spot.good and o.good[0] >= spot.good[0] and o.good[1] >= spot.good[1] for o in spots)
    }
    assert {spot.good for spot in _front(spots)} == slow  # pyright: ignore[reportArgumentType]


def test_labels_are_moved_apart_and_no_further():
    heights = [10.0, 10.5, 50.0, 11.0, 90.0]
    placed = spread(heights, pitch=6)
    ordered = sorted(placed)
    assert all(b - a >= 6 - 1e-6 for a, b in pairwise(ordered))
    assert placed[2] == 50 and placed[4] == 90 and sum(placed[n] for n in (0, 1, 3)) == pytest.approx(31.5, abs=0.1)


def test_names_of_arms_are_short_and_clear():
    keys = {"objective.name": "csd", "objective.temperature": 2.0, "train.learning_rate": 1e-4}
    assert arm_label(keys, list(keys)) == "csd, temperature=2, learning_rate=0.0001"
    both = {"responses.temperature": 1, "objective.temperature": 2}
    assert arm_label(both, list(both)) == "responses.temperature=1, objective.temperature=2"
    assert titled("csd_ss,name=fkl,temperature=2") == "csd_ss, fkl, temperature=2"


def test_many_arms_stay_small_and_fold(tmp_path):
    runs = [
        write_arm_run(tmp_path / f"r{n}", temperature=1 + n, kl=0.5 + n / 50, examples=12, steps=30) for n in range(45)
    ]
    page = write_comparison(runs, tmp_path / "compare.html", title="x")
    text = page.read_text("utf-8")
    assert "20 more arms" in text and len(text) < 600_000
    assert text.count('class="tag ') <= 40


def test_importing_is_light():
    code = (
        "import sys, limbeck.compare\n"
        "heavy = {'torch', 'transformers', 'jinja2', 'yaml', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command(pair, tmp_path):
    command = [sys.executable, "-m", "limbeck", "compare", *map(str, pair), "--out", str(tmp_path / "c.html")]
    end = subprocess.run(command, capture_output=True, text=True, check=True)
    assert end.stdout.strip() == str(tmp_path / "c.html") and (tmp_path / "c.csv").is_file()
    end = subprocess.run([*command[:4], str(pair[0])], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert end.returncode == 2 and end.stderr.startswith("limbeck: got one run") and end.stderr.count("\n") == 1
