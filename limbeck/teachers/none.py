"""No teacher: for evaluating a student alone, and for training on the data's answers with cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from limbeck.teachers.base import Provision, Teacher, TeacherModel
from limbeck.types import Signal, TokenBatch

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress


@dataclass(frozen=True, kw_only=True)
class Nowhere:
    """No teacher at all: `teacher.model` gives its tokenizer and its window alone."""

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> NoTeacher:
        """Open a teacher without a signal."""
        return NoTeacher(model=model, device=device, progress=progress)


@dataclass(kw_only=True)
class NoTeacher(Teacher):
    """A teacher without a signal, whose tokenizer and window are known."""

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset()

    @property
    def fingerprint(self) -> str:
        return "none"

    def signal(self, batch: TokenBatch) -> Signal:
        """Nothing.

        Raises:
            LimbeckError: always.
        """
        raise self.lacks("hidden")
