"""The groups of metrics, in the order of a report. A new one is one file here and one line in this table."""

from limbeck.stages.exam import Group
from limbeck.stages.groups import cost, diversity, fidelity, judge, rouge, speculation, tasks

GROUPS: dict[str, Group] = {
    group.name: group
    for group in (fidelity.GROUP, rouge.GROUP, diversity.GROUP, judge.GROUP, tasks.GROUP, speculation.GROUP, cost.GROUP)
}
