"""Every objective on a toy problem one can see: a teacher with two modes over 64 ordered tokens, a student with one.

    python -m benchmarks.gallery            the pictures docs/gallery/*.svg and the numbers in docs/gallery.md
    python -m benchmarks.gallery --table    the table in docs/objectives.md

The student is one discretised Gaussian, logits -(x - mean)^2 / (2 width^2), so it must choose between the modes. All
numbers come from `limbeck.objectives.token_values`, in float64, without any random draw but in `gradient_sizes`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gallery_pictures, objectives_page
from limbeck.objectives import Temperature, build_objective, token_values
from limbeck.objectives.base import TemperatureScale

DOCS = Path(__file__).resolve().parents[1] / "docs"
TAUS = (1.0, 2.0, 4.0)
TOKENS = 64
# Mean and width of the student whose gradients are drawn and whose training starts there.
START = (22.0, 5.0)
# A second student to start from, at tau 1 only: it covers both modes already.
BROAD = (31.0, 14.0)
SLIDING_WIDTH = 4.0
STEPS = 600
# Left out of the pictures, and why.
LEFT_OUT = {
    "ce": "has no teacher: on tokens drawn from the teacher it is forward KL on average",
    "hidden": "compares hidden states, not rows of logits",
    "opd": "pushes one sampled token: on tokens drawn from the student it is reverse KL on average",
    "policy_gradient": "has no teacher: it is cross-entropy times an advantage",
    "sum": "is a weighted sum of the others",
}


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One objective with options, and how the picture names it."""

    title: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def objective(self) -> Any:
        return build_objective(self.name, **self.options)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Where training ends: the student's mean and width, its distribution, and both KLs to the teacher at tau 1."""

    mean: float
    width: float
    q_V: Tensor
    forward: float
    reverse: float


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An exhibit with what is drawn of it; each list runs over `TAUS`, the fits have the one from `BROAD` last."""

    exhibit: Exhibit
    value_of_mean: list[Tensor]
    push: list[Tensor]
    fits: list[Fit]


def _csd(title: str, first: str, second: str) -> Exhibit:
    return Exhibit(title=f"CSD, {title}", name="csd", options={"first": first, "second": second})


ROOMS: dict[str, tuple[Exhibit, ...]] = {
    "kullback-leibler": (
        Exhibit(title="forward KL", name="fkl"),
        Exhibit(title="reverse KL", name="rkl"),
        Exhibit(title="symmetric KL, half of each", name="symmetric_kl"),
        Exhibit(title="Jeffreys", name="jeffreys"),
        Exhibit(title="total variation", name="tv"),
    ),
    "mixtures": (
        Exhibit(title="Jensen-Shannon, beta 0.5", name="js"),
        Exhibit(title="Jensen-Shannon, beta 0.1, normalized", name="js", options={"beta": 0.1, "form": "normalized"}),
        Exhibit(title="Jensen-Shannon, beta 0.9, normalized", name="js", options={"beta": 0.9, "form": "normalized"}),
        Exhibit(title="skew KL, alpha 0.1", name="skl"),
        Exhibit(title="skew reverse KL, alpha 0.1", name="srkl"),
    ),
    "families": (
        Exhibit(title="alpha-beta 0.2, 0.7", name="ab"),
        Exhibit(title="alpha-beta 0.5, 0.5 (Hellinger)", name="ab", options={"alpha": 0.5, "beta": 0.5}),
        Exhibit(title="AMiD, harmonic mean, share 0.1", name="amid", options={"alpha": 3.0}),
        Exhibit(title="TAID, target held at t = 0.4", name="taid"),
        Exhibit(title="DLD, student weights, centred", name="dld", options={"weighting": "student"}),
    ),
    "adaptive": (
        Exhibit(title="AKL", name="akl"),
        Exhibit(title="ToDi", name="todi"),
        Exhibit(title="TAD, k = 10, tail weight 2", name="tad"),
        Exhibit(title="EOPD, switched at 0.8 nat", name="eopd", options={"mode": "switch"}),
        Exhibit(title="LSKD on forward KL", name="lskd"),
    ),
    "acceptance": (
        Exhibit(title="LK, -log of the acceptance", name="lk"),
        Exhibit(title="LK, a KL that gives way to total variation", name="lk", options={"form": "lambda"}),
    ),
    "scores": (
        _csd("student-student", "student", "student"),
        _csd("teacher-student", "teacher", "student"),
        _csd("teacher-teacher", "teacher", "teacher"),
        _csd("uniform-student", "uniform", "student"),
        _csd("uniform-uniform", "uniform", "uniform"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="write the table of docs/objectives.md instead")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, help="draw only these, and leave the numbers alone")
    arguments = parser.parse_args()
    if arguments.table:
        objectives_page.PAGE.write_text(objectives_page.page(), "utf-8")
        return
    folder = DOCS / "gallery"
    folder.mkdir(exist_ok=True)
    shown = {}
    for room in arguments.rooms or ROOMS:
        shown[room] = [show(exhibit) for exhibit in ROOMS[room]]
        (folder / f"{room}.svg").write_text(gallery_pictures.room(room, teacher(), shown[room], TAUS), "utf-8")
    if arguments.rooms:
        return
    (folder / "js-forms.svg").write_text(gallery_pictures.chart(js_sizes(), "beta"), "utf-8")
    (folder / "gradient-size.svg").write_text(gallery_pictures.chart(gradient_sizes(), "temperature"), "utf-8")
    page = DOCS / "gallery.md"
    page.write_text(objectives_page.between_markers(page.read_text("utf-8"), numbers(shown)), "utf-8")


def teacher() -> Tensor:
    """Two modes of unequal size and width, and a floor so that no token is impossible: (V,)."""
    x_V = torch.arange(TOKENS, dtype=torch.float64)
    modes = [(0.6, 16.0, 3.0), (0.398, 45.0, 4.0)]
    p_V = torch.full_like(x_V, 0.002 / TOKENS)
    for weight, mean, width in modes:
        bump_V = (-((x_V - mean) ** 2) / (2 * width**2)).exp()
        p_V += weight * bump_V / bump_V.sum()
    return p_V / p_V.sum()


def student(mean_N: Tensor, width_N: Tensor) -> Tensor:
    """Logits (N, V) of discretised Gaussians."""
    x_V = torch.arange(TOKENS, dtype=torch.float64)
    return -((x_V - mean_N.unsqueeze(-1)) ** 2) / (2 * width_N.unsqueeze(-1) ** 2)


def values(objective: Any, logits_NV: Tensor, tau_N: Tensor) -> Tensor:
    return token_values(
        objective,
        logits_NV,
        teacher().log().expand(logits_NV.shape[0], -1),
        temperature=Temperature(loss=tau_N),
    )


def show(exhibit: Exhibit) -> Shown:
    means = torch.arange(0, TOKENS, dtype=torch.float64)
    slid_NV = student(means, torch.full_like(means, SLIDING_WIDTH))
    start_N2 = torch.tensor([START] * len(TAUS), dtype=torch.float64)
    logits_NV = student(*start_N2.T).requires_grad_()
    tau_N = torch.tensor(TAUS, dtype=torch.float64)
    values(exhibit.objective, logits_NV, tau_N).sum().backward()
    assert logits_NV.grad is not None
    return Shown(
        exhibit=exhibit,
        value_of_mean=[values(exhibit.objective, slid_NV, torch.full_like(means, tau)) for tau in TAUS],
        push=list(-logits_NV.grad),
        fits=fit(exhibit.objective),
    )


def fit(objective: Any) -> list[Fit]:
    """Adam on mean and logarithm of the width along the objective's own gradient: from `START`, then from `BROAD`."""
    starts = [START] * len(TAUS) + [BROAD]
    tau_N = torch.tensor([*TAUS, 1.0], dtype=torch.float64)
    # In eighths of a token, so that one step size suits both.
    place_N2 = torch.tensor([(mean / 8, math.log(width)) for mean, width in starts], dtype=torch.float64)
    place_N2.requires_grad_()
    optimizer = torch.optim.Adam([place_N2], lr=0.05, betas=(0.9, 0.99), eps=1e-9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        values(objective, student(8 * place_N2[:, 0], place_N2[:, 1].exp()), tau_N).sum().backward()
        optimizer.step()
        schedule.step()
    place_N2 = place_N2.detach()
    return [_described(8 * float(place[0]), math.exp(float(place[1]))) for place in place_N2]


def _described(mean: float, width: float) -> Fit:
    logits_NV = student(torch.tensor([mean], dtype=torch.float64), torch.tensor([width], dtype=torch.float64))
    one = torch.ones(1, dtype=torch.float64)
    forward, reverse = (float(values(build_objective(name), logits_NV, one)) for name in ("fkl", "rkl"))
    return Fit(mean=mean, width=width, q_V=logits_NV.softmax(-1)[0], forward=forward, reverse=reverse)


def numbers(shown: dict[str, list[Shown]]) -> str:
    """The two tables of docs/gallery.md."""
    everything = [one for room in shown.values() for one in room]
    lines = [f"| objective | {' | '.join(f'tau = {tau:g}' for tau in TAUS)} |", "|---|" + "---|" * len(TAUS)]
    lines += [f"| {one.exhibit.title} | {' | '.join(map(cell, one.fits[:-1]))} |" for one in everything]
    places = [f"starts at {mean:g} ± {width:g}" for mean, width in (START, BROAD)]
    lines += ["", f"| objective, tau = 1 | {' | '.join(places)} |", "|---|---|---|"]
    for one in everything:
        lines.append(f"| {one.exhibit.title} | {place(one.fits[0])} | {place(one.fits[-1])} |")
    return "\n".join(lines) + "\n"


def cell(fit: Fit) -> str:
    return f"{place(fit)}; {fit.forward:.2f}, {fit.reverse:.2f}"


def place(fit: Fit) -> str:
    return f"{fit.mean:.1f} ± {fit.width:.1f}"


def sizes(objective: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: Temperature) -> float:
    """Mean over the rows of the sum of the gradient's sizes (L1) in the student's logits."""
    student_NV = student_NV.detach().requires_grad_()
    token_values(objective, student_NV, teacher_NV, temperature=temperature).sum().backward()
    assert student_NV.grad is not None
    return float(student_NV.grad.abs().sum(-1).mean())


def drawn() -> tuple[Tensor, Tensor]:
    """64 rows of 2048 logits, student and teacher: heavy heads, and a student that is off by one standard deviation."""
    generator = torch.Generator().manual_seed(0)
    teacher_NV = 3 * torch.randn(64, 2048, generator=generator, dtype=torch.float64)
    return teacher_NV + torch.randn(64, 2048, generator=generator, dtype=torch.float64), teacher_NV


def js_sizes() -> dict[str, list[tuple[float, float]]]:
    """Size of the gradient over beta for each convention, in units of forward KL's."""
    rows, betas = drawn(), [0.01, 0.02, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.98, 0.99]
    unit = sizes(build_objective("fkl"), *rows, Temperature())
    found = {}
    for form in ("gkd", "normalized", "endpoint"):
        objectives = [(beta, build_objective("js", beta=beta, form=form)) for beta in betas]
        found[form] = [(beta, sizes(objective, *rows, Temperature()) / unit) for beta, objective in objectives]
    reverse = sizes(build_objective("rkl"), *rows, Temperature()) / unit
    return found | {"forward KL": [(0.01, 1.0), (0.99, 1.0)], "reverse KL": [(0.01, reverse), (0.99, reverse)]}


def gradient_sizes() -> dict[str, list[tuple[float, float]]]:
    """Size of the gradient over temperature, factor "none" and "auto", in units of the size at tau 1."""
    rows, found = drawn(), {}
    scales: dict[str, TemperatureScale] = {"fkl": "none"}
    lines = [*scales.items(), *((name, "auto") for name in ("fkl", "rkl", "js", "tv", "csd"))]
    for name, scale in lines:
        objective = build_objective(name)
        unit = sizes(objective, *rows, Temperature())
        found[f"{name}, {scale}"] = [
            (tau, sizes(objective, *rows, Temperature(loss=tau, scale=scale)) / unit)
            for tau in (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5)
        ]
    return found


if __name__ == "__main__":
    main()
