"""Objectives: functions that compare the student with the teacher, token by token.

An objective is a frozen dataclass whose fields are its options. To add one: write the dataclass, add one line to
`OBJECTIVES`; the tests, the benchmark, the command line and the documentation's table run over the registry.
"""

from __future__ import annotations

from limbeck.objectives.fused.loss import FusedLoss, fused_distillation_loss
from limbeck.objectives.fused.tiles import logit_tiles, model_logit_tiles
from limbeck.objectives.hidden_matching import HiddenPair
from limbeck.objectives.registry import OBJECTIVES, build_objective
from limbeck.objectives.sequence.difficulty import tail_weights, token_difficulty
from limbeck.objectives.sequence.distillm2 import AdaptiveAlpha, Beta, dpkd_advantage, label_logp, sequence_mean
from limbeck.objectives.sequence.minillm import minillm_advantage
from limbeck.objectives.sparse import SparseForm, sampled_signal, topk_signal
from limbeck.objectives.temperature import AdaptiveTemperature, Temperature, TemperatureSchedule
from limbeck.objectives.values import (
    csd,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    token_values,
)

__all__ = [
    "OBJECTIVES",
    "AdaptiveAlpha",
    "AdaptiveTemperature",
    "Beta",
    "FusedLoss",
    "HiddenPair",
    "SparseForm",
    "Temperature",
    "TemperatureSchedule",
    "build_objective",
    "csd",
    "dpkd_advantage",
    "forward_kl",
    "fused_distillation_loss",
    "jensen_shannon",
    "label_logp",
    "logit_tiles",
    "minillm_advantage",
    "model_logit_tiles",
    "reverse_kl",
    "sampled_signal",
    "sequence_mean",
    "skew_kl",
    "skew_reverse_kl",
    "tail_weights",
    "token_difficulty",
    "token_values",
    "topk_signal",
]
