"""The teacher of a run: what stages may ask of it, wherever its weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from limbeck.types import Head, LimbeckError, Signal, TokenBatch

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress
    from limbeck.models.loading import LoadedModel
    from limbeck.models.sources import Source
    from limbeck.models.vocabulary import VocabularyCard

Provision = Literal["hidden", "weights"]


@dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """Which model teaches; see `limbeck.models.loading.load_model`."""

    model: str
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False


@dataclass(kw_only=True)
class Teacher(ABC):
    """A teacher as the stages of a run see it: one for all of them.

    What can be said from the small files of its model is here and reads no weights; subclasses say what they provide
    and give it.
    """

    model: TeacherModel
    device: torch.device
    progress: DownloadProgress | None = None

    @property
    @abstractmethod
    def provides(self) -> frozenset[Provision]:
        """What it gives: "hidden" (states, by `signal`), "weights" (the model itself, in memory: it can answer)."""

    @abstractmethod
    def signal(self, batch: TokenBatch) -> Signal:
        """What it says at every loss position of the batch."""

    @cached_property
    def vocabulary(self) -> VocabularyCard:
        """Its tokens."""
        from limbeck.models.vocabulary import describe_vocabulary

        model = self.model
        return describe_vocabulary(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)

    @property
    def window(self) -> int | None:
        """Tokens of prompt and answer together; None where it states no limit."""
        return self.vocabulary.context_length

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes what it says."""
        return self._fingerprint_of_files

    @cached_property
    def _fingerprint_of_files(self) -> str:
        from limbeck.models.fingerprints import model_fingerprint

        return model_fingerprint(self._source(weights=True))

    @cached_property
    def tokenizer(self) -> Any:
        from limbeck.models.loading import source_tokenizer

        return source_tokenizer(self._source(), trust_remote_code=self.model.trust_remote_code)

    @cached_property
    def skeleton(self) -> Any:
        """The model without its weights: modules, shapes, settings of generation."""
        from limbeck.models.skeleton import skeleton_of

        return skeleton_of(self._source(), trust_remote_code=self.model.trust_remote_code)

    @property
    def size(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @property
    def blocks(self) -> int | None:
        """Blocks of the model; None where its configuration does not say."""
        return getattr(self.skeleton.config, "num_hidden_layers", None)

    @property
    def bytes_on_disk(self) -> int:
        """Size of its files of weights."""
        from limbeck.models.fingerprints import weight_files

        return sum(path.stat().st_size for path in weight_files(self._source(weights=True)))

    @property
    def head(self) -> Head:
        """What projects the hidden states of its signal.

        Raises:
            LimbeckError: it gives none.
        """
        raise self.lacks("hidden")

    def weights(self) -> LoadedModel:
        """The model in memory, loaded if it is not there; for samplers, and for students that are made of it.

        Raises:
            LimbeckError: it does not provide them.
        """
        raise self.lacks("weights")

    def release(self) -> None:
        """Let go of the weights, where they are in memory; the next use loads them again."""
        return

    def _source(self, *, weights: bool = False) -> Source:
        from limbeck.models.sources import resolve

        model = self.model
        return resolve(
            model.model,
            revision=model.revision,
            weights=weights,
            trust_remote_code=model.trust_remote_code,
            progress=self.progress,
        )

    def lacks(self, what: Provision) -> LimbeckError:
        """The error of a teacher that is asked for what it does not provide."""
        return LimbeckError(
            f"teacher {self.model.model} provides {', '.join(sorted(self.provides)) or 'nothing'}, expected {what}; "
            "set teacher.where=in_process"
        )


class TeacherLocation(Protocol):
    """A member of the registry: where a teacher is. Its fields are options."""

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> Teacher:
        """The teacher, without loading anything yet."""
        ...
