"""The static picture: valid SVG with nothing in it that a page would strip or fetch."""

import xml.etree.ElementTree as ElementTree

from limbeck.report import write_picture
from tests.report.synthetic import RECIPE, write_run

SVG = "{http://www.w3.org/2000/svg}"


def draw(run_dir):
    return ElementTree.fromstring(write_picture(run_dir, run_dir / "out" / "picture.svg").read_text(encoding="utf-8"))


def said(tree):
    return " ".join("".join(node.itertext()) for node in tree.iter() if node.tag in (SVG + "text", SVG + "title"))


def test_it_shows_curve_and_scores(tmp_path):
    tree = draw(write_run(tmp_path / "run"))
    text = said(tree)
    for phrase in (
        "quickstart",
        "92M of 135M",
        "Training loss per token",
        "Forward KL",
        "Top-1 agreement",
        "ROUGE-L",
    ):
        assert phrase in text, phrase
    assert len([n for n in tree.iter(SVG + "rect") if n.get("fill") == "#1b5fd0"]) == 6
    assert {node.tag for node in tree.iter()} == {
        SVG + name for name in ("svg", "title", "rect", "path", "text", "tspan")
    }
    assert not [name for node in tree.iter() for name in node.attrib if "href" in name or name.startswith("on")]
    background = next(tree.iter(SVG + "rect"))
    assert background.get("fill") == "#fbfaf7"


def test_everything_lies_inside(tmp_path):
    tree = draw(write_run(tmp_path / "run"))
    for node in tree.iter(SVG + "rect"):
        x, y, width, height = (float(node.get(key, "0")) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + width <= 1000 and y + height <= 470
    for node in tree.iter(SVG + "text"):
        assert 0 <= float(node.get("x", "-1")) <= 1000 and 0 <= float(node.get("y", "-1")) <= 470


def test_half_a_run_says_what_is_missing(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    (run_dir / "scores.json").unlink()
    assert "not evaluated yet" in said(draw(run_dir))
    run_dir = write_run(tmp_path / "other", steps=30)
    (run_dir / "metrics.jsonl").unlink()
    assert "training has not logged" in said(draw(run_dir))


def test_names_are_escaped_and_an_empty_run_says_so(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    (run_dir / "recipe.resolved.yaml").write_text("name: '<script>&\"'\n")
    assert '<script>&"' in said(draw(run_dir))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.resolved.yaml").write_text(RECIPE)
    assert "not evaluated yet" in said(draw(empty)) and "training has not logged" in said(draw(empty))
