"""The section `preference` of a recipe: preference tuning of the distilled student with TRL's DPOTrainer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from limbeck.fields import NEUTRAL, STRICT, Count, NonNegative, Positive
from limbeck.recipe.member import MemberKey
from limbeck.rollouts.preference.options import PAIRS_KEY, PairOptions, TeacherPairs
from limbeck.rollouts.preference.registry import PAIRS

PAIRS_SETTING: MemberKey[PairOptions] = MemberKey(key=PAIRS_KEY, registry=PAIRS, default="teacher", example="teacher")
PairsSetting = Annotated[PairOptions, PlainValidator(PAIRS_SETTING.read, json_schema_input_type=Any)]
# Those of TRL whose loss is a function of the pairs of a step alone: bco_pair keeps a mean that no checkpoint holds.
LossType = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "aot",
    "apo_zero",
    "apo_down",
    "discopop",
]
# Those that read label_smoothing.
SMOOTHED = ("robust", "exo_pair")


@dataclass(config=STRICT, kw_only=True)
class PreferenceSection:
    """Preference tuning after distillation: the distilled student is policy and reference of TRL's DPOTrainer, whose
    names these keys bear. The pairs come in the order of train.seed."""

    pairs: PairsSetting = TeacherPairs()
    """Who prefers: teacher, judge or data, or a mapping with name and options."""
    num_train_epochs: Positive = 1.0
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever the epochs."""
    per_device_train_batch_size: Count = 8
    """Pairs of a micro-batch."""
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive = 1e-6
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    """0 switches clipping off."""
    beta: Positive = 0.1
    """How much leaving the reference costs."""
    loss_type: LossType = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Of robust and exo_pair: how often a preference is taken to be wrong."""
    bf16: bool = False
    """Mixed precision."""
    gradient_checkpointing: bool = False
    save_steps: Annotated[Count, NEUTRAL] = 50
    save_total_limit: Annotated[Count, NEUTRAL] = 2
