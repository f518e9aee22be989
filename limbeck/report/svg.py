"""The run in one static picture: the training curve beside the scores before and after.

Made for READMEs: no script, no font or style from elsewhere, and a background of its own, so that it reads on any page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from limbeck.report.curves import axis, path, smooth, thin, tight_axis
from limbeck.report.format import figure, headline, name_of, objective_text
from limbeck.report.read_run import Run, number, read_run, score, value_at
from limbeck.runtime.files import write_text

WIDTH, HEIGHT = 1000, 470
PAPER, INK, SOFT, RULE = "#fbfaf7", "#1c1f24", "#5d6570", "#e4e2dc"
BEFORE, AFTER = "#d08a2e", "#1b5fd0"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Left edge, top, width and height of the curve, then of the bars.
CURVE = (78.0, 152.0, 430.0, 240.0)
BARS = (590.0, 152.0, 362.0, 240.0)
SHOWN = ("forward_kl", "reverse_kl", "top1_agreement", "acceptance", "rouge_l")


def write_picture(run_dir: Path, path: Path) -> Path:
    """Write the picture of a run as SVG.

    Raises:
        LimbeckError: `run_dir` is not a run directory.
    """
    write_text(path, svg_chart(read_run(run_dir)))
    return path


def svg_chart(run: Run) -> str:
    """The picture as SVG text."""
    rows = [row for row in run.steps if number(row, "loss") is not None]
    metrics = [name for name in SHOWN if score(run, "before", name) or score(run, "after", name)]
    sentence = headline(run)
    body = [
        f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="14" fill="{PAPER}" stroke="{RULE}"/>',
        svg_text(36, 50, name_of(run), size=25, weight=700),
        svg_text(36, 82, sentence, size=17, fill=SOFT, most=WIDTH - 72),
        *(_curve(run, rows) if len(rows) > 1 else _absent(CURVE, "training has not logged two steps")),
        *(_bars(run, metrics) if metrics else _absent(BARS, "not evaluated yet")),
        svg_text(WIDTH - 36, HEIGHT - 18, "limbeck", size=14, fill=SOFT, anchor="end", weight=600),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="{FONT}" role="img">\n<title>{escape(name_of(run))}: {escape(sentence)}</title>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _curve(run: Run, rows: list[Mapping[str, Any]]) -> list[str]:
    left, top, width, height = CURVE
    steps, values = [float(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    across, up = tight_axis(steps), axis(values, marks=5, zero=True)
    remark = ", ".join(objective_text(run))
    parts = [_heading(left - 42, top - 26, "Training loss per token", remark)]
    for mark in up.marks:
        y = top + height * (1 - up.at(mark))
        parts.append(f'<path d="M{left},{y:.1f}h{width}" stroke="{RULE}"/>')
        parts.append(svg_text(left - 10, y + 5, f"{mark:g}", size=14, fill=SOFT, anchor="end"))
    for mark in across.marks:
        parts.append(
            svg_text(
                left + width * across.at(mark), top + height + 24, f"{mark:,.0f}", size=14, fill=SOFT, anchor="middle"
            )
        )
    parts.append(svg_text(left + width / 2, top + height + 46, "step", size=14, fill=SOFT, anchor="middle"))

    def line(series: list[float], thickness: float, opacity: float) -> str:
        points = [
            (left + width * across.at(steps[n]), top + height * (1 - up.at(series[n]))) for n in thin(series, 400)
        ]
        return (
            f'<path d="{path(points)}" fill="none" stroke="{AFTER}" stroke-width="{thickness}" opacity="{opacity}" '
            'stroke-linejoin="round" stroke-linecap="round"/>'
        )

    if len(values) < 20:
        return [*parts, line(values, 2.5, 1)]
    return [*parts, line(values, 1, 0.35), line(smooth(values, max(3, len(values) // 15)), 2.8, 1)]


def _bars(run: Run, metrics: list[str]) -> list[str]:
    left, top, _, height = BARS
    described = value_at(run.scores, "metrics") or {}
    parts = [_heading(left, top - 26, "Held-out, student against teacher", "")]
    pitch = height / max(4, len(metrics))
    longest = _longest(run, metrics, described)
    for place, name in enumerate(metrics):
        y = top + place * pitch
        about = described.get(name, {})
        unit = about.get("unit", "")
        parts.append(svg_text(left, y + pitch * 0.42, str(about.get("label", name)), size=15))
        parts.append(svg_text(left, y + pitch * 0.42 + 17, unit or "share", size=13, fill=SOFT))
        for part, colour, shift in (("before", BEFORE, 0.16), ("after", AFTER, 0.5)):
            found = score(run, part, name)
            if found:
                parts += _bar(found, colour, longest[unit], y + pitch * shift, pitch * 0.28)
    x, y = left, top + height + 46
    for label, colour in (("before training", BEFORE), ("after training", AFTER)):
        parts.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" rx="3" fill="{colour}"/>')
        parts.append(svg_text(x + 19, y, label, size=14, fill=SOFT))
        x += 142
    return parts


def _bar(found: Mapping[str, Any], colour: str, longest: float, y: float, height: float) -> list[str]:
    left, room = BARS[0] + 172, BARS[2] - 172 - 50
    length = room * max(0.0, found["mean"]) / longest
    low, high = number(found, "low"), number(found, "high")
    parts = [f'<rect x="{left}" y="{y:.1f}" width="{length:.1f}" height="{height:.1f}" rx="2.5" fill="{colour}"/>']
    end = length
    if low is not None and high is not None:
        a, b = left + room * max(0.0, low) / longest, left + room * max(0.0, high) / longest
        end = b - left
        parts.append(f'<path d="M{a:.1f},{y + height / 2:.1f}H{b:.1f}" stroke="{INK}" stroke-width="1.4"/>')
    parts.append(svg_text(left + max(end, length) + 7, y + height / 2 + 5, figure(found["mean"]), size=14, weight=600))
    return parts


def _longest(run: Run, metrics: list[str], described: Mapping[str, Any]) -> dict[str, float]:
    """Value of the full length of a bar, by unit: bars of one unit can be compared."""
    longest: dict[str, float] = {}
    for name in metrics:
        unit = described.get(name, {}).get("unit", "")
        for part in ("before", "after"):
            found = score(run, part, name)
            if found:
                reach = max(number(found, "high") or 0.0, found["mean"], 1e-9)
                longest[unit] = max(longest.get(unit, 0.0), 1.0 if unit in ("", "F1") else reach)
    return longest


def _absent(place: tuple[float, float, float, float], why: str) -> list[str]:
    left, top, width, height = place
    return [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="10" fill="none" stroke="{RULE}" '
        'stroke-dasharray="5 5"/>',
        svg_text(left + width / 2, top + height / 2, why, size=16, fill=SOFT, anchor="middle"),
    ]


def _heading(x: float, y: float, text: str, remark: str) -> str:
    tail = f'<tspan fill="{SOFT}" font-weight="400">  {escape(remark)}</tspan>' if remark else ""
    return (
        f'<text x="{x}" y="{y}" font-size="16" font-weight="600" fill="{INK}" xml:space="preserve">'
        f"{escape(text)}{tail}</text>"
    )


def svg_text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    fill: str = INK,
    anchor: str = "start",
    weight: int = 400,
    most: float | None = None,
) -> str:
    """A text element. `most` squeezes text that would be wider, by the usual width of a letter."""
    squeeze = ""
    if most is not None and len(text) * size * 0.53 > most:
        squeeze = f' textLength="{most:g}" lengthAdjust="spacingAndGlyphs"'
    return (
        f'<text x="{x:g}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" '
        f'font-weight="{weight}"{squeeze}>{escape(text)}</text>'
    )
