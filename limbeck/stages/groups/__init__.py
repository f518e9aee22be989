"""The groups of metrics, in the order of a report. A new one is one file here and one line in this table."""

from limbeck.stages.exam import Group
from limbeck.stages.groups import cost, fidelity, judge, rouge, speculation

GROUPS: dict[str, Group] = {
    group.name: group for group in (fidelity.GROUP, rouge.GROUP, judge.GROUP, speculation.GROUP, cost.GROUP)
}
