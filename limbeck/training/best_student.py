"""Evaluation during training, on responses that are set aside, and the student that was best by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from limbeck.models.whole import whole
from limbeck.recipe.sections import TrainSection
from limbeck.training import trained_weights
from limbeck.training.background import Background
from limbeck.training.loss import StudentLoss
from limbeck.training.metrics import LoopContext
from limbeck.training.progress import Best, Progress
from limbeck.types import Response

MeasureFidelity = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class EvaluationInTraining:
    """Loss and fidelity of the student on set-aside responses; keeps the weights of the lowest loss, if asked to.

    Attributes:
        responses: by the teacher's number; without any, nothing is measured.
        fidelity: further metrics of the student, by name; None for the loss alone.
        loss_on: mean loss per token on some responses, without gradients.
        measure: of `fidelity`, the one that takes the place of the loss where it is measured; None for the loss.
        total: optimizer steps of the training.
        background: writes the best student beside the steps.
    """

    responses: Mapping[int, Response]
    fidelity: MeasureFidelity | None
    loss_on: Callable[[Mapping[int, Response]], float]
    measure: str | None
    module: StudentLoss
    settings: TrainSection
    context: LoopContext
    total: int
    background: Background

    def due_after(self, step: int) -> bool:
        """Whether the student is evaluated after a step."""
        every = self.settings.eval_steps or self.total
        return bool(self.responses) and (step % every == 0 or step == self.total)

    def before_training(self, progress: Progress) -> None:
        """Measure the student that training starts from."""
        if self.responses and progress.step == 0:
            progress.first_loss = self._loss(progress, self._in_place_of_loss())

    def metrics(self, progress: Progress) -> dict[str, float | None]:
        """Metrics of the student after a step, all with names that begin with eval_."""
        fidelity = self._in_place_of_loss()
        loss = self._loss(progress, fidelity)
        found: dict[str, float | None] = {"eval_loss": loss, "eval_loss_before": progress.first_loss}
        return found | (fidelity or self._fidelity()) if math.isfinite(loss) else found

    def _loss(self, progress: Progress, fidelity: Mapping[str, float]) -> float:
        """The loss on the set-aside responses; where it is the lowest so far, the weights are kept."""
        measured = fidelity.get(f"eval_{self.measure}")
        loss = self.loss_on(self.responses) if measured is None else measured
        least = math.inf if progress.best is None else progress.best.loss - self.settings.early_stopping_threshold
        # NaN is no gain.
        progress.since_gain = 0 if loss < least else progress.since_gain + 1
        if math.isfinite(loss) and (progress.best is None or loss < progress.best.loss):
            progress.best = Best(step=progress.step, loss=loss)
            if self.settings.load_best_model_at_end:
                trained_weights.save_best(self.context.checkpoints, progress.step, self.module, self.background)
        return loss

    def _in_place_of_loss(self) -> dict[str, float]:
        """The fidelity, where one of it takes the place of the loss; nothing of a student whose numbers are none."""
        if self.measure is None or self.fidelity is None or not math.isfinite(self.loss_on(self.responses)):
            return {}
        return self._fidelity()

    def _fidelity(self) -> dict[str, float]:
        if self.fidelity is None:
            return {}
        self.module.student.eval()
        with whole(self.module.student) as student:
            found = self.fidelity(student)
        self.module.student.train()
        return {f"eval_{name}": value for name, value in found.items()}

    def stops_early(self, progress: Progress) -> bool:
        """Whether the loss has not fallen for `early_stopping_patience` measurements."""
        patience = self.settings.early_stopping_patience
        return patience is not None and progress.since_gain >= patience

    def restore_best(self, progress: Progress) -> None:
        """Put back the weights of the lowest loss, where they are not the last ones and the settings say so."""
        best = progress.best
        if best is None or not self.settings.load_best_model_at_end or best.step == progress.step:
            return
        trained_weights.restore_best(self.context.checkpoints, best.step, self.module)
        where = f"after step {best.step}" if best.step else "before training"
        self.context.console.warn(
            f"{self.context.label}: the loss on the set-aside prompts was lowest {where} ({best.loss:.4g}): that "
            f"student is handed on, not the one of step {progress.step}; "
            "lower train.learning_rate, train for fewer steps, or set train.load_best_model_at_end=false"
        )
