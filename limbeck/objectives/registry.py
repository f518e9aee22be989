"""The registry of objectives, and the function that builds one from a name and options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from limbeck.objectives.acceptance import LK
from limbeck.objectives.adaptive import AdaptiveKL, EntropyGate, TailAwareKL, TokenwiseKL
from limbeck.objectives.base import HiddenObjective, Objective
from limbeck.objectives.divergences import AlphaBeta, ForwardKL, Jeffreys, ReverseKL, SymmetricKL, TotalVariation
from limbeck.objectives.hidden_matching import HiddenMatching
from limbeck.objectives.logit_matching import CSD, DirectLogit, LogitStandardization
from limbeck.objectives.mixtures import TAID, AlphaMixture, JensenShannon, SkewKL, SkewReverseKL
from limbeck.objectives.policy import PolicyGradient, SampledReverseKL
from limbeck.objectives.sums import AnyObjective, CrossEntropy, WeightedSum
from limbeck.registry import Registry, checked
from limbeck.types import LimbeckError


def build_objective(name: str, **options: object) -> AnyObjective:
    """The objective of this name with these options.

    An option that is itself an objective may be a name or a mapping (``{"name": "js", "beta": 0.1}``); the parts of a
    sum are mappings with a `weight` beside (1 if left out).

    Raises:
        LimbeckError: for an unknown name or option, with the nearest known one, or a value of the wrong kind.
    """
    return OBJECTIVES.build(name, **options)


def _read(name: str, field: dataclasses.Field[Any], value: object) -> object:
    """An option's value, objectives built, numbers checked."""
    if name == "sum" and field.name == "parts":
        return _read_parts(value)
    if field.default is dataclasses.MISSING or field.default is None:
        return _read_objective(f"{name} {field.name}", value)
    return checked(name, field, value)


def _read_objective(where: str, value: object) -> AnyObjective:
    if isinstance(value, (Objective, HiddenObjective)):
        return value
    if isinstance(value, str):
        return build_objective(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return build_objective(**value)
    raise LimbeckError(f"{where}={value!r}: expected the name of an objective, or a mapping with a name and options")


def _read_parts(value: object) -> tuple[tuple[float, AnyObjective], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise LimbeckError(f"sum parts={value!r}: expected a list, such as [{{name: fkl, weight: 0.5}}, {{name: ce}}]")
    parts = []
    for part in value:
        if isinstance(part, Mapping):
            weight = part.get("weight", 1.0)
            inner = _read_objective("sum part", {key: option for key, option in part.items() if key != "weight"})
        elif isinstance(part, (tuple, list)) and len(part) == 2:
            weight, inner = part[0], _read_objective("sum part", part[1])
        else:
            weight, inner = 1.0, _read_objective("sum part", part)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise LimbeckError(f"sum part {inner.name!r} has weight {weight!r}: expected a number")
        parts.append((float(weight), inner))
    return tuple(parts)


# The values are frozen dataclasses that implement `Objective` or `HiddenObjective`; their fields are read, hence Any.
OBJECTIVES: Registry[Any] = Registry(
    "objective",
    {
        "fkl": ForwardKL,
        "rkl": ReverseKL,
        "symmetric_kl": SymmetricKL,
        "jeffreys": Jeffreys,
        "js": JensenShannon,
        "skl": SkewKL,
        "srkl": SkewReverseKL,
        "tv": TotalVariation,
        "lk": LK,
        "ab": AlphaBeta,
        "akl": AdaptiveKL,
        "todi": TokenwiseKL,
        "taid": TAID,
        "amid": AlphaMixture,
        "tad": TailAwareKL,
        "eopd": EntropyGate,
        "csd": CSD,
        "dld": DirectLogit,
        "lskd": LogitStandardization,
        "opd": SampledReverseKL,
        "hidden": HiddenMatching,
        "ce": CrossEntropy,
        "policy_gradient": PolicyGradient,
        "sum": WeightedSum,
    },
    entry_points="limbeck.objectives",
    read_option=_read,
)
