"""Names that other tools have for what a recipe says: an unknown key of theirs is answered with the key here."""

from __future__ import annotations

_WEIGHTS = "the weights of objective={name: sum, parts: [{name: fkl, weight: ...}, {name: ce, weight: ...}]}"
# By the last part of a key; docs/names.md has the others, and what differs.
FOREIGN = {
    "lmbda": "responses.source={name: mixed, share: ...}",
    "mixed_alpha": "responses.source={name: mixed, share: ...}",
    "init_threshold": "responses.source={name: replay, share: ...}",
    "student_gen": "responses.source=student, mixed or replay",
    "seq_kd": "responses.initial_author=teacher",
    "kd_ratio": _WEIGHTS,
    "kd_alpha": _WEIGHTS,
    "sft_alpha": _WEIGHTS,
    "kd_temperature": "objective.temperature",
    "skew_alpha": "objective={name: skl, alpha: ...}",
    "lm_coef": "train.lm.weight",
    "teacher_model_name_or_path": "teacher.model",
    "max_completion_length": "responses.max_new_tokens",
}


def said_here(key: str) -> str | None:
    """What says the same in a recipe as a key of another tool; None where no tool's is meant."""
    # As flags of a command line they have hyphens.
    return FOREIGN.get(key.rpartition(".")[2].lstrip("-").replace("-", "_"))
