"""What `limbeck plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

from limbeck.models.devices import fleet_of
from limbeck.models.launchers import LAUNCHERS, require_even
from limbeck.pipeline.plan.outcome import plan
from limbeck.pipeline.plan.page import commands, text_of
from limbeck.pipeline.plan.probe import PROBE_SECONDS
from limbeck.recipe.load import load_recipe_or_run

__all__ = ["PROBE_SECONDS", "plan_text"]


def plan_text(
    recipe: str,
    overrides: Sequence[str],
    devices: str,
    price: float | None,
    answer: int | None,
    *,
    launch: str | None,
    probe_s: float | None = None,
) -> str:
    """The plan of a recipe, or the commands that start it.

    Args:
        probe_s: seconds for timing the pieces of the recipe on this machine.

    Raises:
        LimbeckError: an unknown device or launcher, devices that it cannot start on, or a model that cannot be found.
    """
    fleet = fleet_of(devices, usd_per_hour=price)
    if launch is not None:
        LAUNCHERS.require(launch)
        require_even(fleet)
    loaded = load_recipe_or_run(recipe, overrides)
    made = plan(loaded, fleet, answer=answer, probe_s=probe_s)
    return text_of(made) if launch is None else commands(made, [recipe, *overrides], launch)
