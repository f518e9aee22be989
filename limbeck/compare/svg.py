"""A comparison as one static picture: its first charts side by side, on a background of its own, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from limbeck.compare.charts import GREY, Drawn, Figure
from limbeck.compare.labels import short_value
from limbeck.report.charts import HEIGHT, WIDTH
from limbeck.report.svg import FONT, INK, PAPER, RULE, SOFT, svg_text

# Of the page's light colours, in its order.
COLORS = ("#0069a6", "#c9500a", "#00845f", "#a8447f", "#8a6400", "#3a8fc0", "#6a4fb3", "#5b5f66")
_GREY = "#b9bcc2"
# One chart with its margins: edges of the drawing area inside it, and the whole.
_LEFT, _TOP, _WIDE, _HIGH = 72.0, 92.0, 380.0, 250.0
_CELL, _TALL = 640.0, 430.0
# Letters of a label that fit beside the drawing area, and of title and unit above it.
_LETTERS, _HEADING = 26, 66


def svg_figure(title: str, headline: str, plates: Sequence[Figure], *, columns: int | None = None) -> str:
    """The picture as SVG text.

    Args:
        columns: charts of a row; None puts all into one.
    """
    columns = columns or max(1, len(plates))
    width, height = _CELL * columns, _TALL * max(1, -(-len(plates) // columns)) + 84
    body = [
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="14" fill="{PAPER}" stroke="{RULE}"/>',
        svg_text(36, 46, title, size=23, weight=700),
        svg_text(36, 76, short_value(headline, int((width - 72) / 8)), size=15, fill=SOFT, most=width - 72),
    ]
    for place, plate in enumerate(plates):
        down, across = divmod(place, columns)
        body += [f'<g transform="translate({across * _CELL:g} {down * _TALL + 84:g})">', *_chart(plate), "</g>"]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="{FONT}" role="img">\n<title>{escape(title)}: {escape(headline)}</title>\n'
        + "\n".join(body)
        + "\n<!-- written by limbeck compare -->\n</svg>\n"
    )


def _chart(plate: Figure) -> list[str]:
    said = short_value(plate.unit, max(4, _HEADING - len(plate.title)))
    unit = f'<tspan fill="{SOFT}" font-weight="400">  {escape(said)}</tspan>' if said else ""
    parts = [
        f'<text x="36" y="44" font-size="17" font-weight="600" fill="{INK}" xml:space="preserve">'
        f"{escape(plate.title)}{unit}</text>"
    ]
    if plate.y_label:
        parts.append(svg_text(_LEFT - 36, 70, f"↑ {plate.y_label}", size=13, fill=SOFT))
    for mark in plate.y_marks:
        y = _TOP + _HIGH * mark.at / 100
        parts.append(f'<path d="M{_LEFT:g},{y:.1f}h{_WIDE:g}" stroke="{RULE}"/>')
        parts.append(svg_text(_LEFT - 8, y + 4, mark.label, size=13, fill=SOFT, anchor="end"))
    for mark in plate.x_marks:
        x = _LEFT + _WIDE * mark.at / 100
        parts.append(svg_text(x, _TOP + _HIGH + 22, mark.label, size=13, fill=SOFT, anchor="middle"))
    parts.append(svg_text(_LEFT + _WIDE / 2, _TOP + _HIGH + 44, plate.x_label, size=13, fill=SOFT, anchor="middle"))
    # The paths are in the page's canvas, stretched to this one; lines keep their thickness.
    parts.append(
        f'<svg x="{_LEFT:g}" y="{_TOP:g}" width="{_WIDE:g}" height="{_HIGH:g}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'preserveAspectRatio="none" overflow="visible">'
    )
    if plate.front:
        parts.append(_path(plate.front, INK, 'stroke-width="1.2" stroke-dasharray="5 4"'))
    for curve in plate.curves:
        parts += _strokes(curve)
    parts.append("</svg>")
    for curve in plate.curves:
        parts += _points(curve)
    return parts


def _strokes(curve: Drawn) -> list[str]:
    colour, parts = _colour(curve), []
    if curve.band:
        parts.append(f'<path d="{curve.band}" fill="{colour}" opacity=".14"/>')
    if curve.bars:
        parts.append(_path(curve.bars, colour, 'stroke-width="1.3" opacity=".7"'))
    if curve.line:
        parts.append(_path(curve.line, colour, 'stroke-width="2"'))
    return parts


def _points(curve: Drawn) -> list[str]:
    colour, parts = _colour(curve), []
    for dot in curve.dots:
        x, y = _LEFT + _WIDE * dot.x / 100, _TOP + _HIGH * dot.y / 100
        if dot.mark in ("best", "front"):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" fill="{colour}" stroke="{PAPER}" stroke-width="1.2"/>')
        if dot.text:
            left = dot.x > 72
            parts.append(
                svg_text(
                    x + (-9 if left else 9), y - 8, dot.text, size=12, fill=colour, anchor="end" if left else "start"
                )
            )
    if curve.label_at:
        y = _TOP + _HIGH * curve.label_at[1] / 100
        parts.append(
            svg_text(_LEFT + _WIDE + 12, y + 4, short_value(curve.name, _LETTERS), size=12, fill=colour, weight=600)
        )
    return parts


def _path(d: str, colour: str, more: str) -> str:
    return f'<path d="{d}" fill="none" stroke="{colour}" vector-effect="non-scaling-stroke" {more}/>'


def _colour(curve: Drawn) -> str:
    return _GREY if curve.tone == GREY else COLORS[curve.tone % len(COLORS)]
