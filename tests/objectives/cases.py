"""The objectives under test: every registered one with its defaults, and the configurations worth a case of their own.

A new objective is tested by being registered. What it promises beyond the common properties is said here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.objectives import OBJECTIVES, build_objective
from limbeck.objectives.base import Objective, Rows, TemperatureScale
from limbeck.objectives.sums import row_leaves

WEIGHTINGS = ("student", "teacher", "uniform", "mixture")

EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "symmetric_kl": [{"forward": 0.1}, {"forward": 1.0}],
    "js": [{"beta": b, "form": f} for b in (0.1, 0.9) for f in ("gkd", "endpoint", "normalized")]
    + [{"beta": 0.0, "form": "endpoint"}, {"beta": 1.0, "form": "endpoint"}],
    "skl": [{"alpha": 0.9}],
    "srkl": [{"detach_mixture": True}, {"alpha": 0.6}],
    "ab": [
        {"alpha": a, "beta": b}
        for a, b in [
            (0.5, 0.5),
            (1, 1),
            (0.8, 0.3),
            (1, 0),
            (0.6, 0),
            (0, 1),
            (0, 0.6),
            (0, 0),
            (0.5, -0.5),
            (-0.4, 1.4),
        ]
    ],
    "lk": [{"form": "lambda"}, {"form": "lambda", "eta": 0.0}],
    "akl": [{"mu": 0.9}],
    "taid": [{"progress": 1.0}],
    "amid": [
        {"alpha": a, "share": 0.3, "between": b}
        for a in (-1.0, 0.0, 1.0, 3.0)
        for b in ("teacher_assistant", "student_assistant", "assistant_teacher", "assistant_student")
    ]
    + [
        {"detach_assistant": True, "between": "assistant_student"},
        {"detach_assistant": True, "between": "student_assistant"},
    ],
    "tad": [{"k": 3, "tail_weight": 0.0}, {"k": 1, "tail_weight": 1.0}, {"k": 1000}],
    "eopd": [{"mode": "switch", "threshold": 3.0}, {"base": "srkl", "gated": {"name": "tv"}, "threshold": 3.0}],
    "csd": [
        {"first": first, "second": second, "detach": detach}
        for i, first in enumerate(WEIGHTINGS)
        for second in WEIGHTINGS[i:]
        for detach in (True, False)
    ],
    "dld": [
        {"weighting": w, "normalize": n}
        for w in ("student", "uniform")
        for n in ("none", "mean", "min", "max", "std", "range")
    ],
    "lskd": [{"inner": "rkl"}, {"inner": "js"}],
    "opd": [{"clip": 0.5}, {"estimator": "k2"}, {"estimator": "k3"}],
    "policy_gradient": [{"advantage": -0.7}],
    "sum": [
        {
            "parts": [
                {"name": "rkl", "weight": 0.7},
                {"name": "tv", "weight": 2},
                {"name": "csd", "first": "uniform", "weight": 0.1},
            ]
        }
    ],
}


def _short(option: Any) -> str:
    if isinstance(option, list):
        return "+".join(_short(part) for part in option)
    return option["name"] if isinstance(option, dict) else str(option)


def _cases() -> dict[str, Objective]:
    cases = {}
    for name in OBJECTIVES:
        for options in [{}, *EXAMPLES.get(name, [])]:
            objective = build_objective(name, **options)
            if isinstance(objective, Objective) and "hidden" not in objective.reads:
                cases[f"{name}({','.join(_short(v) for v in options.values())})"] = objective
    return cases


CASES = _cases()
# One configuration of each, for the tests that are about the machinery around the objectives.
DEFAULTS = {name: CASES[f"{name}()"] for name in OBJECTIVES if f"{name}()" in CASES}


def is_teacherless(objective: Objective) -> bool:
    return "teacher" not in objective.reads


def is_signed(objective: Objective) -> bool:
    """Whether its value may be negative: an estimate from one token, or an advantage times a surprise."""
    return objective.name in ("opd", "policy_gradient")


def feels_shifts(objective: Objective) -> bool:
    """Whether a constant added to the logits changes the value, as only plain logit matching does."""
    return objective.name == "dld" and getattr(objective, "normalize") == "none"  # noqa: B009


def has_kink(objective: Objective) -> bool:
    """Whether its gradient at equality is the sign of a rounding error, as total variation's is."""
    parts = [part for _, part in row_leaves(objective)]
    inner = [getattr(part, field) for part in parts for field in ("base", "gated", "inner") if field in vars(part)]
    return any(part.name in ("tv", "lk") for part in parts + inner)


def make_logits(n: int = 8, v: int = 257, seed: int = 0, size: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits that have something to do with each other, and labels; float64."""
    g = torch.Generator().manual_seed(seed)
    teacher = size * torch.randn(n, v, generator=g, dtype=torch.float64)
    student = 0.7 * teacher + torch.randn(n, v, generator=g, dtype=torch.float64)
    return student, teacher, torch.randint(v, (n,), generator=g)


def make_rows(
    student: Tensor,
    teacher: Tensor,
    label: Tensor | None = None,
    tau: float | Tensor = 1.0,
    scale: TemperatureScale = "auto",
) -> Rows:
    tau_N1 = tau.unsqueeze(-1) if isinstance(tau, Tensor) else torch.full_like(student[:, :1].detach(), tau)
    return Rows(
        student_logits_NK=student,
        teacher_logits_NK=teacher,
        student_tau_N1=tau_N1,
        teacher_tau_N1=tau_N1,
        scale=scale,
        label_N=label,
    )
