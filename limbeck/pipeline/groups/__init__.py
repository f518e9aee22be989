"""The groups of metrics, in the order of a report. A new one is one file here and one line in this table."""

from collections.abc import Sequence

from limbeck.pipeline.evaluation_context import Group
from limbeck.pipeline.groups import cost, diversity, fidelity, judge, nll, rouge, speculation, tasks
from limbeck.prompts.references import require_references
from limbeck.recipe.evaluation import EvaluateSection
from limbeck.types import Prompt

GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        fidelity.GROUP,
        nll.GROUP,
        rouge.GROUP,
        diversity.GROUP,
        judge.GROUP,
        tasks.GROUP,
        speculation.GROUP,
        cost.GROUP,
    )
}

# What to change where the data has no answers of its own.
_REMEDIES = {
    "rouge": "set evaluate.rouge.against to [teacher]",
    "nll": "set evaluate.nll.whose=responses",
    "fidelity": "take references out of evaluate.fidelity.whose",
}


def require_known_answers(section: EvaluateSection, prompts: Sequence[Prompt]) -> None:
    """See that data has the reference answers that groups will need, before anything has worked.

    Raises:
        LimbeckError: a held-out prompt has none; names it and its place in the data.
    """
    for name in section.groups:
        if "references" in GROUPS[name].needs(section):
            remedy = _REMEDIES.get(name, "leave the group out of evaluate.groups")
            require_references([p for p in prompts if p.split == "heldout"], remedy)
