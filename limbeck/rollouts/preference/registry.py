"""Names of the ways to have preference pairs (`preference.pairs`).

To add one: write its options beside the others and add one line here; recipe keys, JSON schema and checks follow.
"""

from __future__ import annotations

from limbeck.registry import Registry
from limbeck.rollouts.preference.options import DataPairs, JudgePairs, PairOptions, TeacherPairs

PAIRS: Registry[PairOptions] = Registry(
    "kind of pairs",
    {"teacher": TeacherPairs, "judge": JudgePairs, "data": DataPairs},
    entry_points="limbeck.preference_pairs",
)
