"""limbeck distils large language models.

    prompts ──► responses ──► teachers ──► objectives ──► student ──► evaluation ──► report
     Prompt      Response      Signal       (N,) values    weights     Scores        report.html

`limbeck.run("quickstart")` makes a whole run, `limbeck.evaluate(...)` measures any two models. `limbeck.types` has what
stands below the arrows; start reading there.
Names are imported when first used, so that `import limbeck` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limbeck.api import evaluate, load, run
    from limbeck.objectives import (
        OBJECTIVES,
        AdaptiveTemperature,
        HiddenPair,
        SparseForm,
        Temperature,
        TemperatureSchedule,
        build_objective,
        fused_distillation_loss,
    )
    from limbeck.recipe.load import Recipe
    from limbeck.types import DenseSignal, Head, LimbeckError, Response, SampledSignal, Sampling, TopKSignal

_HOMES = {
    "evaluate": "limbeck.api",
    "load": "limbeck.api",
    "run": "limbeck.api",
    "Recipe": "limbeck.recipe.load",
    "DenseSignal": "limbeck.types",
    "Head": "limbeck.types",
    "LimbeckError": "limbeck.types",
    "Response": "limbeck.types",
    "Sampling": "limbeck.types",
    "SampledSignal": "limbeck.types",
    "TopKSignal": "limbeck.types",
    "OBJECTIVES": "limbeck.objectives",
    "AdaptiveTemperature": "limbeck.objectives",
    "HiddenPair": "limbeck.objectives",
    "SparseForm": "limbeck.objectives",
    "Temperature": "limbeck.objectives",
    "TemperatureSchedule": "limbeck.objectives",
    "build_objective": "limbeck.objectives",
    "fused_distillation_loss": "limbeck.objectives",
}

__all__ = [
    "OBJECTIVES",
    "AdaptiveTemperature",
    "DenseSignal",
    "Head",
    "HiddenPair",
    "LimbeckError",
    "Recipe",
    "Response",
    "SampledSignal",
    "Sampling",
    "SparseForm",
    "Temperature",
    "TemperatureSchedule",
    "TopKSignal",
    "build_objective",
    "evaluate",
    "fused_distillation_loss",
    "load",
    "run",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
