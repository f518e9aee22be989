"""Teachers made of the student's own weights: as they are, their moving average, the base under its adapters.

No model is loaded for them. What does not change in training is shared with the student, so that a teacher costs the
memory of what it has of its own: nothing, the averaged weights, nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from limbeck.teachers.base import Provision, Teacher
from limbeck.types import Head, LimbeckError, Signal, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from limbeck.models.loading import LoadedModel


@dataclass(kw_only=True)
class OfStudent(Teacher):
    """A teacher whose weights are in memory as the student's, or share them.

    Attributes:
        start: the same teacher before training: its tokenizer and its files.
        network: the model that is asked.
    """

    start: Teacher
    network: nn.Module

    @classmethod
    def of(cls, start: Teacher, network: nn.Module, **options: Any) -> OfStudent:
        return cls(model=start.model, device=start.device, start=start, network=network, **options)

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"hidden", "weights", "writing"})

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.start.tokenizer

    @property
    def head(self) -> Head:
        """The head as it is now, without its gradient."""
        from limbeck.models.heads import head_of
        from limbeck.models.vocabulary import real_vocab_size

        head = head_of(self.network, real_vocab_size(self.tokenizer), verify=False)
        bias_V = None if head.bias_V is None else head.bias_V.detach()
        return replace(head, weight_VD=head.weight_VD.detach(), bias_V=bias_V)

    def signal(self, batch: TokenBatch) -> Signal:
        from limbeck.models.forward import evaluating
        from limbeck.teachers.local import LocalTeacher

        with evaluating(self.network):
            return LocalTeacher(self.network, self.head).signal(batch)  # type: ignore[arg-type]

    def weights(self) -> LoadedModel:
        from limbeck.models.fingerprints import tokenizer_fingerprint
        from limbeck.models.loading import LoadedModel, Provenance

        provenance = Provenance(
            name=self.model.model,
            kind="student",
            location="",
            revision=None,
            fingerprint=self.start.fingerprint,
            parameters=self.start.size or 0,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            architecture=type(self.network).__name__,
            license=None,
        )
        return LoadedModel(model=self.network, tokenizer=self.tokenizer, provenance=provenance)  # type: ignore[arg-type]


def base_under_adapters(student: nn.Module) -> nn.Module:
    """The model below a student's adapters, on the student's own frozen weights.

    Raises:
        LimbeckError: the student has no adapters, or trains more than them.
    """
    from peft import PeftModel

    trained = [name for name, weight in student.named_parameters() if weight.requires_grad and "lora_" not in name]
    if not isinstance(student, PeftModel) or trained:
        raise LimbeckError("the student has no base that stays as it is; expected one that trains adapters alone")
    twin = _twin(student, (weight for weight in student.parameters() if not weight.requires_grad))
    return twin.unload().eval()


@dataclass(kw_only=True)
class MovingAverage:
    """The moving average of a student's weights, in float32, and a model with it.

    Attributes:
        decay: share of the average that stays in a step; the rest comes from the student.
        network: the model with the average; what is not trained is the student's own.
    """

    student: nn.Module
    decay: float
    network: nn.Module
    _mean: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, student: nn.Module, decay: float) -> MovingAverage:
        twin = _twin(student, (weight for weight in student.parameters() if not weight.requires_grad))
        average = cls(student=student, decay=decay, network=twin.requires_grad_(False).eval())
        average.begin()
        return average

    def begin(self) -> None:
        """Begin as the student is now."""
        import torch

        from limbeck.models.whole import whole_tensor

        theirs = dict(self.network.named_parameters())
        for name, weight in self._trained(self.student):
            shown = theirs[name].detach()
            # In float32 the model's own tensor is the average.
            kept = shown if shown.dtype == torch.float32 else torch.empty_like(shown, dtype=torch.float32)
            self._mean[name] = kept.copy_(whole_tensor(weight))
        self._show()

    def follow(self) -> None:
        """Take the student's weights in after a step."""
        from limbeck.models.whole import whole_tensor

        for name, weight in self._trained(self.student):
            self._mean[name].lerp_(whole_tensor(weight).float(), 1 - self.decay)
        self._show()

    def state(self) -> dict[str, Tensor]:
        """The average by the names of the student's weights."""
        return dict(self._mean)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an average that `state` gave.

        Raises:
            LimbeckError: it is of another student.
        """
        shapes = {name: value.shape for name, value in self._mean.items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise LimbeckError("a moving average of other weights than the student trains; delete the checkpoints")
        for name, value in state.items():
            self._mean[name].copy_(value)
        self._show()

    def _show(self) -> None:
        """Put the average into the model, in the precision of its weights."""
        for name, shown in self.network.named_parameters():
            if name in self._mean and shown.dtype != self._mean[name].dtype:
                shown.detach().copy_(self._mean[name])

    def _trained(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _twin(model: nn.Module, shared: Iterable[Tensor]) -> Any:
    """A copy of a model that shares some of its weights, and all its buffers."""
    known = {id(tensor): tensor for tensor in (*shared, *model.buffers())}
    return copy.deepcopy(model, known)
