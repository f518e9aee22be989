"""Gradients of an optimizer step: forward and backward of its micro-batches, summed over ranks, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from limbeck.models.whole import whole_tensor
from limbeck.ops import onednn
from limbeck.recipe.sections import TrainSection
from limbeck.rollouts.collate import cut_by_rows, cut_by_tokens, turns
from limbeck.training.corpus import Corpus
from limbeck.training.loss import StepSettings, StudentLoss
from limbeck.training.micro_batches import HostBatch, MicroBatches, Place, Read
from limbeck.training.percentile import StreamingPercentile
from limbeck.training.step_measures import ScoredBatches, whitened, with_median
from limbeck.types import Response, Signal, TokenBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

Following = Callable[[], Mapping[int, Response] | None]


@dataclass(frozen=True)
class StepSums:
    """Metrics measured with the gradients of a step, over all ranks.

    Attributes:
        sums: name of a measure to its sum over the step and the number of its values; measures without values are
            left out.
        means: the metrics of the step.
        stop: whether any rank was asked to stop.
    """

    sums: Mapping[str, tuple[float, float]]
    means: Mapping[str, float]
    stop: bool


@dataclass(frozen=True, kw_only=True)
class GradientPasses:
    """Forward and backward passes of the student on the responses of a step.

    Attributes:
        model: `module` as accelerate prepared it.
        should_stop: asked after the passes of each step; True on one rank stops all.
    """

    accelerator: Accelerator
    model: nn.Module
    module: StudentLoss
    optimizer: torch.optim.Optimizer
    micro_batches: MicroBatches
    corpus: Corpus | None
    settings: TrainSection
    pad_id: int
    should_stop: Callable[[], bool]

    def seed(self, step: int) -> None:
        """Seed the random numbers (dropout) of a step by seed, step and rank alone, whatever ran before."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        set_seed((self.settings.seed * 1_000_003 + step * ranks + rank) % 2**32)

    def gradients(
        self,
        by_row: Mapping[int, Response],
        weights: Mapping[int, float],
        step_settings: StepSettings,
        *,
        step: int,
        following: Following | None = None,
    ) -> StepSums:
        """Add up the gradients of a step over its micro-batches and all ranks.

        Args:
            by_row: the responses of the step.
            weights: weight per token of each of them.
            following: gives the responses of the next step, where they are known before this one is over.
        """
        sums = torch.zeros(len(self.module.stats), 2, device=self.accelerator.device)
        ranks = self.accelerator.num_processes
        micros = self._micro_batches(by_row)
        reads = [partial(self.micro_batches.read, by_row, micro) for micro in micros]
        # DDP averages over ranks, the step sums over them: hence the factor.
        weights = {row: ranks * weight for row, weight in weights.items()}
        percentile = None
        if self.module.loss_plan.authored:
            percentile = StreamingPercentile(sum(r.tokens for r in by_row.values()), device=self.accelerator.device)
        seen: dict[int, tuple[TokenBatch, Signal]] = {}
        if self._looks_first(step_settings, micros):
            seen = {i: self.micro_batches.on_device(read, (step, i)) for i, read in enumerate(reads)}
            step_settings = self._looked(step_settings, [(*seen[i], bool(micro)) for i, micro in enumerate(micros)])
        text = self._text_gradients(step)
        for i, micro in enumerate(micros):
            batch, signal = seen.get(i) or self.micro_batches.on_device(reads[i], (step, i))
            weight_B = [weights[row] if micro else 0.0 for row in batch.rows]
            last = i == len(micros) - 1
            upcoming = self._first_of(step + 1, following) if last else ((step, i + 1), None if seen else reads[i + 1])
            with self.micro_batches.preparing(*upcoming):
                part, value_N = self._backward(batch, signal, weight_B, step_settings, last=last)
            if not micro:
                continue
            sums += part
            if percentile is not None:
                percentile.add(value_N)
        return self._over_ranks(sums, text, percentile)

    def _looks_first(self, step_settings: StepSettings, micros: Sequence[Sequence[int]]) -> bool:
        """Whether something has to be known of all tokens of a step before the gradients of any."""
        rule, parts = self.module.loss_plan.rule, len(micros) * self.accelerator.num_processes
        if rule is not None and rule.whiten:
            return True
        # Of one part the loss finds the median itself, which is the same where nothing is dropped.
        return step_settings.temperature.adapt is not None and (parts > 1 or _drops(self.module.student))

    def _looked(self, step_settings: StepSettings, seen: ScoredBatches) -> StepSettings:
        """The settings with what is known of all tokens of a step."""
        rule = self.module.loss_plan.rule
        if rule is not None and rule.whiten:
            step_settings = whitened(step_settings, seen, accelerator=self.accelerator, model=self.model)
        if step_settings.temperature.adapt is not None:
            step_settings = with_median(step_settings, seen, model=self.model)
        return step_settings

    def _first_of(self, step: int, responses: Following | None) -> tuple[Place, Read | None]:
        """The place of a step's first micro-batch, and what reads it."""

        def read() -> HostBatch | None:
            assert responses is not None
            by_row = responses()
            return None if by_row is None else self.micro_batches.read(by_row, self._micro_batches(by_row)[0])

        return (step, 0), None if responses is None else read

    def _over_ranks(self, sums: Tensor, text: Tensor, percentile: StreamingPercentile | None) -> StepSums:
        # Ranks must agree to stop at the same step, so the request travels with the loss.
        wish = torch.tensor([float(self.should_stop())], device=sums.device)
        every = torch.cat([sums.flatten(), text, wish])
        *summed, text_sum, text_count, stop = self.accelerator.reduce(every, reduction="sum").tolist()  # type: ignore[union-attr]
        found = {
            name: (total, count)
            for name, total, count in zip(self.module.stats, summed[::2], summed[1::2], strict=True)
            if count
        }
        means = {name: total / count for name, (total, count) in found.items()}
        if text_count:
            means["loss/lm"] = text_sum / text_count
        if percentile is not None:
            means["kl_p99"] = percentile.value(self.accelerator.gather).item()  # type: ignore[arg-type]
        return StepSums(sums=found, means=means, stop=stop > 0)

    @torch.no_grad()
    def loss_on(self, steps: Sequence[Mapping[int, Response]], step_settings: StepSettings) -> float:
        """Mean per token of `LossPlan.gauge` on the responses of some steps, over all ranks."""
        sums = torch.zeros(2, device=self.accelerator.device)
        place = self.module.stats.index(self.module.loss_plan.gauge)
        self.model.eval()
        for by_row in steps:
            seen = (
                (*self.micro_batches.on_device(partial(self.micro_batches.read, by_row, micro)), bool(micro))
                for micro in self._micro_batches(by_row)
            )
            own = step_settings
            if step_settings.temperature.adapt is not None:
                seen = list(seen)
                own = with_median(step_settings, seen, model=self.model)
            for batch, signal, counts in seen:
                with onednn.linears():
                    part = self.model(batch, signal, torch.ones_like(batch.labels_N).float(), own)[1][place]
                if counts:
                    sums += part
        self.model.train()
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()  # type: ignore[union-attr]
        return total / max(count, 1.0)

    def clip(self) -> float:
        """Clip the gradient and return the norm that it had."""
        limit = self.settings.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        return float(whole_tensor(norm))  # type: ignore[arg-type]

    def update(self, rate: float) -> None:
        """Update the weights at a learning rate and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def text_tokens(self, step: int) -> dict[str, int]:
        """Tokens of the second corpus in the first `step` steps, as a metric; they are not among the others."""
        if self.corpus is None:
            return {}
        ranks, accumulation = self.accelerator.num_processes, self.settings.gradient_accumulation_steps
        return {"lm_tokens": step * self.corpus.tokens(accumulation=accumulation, ranks=ranks)}

    def _text_gradients(self, step: int) -> Tensor:
        """The gradients of the language-modelling loss; sum and count of its tokens on this rank."""
        found = torch.zeros(2, device=self.accelerator.device)
        if self.corpus is None:
            return found
        for batch, weight_B in self.corpus.batches(
            step,
            accumulation=self.settings.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            pad_id=self.pad_id,
        ):
            # The last backward of a step, in which ranks meet, is one of the responses.
            batch = batch.to(self.accelerator.device)
            _, value_N = self._backward(batch, None, weight_B, StepSettings(), last=False)
            found += torch.stack([value_N.float().sum(), found.new_tensor(float(len(value_N)))])
        return found

    def chunks(self, by_row: Mapping[int, Response], *, ranks: int) -> list[tuple[int, ...]]:
        """Some responses in micro-batches, those of all ranks in turn."""
        if self.settings.max_tokens_per_batch is None:
            return cut_by_rows(tuple(by_row), self.settings.per_device_train_batch_size)
        rule = self.module.loss_plan.rule
        together = 2 if rule is not None and rule.pairs else 1
        return cut_by_tokens(
            by_row,
            self.settings.max_tokens_per_batch,
            together=together,
            ranks=ranks,
            packed=self.settings.packing,
        )

    def _micro_batches(self, by_row: Mapping[int, Response]) -> list[tuple[int, ...]]:
        ranks = self.accelerator.num_processes
        return turns(self.chunks(by_row, ranks=ranks), rank=self.accelerator.process_index, ranks=ranks)

    def _backward(
        self,
        batch: TokenBatch,
        signal: Signal | None,
        weight_B: Sequence[float],
        step_settings: StepSettings,
        *,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        """Backward of one micro-batch; returns what `StudentLoss.forward` returns beside the loss."""
        weight_N = torch.tensor(weight_B, device=batch.labels_N.device)[batch.sequence_N]
        with nullcontext() if last else self.accelerator.no_sync(self.model), onednn.linears():
            loss, sums, value_N = self.model(batch, signal, weight_N, step_settings)
            self.accelerator.backward(loss)
        return sums, value_N


def _drops(student: nn.Module) -> bool:
    """Whether a pass in training leaves out what one in an evaluation does not, as with dropout inside adapters."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in student.modules())
