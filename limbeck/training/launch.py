"""Parts that a training is started with: accelerate, its trackers, and the optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from limbeck.recipe.optimizers import require_optimizer
from limbeck.recipe.sections import TrainSection
from limbeck.runtime.launcher import FSDP, launched, require_trained_by
from limbeck.training.sharding import is_sharded
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from limbeck.training.loss import StudentLoss


@dataclass(frozen=True)
class Ranks:
    """The processes of a launch, as a `limbeck.rollouts.rounds.ProcessGroup`."""

    accelerator: Accelerator

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def ranks(self) -> int:
        return self.accelerator.num_processes

    def gather(self, items: list[Any]) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object(items)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate cannot find.

    Raises:
        LimbeckError: naming the first of them.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise LimbeckError(
                f"train.report_to names {name!r}, which is not installed or unknown; "
                f"installed here: {', '.join(available) or 'none'}"
            )


def accelerator(
    settings: TrainSection, folder: Path, *, run_name: str, tracker_config: Mapping[str, Any]
) -> Accelerator:
    """accelerate for this process, with the trackers of the recipe, whose files go below `folder`.

    Raises:
        LimbeckError: a tracker that is not there, or a launch that asks for what limbeck cannot train with.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    require_trackers(settings.report_to)
    # accelerate keeps the first precision of a process for good; a second run in it may ask for another.
    AcceleratorState._reset_state()
    with _without_fsdp():
        made = Accelerator(
            # By default accelerate takes the ranks of a machine without accelerators for runs of their own.
            cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
            mixed_precision="bf16" if settings.bf16 else "no",
            log_with=list(settings.report_to) or None,
            project_dir=str(folder / "trackers") if settings.report_to else None,
        )
    require_trained_by(made.distributed_type.value, made.num_processes, launched())
    if settings.report_to:
        made.init_trackers(run_name, config=dict(tracker_config))
    return made


@contextmanager
def _without_fsdp() -> Iterator[None]:
    """Hide the launch's FSDP2 from accelerate: the student is sharded by `limbeck.training.sharding`, on CPUs too."""
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    asked = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[FSDP] = asked
            # With it transformers would load models without weights on all ranks but the first.
            disable_fsdp_ram_efficient_loading()


def prepared(
    accelerator: Accelerator, module: StudentLoss, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Module and optimizer as they train: with a whole student under DDP, where there are ranks; with one that is
    sharded already under the autocast of the settings alone."""
    if not is_sharded(module.student):
        return accelerator.prepare(module, optimizer)
    model = accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(optimizer)  # type: ignore[return-value]


def optimizer(module: StudentLoss, settings: TrainSection) -> torch.optim.Optimizer:
    """The optimizer of the settings, with weight decay on matrices alone, as TrainingArguments' have it.

    Raises:
        LimbeckError: a student without a trainable weight, or that it cannot update.
    """
    require_optimizer(settings.optim, sharded=is_sharded(module.student))
    if not any(p.requires_grad for p in module.student.parameters()):
        raise LimbeckError("the student has no trainable weights; check student.lora.target_modules")
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The loop sets the rate of every step; where it is still to be found, none is known here.
    rate = 0.0 if settings.learning_rate == "auto" else settings.learning_rate
    return settings.optim.build([group for group in groups if group["params"]], rate=rate, settings=settings)
