"""Training prompts that are set aside to choose among the students of a training: neither trained on nor held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from heapq import nsmallest

from limbeck.rollouts.table import in_a_row, prompts_of, without
from limbeck.types import Response

# Of few prompts a tenth at most: the student needs them more. And none at all rather than so few that chance chooses.
LARGEST_SHARE, FEWEST = 0.1, 8


def set_aside(responses: Mapping[int, Response], size: int) -> tuple[Mapping[int, Response], dict[int, Response]]:
    """The responses to train on, and those of `size` prompts to measure on, longest first.

    Which prompts depends on their ids alone. All responses of a prompt stay together. Where a tenth of the prompts is
    fewer than `FEWEST`, none are set aside.
    """
    ids = list(prompts_of(in_a_row(responses)))
    prompts = set(ids)
    spared = int(LARGEST_SHARE * len(prompts))
    chosen = set(nsmallest(min(size, spared), prompts, key=_order)) if spared >= FEWEST else set()
    rows = [row for row, prompt_id in zip(responses, ids, strict=True) if prompt_id in chosen]
    aside = {row: responses[row] for row in rows}
    return without(responses, rows), dict(sorted(aside.items(), key=lambda item: -item[1].length))


def ids_of_prompts(responses: Mapping[int, Response]) -> frozenset[str]:
    """The prompts that were answered."""
    return frozenset(r.prompt_id for r in responses.values())


def _order(prompt_id: str) -> str:
    return hashlib.sha256(f"development {prompt_id}".encode()).hexdigest()
