"""The pictures of the gallery as plain SVG: no script, no font from elsewhere, and a background of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.gallery import Fit, Shown

PAPER, INK, SOFT, RULE, TEACHER = "#fbfaf7", "#1c1f24", "#5d6570", "#dedbd3", "#d5cfc0"
LINES = (("#1b5fd0", ""), ("#c2571a", "7 3"), ("#12805c", "2 3"))
MORE_LINES = (*LINES, ("#8a3ffc", "10 3 2 3"), ("#5d6570", "4 4"), ("#b0234b", ""))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# A token is three units wide; five panels a row.
STEP, PANEL, HEIGHT, GAP, LEFT = 3, 189, 92, 20, 28
WIDTH = 2 * LEFT + 5 * PANEL + 4 * GAP
HEAD, ROW = 84, 150
COLUMNS = ("value as it slides", "push on the logits", "fitted at tau 1", "fitted at tau 2", "fitted at tau 4")


def room(name: str, teacher_V: Tensor, shown: Sequence[Shown], taus: Sequence[float]) -> str:
    """One row an objective: its value over the student's place, its gradient, and the students it ends with."""
    top = 1.12 * max(float(teacher_V.max()), *(min(0.2, float(fit.q_V.max())) for one in shown for fit in one.fits))
    area = line([0.0, *teacher_V.tolist(), 0.0], lambda y: HEIGHT * (1 - y / top), [0, *range(64), 63])
    body = [f'<defs><path id="teacher" d="{area}Z" fill="{TEACHER}"/></defs>', *legend(taus)]
    for index, one in enumerate(shown):
        y = HEAD + index * ROW
        body.append(text(LEFT, y + 16, one.exhibit.title, size=16, weight=600))
        panels = [curves(one.value_of_mean, zero=False), curves(one.push, zero=True)]
        panels += [fitted(fit, top, LINES[i]) for i, fit in enumerate(one.fits[: len(taus)])]
        for column, panel in enumerate(panels):
            x = LEFT + column * (PANEL + GAP)
            body += [f'<g transform="translate({x} {y + 26})">', *panel, "</g>"]
    return svg(WIDTH, HEAD + len(shown) * ROW + 8, f"Objectives on a toy problem: {name}", body)


def legend(taus: Sequence[float]) -> list[str]:
    parts = []
    for index, tau in enumerate(taus):
        x = LEFT + index * 124
        parts += [stroke(f"M{x} 27h34", LINES[index], 2.6), text(x + 42, 32, f"tau = {tau:g}", size=15)]
    x = LEFT + 3 * 124
    parts += [f'<rect x="{x}" y="18" width="26" height="16" fill="{TEACHER}"/>', text(x + 34, 32, "teacher", size=15)]
    for column, title in enumerate(COLUMNS):
        parts.append(text(LEFT + column * (PANEL + GAP), 68, title, size=14, fill=SOFT))
    return [*parts, f'<path d="M{LEFT} 76H{WIDTH - LEFT}" stroke="{RULE}"/>']


def curves(rows: Sequence[Tensor], zero: bool) -> list[str]:
    """One line a temperature: each on its own range, or all on one scale about zero."""
    faint = f'<g opacity=".45" transform="translate(0 {HEIGHT / 2:g}) scale(1 .5)"><use href="#teacher"/></g>'
    parts = [faint if zero else '<g opacity=".45"><use href="#teacher"/></g>']
    reach = max(float(row.abs().max()) for row in rows) or 1.0
    for row, style in reversed(list(zip(rows, LINES, strict=True))):
        low, high = (-reach, reach) if zero else (float(row.min()), float(row.max()))
        span = (high - low) or 1.0
        parts.append(stroke(line([(y - low) / span for y in row.tolist()], panel_height), style, 2))
    base = HEIGHT / 2 if zero else HEIGHT
    parts.append(f'<path d="M0 {base:g}h{PANEL}" stroke="{SOFT}" stroke-width=".8"/>')
    if zero:
        parts.append(text(0, HEIGHT + 16, f"largest {reach:.2g}", size=12.5, fill=SOFT))
    return parts


def panel_height(share: float) -> float:
    """From 0 at the panel's foot to 1 at its top, a little inside."""
    return 4 + (HEIGHT - 8) * (1 - share)


def fitted(fit: Fit, top: float, style: tuple[str, str]) -> list[str]:
    cut = [min(float(y), top) for y in fit.q_V]
    path = line(cut, lambda y: HEIGHT * (1 - y / top))
    return [
        '<use href="#teacher"/>',
        f'<path d="{path}V{HEIGHT}H0Z" fill="{style[0]}" opacity=".14"/>',
        stroke(path, (style[0], ""), 2.2),
        f'<path d="M0 {HEIGHT}h{PANEL}" stroke="{SOFT}" stroke-width=".8"/>',
        text(0, HEIGHT + 16, f"KL(p||q) {fit.forward:.2f}   KL(q||p) {fit.reverse:.2f}", size=12.5, fill=SOFT),
    ]


def line(ys: Sequence[float], place: Callable[[float], float], xs: Sequence[int] | None = None) -> str:
    """A path through the points, in steps rounded to tenths: a third shorter than coordinates."""
    xs = range(len(ys)) if xs is None else xs
    points = [(10 * STEP * x, round(10 * place(y))) for x, y in zip(xs, ys, strict=True)]
    steps = [(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in pairwise(points)]
    start = f"M{tenths(points[0][0])} {tenths(points[0][1])}l"
    return start + " ".join(f"{tenths(x)} {tenths(y)}".replace(" -", "-") for x, y in steps)


def tenths(number: int) -> str:
    sign, whole, rest = "-" * (number < 0), abs(number) // 10, abs(number) % 10
    return f"{sign}{whole or ''}.{rest}" if rest else f"{sign}{whole}"


def chart(lines: dict[str, list[tuple[float, float]]], axis: str) -> str:
    """Lines over one axis, their names at the right."""
    width, height, left, top, right, bottom = 760, 380, 62, 30, 190, 52
    points = [point for line in lines.values() for point in line]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y1 = 1.06 * max(y for _, y in points)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / (x1 - x0) * (width - left - right), height - bottom - y / y1 * (height - bottom - top)

    body = []
    for tick in [0.5 * i for i in range(int(y1 / 0.5) + 1)]:
        y = at(x0, tick)[1]
        body.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="{RULE}"/>')
        body.append(text(left - 10, y + 5, f"{tick:g}", size=13, fill=SOFT, anchor="end"))
    for tick in (x0, (x0 + x1) / 2, x1):
        body.append(text(at(tick, 0)[0], height - bottom + 20, f"{tick:g}", size=13, fill=SOFT, anchor="middle"))
    body.append(text((left + width - right) / 2, height - 10, axis, size=14, fill=SOFT, anchor="middle"))
    body.append(text(left, 20, "size of the gradient (L1), relative", size=14, fill=SOFT))
    ends = sorted((at(*line[-1])[1] + 5, name) for name, line in lines.items())
    label_y = dict(zip((name for _, name in ends), apart([y for y, _ in ends], height - bottom), strict=True))
    for (name, line), style in zip(lines.items(), MORE_LINES, strict=False):
        path = "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line))
        body.append(stroke(path, style, 2.4))
        body.append(text(width - right + 12, label_y[name], name, size=14, fill=style[0], weight=600))
    return svg(width, height, f"Size of the gradient over {axis}", body)


def apart(ys: Sequence[float], lowest: float, gap: float = 19) -> list[float]:
    """Rising places moved apart by at least `gap`, none below `lowest`."""
    placed: list[float] = []
    for y in ys:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], lowest - gap * (len(placed) - 1 - index))
    return placed


def stroke(path: str, style: tuple[str, str], width: float) -> str:
    dashes = f' stroke-dasharray="{style[1]}"' if style[1] else ""
    return (
        f'<path d="{path}" fill="none" stroke="{style[0]}" stroke-width="{width:g}" stroke-linejoin="round"{dashes}/>'
    )


def text(
    x: float, y: float, said: str, *, size: float, fill: str = INK, weight: int = 400, anchor: str = "start"
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}" font-weight="{weight}"'
    return f'<text {place} text-anchor="{anchor}" xml:space="preserve">{escape(said)}</text>'


def svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    frame = f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="12" fill="{PAPER}" stroke="{RULE}"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="{FONT}">'
    return "\n".join([head, f"<title>{escape(title)}</title>", frame, *body, "</svg>"]) + "\n"
