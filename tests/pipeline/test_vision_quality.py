"""The benchmark of students that see, cut down: what is learnt from pictures is measured, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="images need Pillow: pip install 'limbeck[vision]'")

from benchmarks.vision import Size, measure, results, table
from tests.tiny_vision import COLOURS, NUMBERS, QUESTIONS, SHAPES, scenes

SIZE = Size(taught=300, asked=90, teacher_steps=130, student_steps=60, width=32, rows=16, spread=0.08, rate=3.0e-3)


def test_a_student_learns_what_its_teacher_sees(tmp_path: Path) -> None:
    measure(tmp_path, ["fkl"], [0], SIZE, most=1)
    assert results(tmp_path).keys() == {"teacher"}
    measure(tmp_path, ["fkl"], [0], SIZE)
    found = results(tmp_path)
    # One fixed answer to each kind of question is right in a third of the cases or less.
    assert found["teacher"][0] > 0.45
    before, after = (json.loads((tmp_path / "fkl-0" / "scores.json").read_text())[part] for part in ("before", "after"))
    assert after["nll"]["mean"] < 0.9 * before["nll"]["mean"]
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("result-*.json")}
    measure(tmp_path, ["fkl"], [0], SIZE)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert "| the teacher |" in table(tmp_path) and "| fkl |" in table(tmp_path)


def test_pictures_show_what_is_asked() -> None:
    """A program that counts pixels agrees with the answers."""
    for scene in scenes(60, seed=9):
        picture = scene.draw()
        pixels = [picture.getpixel((x, y)) for y in range(picture.height) for x in range(picture.width)]
        shown = {name for name, colour in COLOURS.items() if colour in pixels}
        assert shown == {scene.colour} == {scene.answer("What colour?")}
        half = picture.width // 2
        cells = [picture.crop((x, y, x + half, y + half)) for x in (0, half) for y in (0, half)]
        filled = [[p for p in cell.get_flattened_data() if p == COLOURS[scene.colour]] for cell in cells]
        counts = [len(pixels) for pixels in filled if len(pixels) > 8]
        assert NUMBERS[len(counts) - 1] == scene.answer("How many?")
        # Squares cover their box, discs about three quarters of it, bars a third.
        side = half - 4
        share = max(counts) / side**2
        shape = "square" if share > 0.9 else "disc" if share > 0.55 else "bar"
        assert shape == scene.answer("What shape?") and shape in SHAPES
    assert len(QUESTIONS) == 3
