"""The evaluation groups, in the order in which they are listed. A new one is one file here and one line in this table.

Nothing heavy is imported at the top of these files: a recipe is read without torch.
"""

from __future__ import annotations

from limbeck.evaluation.group import EvaluationGroup
from limbeck.evaluation.groups.cost import CostGroup
from limbeck.evaluation.groups.diversity import DiversityGroup
from limbeck.evaluation.groups.fidelity import FidelityGroup
from limbeck.evaluation.groups.gap import GapGroup
from limbeck.evaluation.groups.judge import JudgeGroup
from limbeck.evaluation.groups.likelihood import LikelihoodGroup
from limbeck.evaluation.groups.nll import NllGroup
from limbeck.evaluation.groups.perplexity import PerplexityGroup
from limbeck.evaluation.groups.recovery import RecoveryGroup
from limbeck.evaluation.groups.rouge import RougeGroup
from limbeck.evaluation.groups.speculation import SpeculationGroup
from limbeck.evaluation.groups.tasks import TasksGroup
from limbeck.registry import Registry

EVALUATION_GROUPS: Registry[EvaluationGroup] = Registry(
    "evaluation group",
    {
        "fidelity": FidelityGroup,
        "rouge": RougeGroup,
        "diversity": DiversityGroup,
        "judge": JudgeGroup,
        "likelihood": LikelihoodGroup,
        "tasks": TasksGroup,
        "speculation": SpeculationGroup,
        "cost": CostGroup,
        "nll": NllGroup,
        "perplexity": PerplexityGroup,
        "recovery": RecoveryGroup,
        "gap": GapGroup,
    },
    entry_points="limbeck.evaluation_groups",
)
