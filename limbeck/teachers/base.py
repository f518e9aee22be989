"""The teacher of a run: its interface to the stages, wherever its weights are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from limbeck.models.few_bits import Bits
from limbeck.types import Head, LimbeckError, Response, Sampling, Signal, Support, TokenBatch, TokenPrompt

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress
    from limbeck.models.loading import LoadedModel
    from limbeck.models.sources import Source
    from limbeck.models.vocabulary import VocabularyCard

Provision = Literal["hidden", "topk", "weights", "writing", "captured", "answers", "replies"]


@dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """Name and loading options of the teacher's model; see `limbeck.models.loading.load_model`.

    Attributes:
        name: the model as the recipe names it, where its files are those of another.
        bits: of the weights of its linear layers, where they are rounded as they are read.
    """

    model: str
    name: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    bits: Bits | None = None


@dataclass(kw_only=True)
class Teacher(ABC):
    """Base class of teachers. A run has one for all of its stages.

    What can be said from the small files of its model is here and reads no weights; subclasses say what they provide
    and give it.

    Attributes:
        images: folder with the images of the run, for models that read any.
        support: what the run keeps of each position, for a teacher that can be asked for no more than that.
        support_k: tokens of each position, for a teacher that says no more.
        student_k: those that are chosen for each position, which it is asked for beside (`TokenBatch.chosen_NS`).
        asked: folder for answers that are on their way into a store, for a teacher that is asked over a network; None
            keeps none.
        paid: file for replies that cost money.
    """

    model: TeacherModel
    device: torch.device
    progress: DownloadProgress | None = None
    images: Path | None = None
    support: Support = "topk_tail"
    support_k: int = 64
    student_k: int = 0
    asked: Path | None = None
    paid: Path | None = None

    @property
    @abstractmethod
    def provides(self) -> frozenset[Provision]:
        """What it can provide: "hidden" (states, by `signal`), "topk" (no more than its likeliest tokens, by
        `signal`), "weights" (the whole model in memory, by `weights`), "writing" (a model that answers in
        this process, by `writing`), "captured" (the signal of texts that were captured, and of no others), "answers"
        (what it has written before, by `answers`), "replies" (texts that it writes when it is asked, elsewhere)."""

    @abstractmethod
    def signal(self, batch: TokenBatch) -> Signal:
        """The teacher signal at every loss position of the batch."""

    def read_stored(self, batch: TokenBatch) -> Signal | None:
        """The same from disk, see `limbeck.types.StoredSource`; None where it must compute or ask for it."""
        return None

    @cached_property
    def vocabulary(self) -> VocabularyCard:
        """Its vocabulary, read without weights."""
        from limbeck.models.vocabulary import describe_vocabulary

        model = self.model
        return describe_vocabulary(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)

    @property
    def window(self) -> int | None:
        """The most tokens of prompt and response together; None where it has no limit."""
        return self.vocabulary.context_length

    @property
    def fingerprint(self) -> str:
        """A hash of everything that its signal depends on."""
        return self._fingerprint_of_files

    @cached_property
    def _fingerprint_of_files(self) -> str:
        from limbeck.models.few_bits import FORMATS
        from limbeck.models.fingerprints import model_fingerprint
        from limbeck.runtime.records import fingerprint

        files, bits = model_fingerprint(self._source(weights=True)), self.model.bits
        if bits is None:
            return files
        return fingerprint({"files": files, "library": FORMATS[bits].library, "format": FORMATS[bits].name})

    @cached_property
    def configuration_hash(self) -> str:
        """Hash of its config.json, which is known without the weights; empty where it has none."""
        from limbeck.runtime.hashing import sha256_of

        source = self._source()
        return "" if source.gguf is not None else sha256_of(source.directory / "config.json")

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
    def size(self) -> int | None:
        """Parameters, tied ones counted once; None where that is not known."""
        return sum(parameter.numel() for parameter in self.skeleton.parameters())

    @property
    def blocks(self) -> int | None:
        """Blocks of the model; None where its configuration does not say."""
        return getattr(self.skeleton.config.get_text_config(), "num_hidden_layers", None)

    @property
    def state_width(self) -> int:
        """Numbers of a hidden state of its signal; 0 where it gives none."""
        return self.head.weight_VD.shape[1]

    @property
    def bytes_on_disk(self) -> int | None:
        """Size of its files of weights; None where that is not known."""
        from limbeck.models.fingerprints import weight_files

        return sum(path.stat().st_size for path in weight_files(self._source(weights=True)))

    @property
    def head(self) -> Head:
        """The head for the hidden states of its signal.

        Raises:
            LimbeckError: it gives none.
        """
        raise self.lacks("hidden")

    def weights(self) -> LoadedModel:
        """The whole model in memory, loaded on first use; for students that are made of it, and to be timed.

        Raises:
            LimbeckError: it does not provide them.
        """
        raise self.lacks("weights")

    def writing(self) -> LoadedModel:
        """The model that answers prompts in this process, loaded on first use; parts of it may be elsewhere.

        Raises:
            LimbeckError: it does not provide one.
        """
        return self.weights()

    def answers(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        """The answers that it has written to some prompts, where it cannot write any now.

        Raises:
            LimbeckError: it has none.
        """
        raise self.lacks("answers")

    def check(self) -> None:
        """Check what can be known to be wrong before anything is asked of it.

        Raises:
            LimbeckError: what it was made from is not what it is to stand for.
        """
        return

    @property
    def scorer(self) -> Teacher:
        """The teacher that scores what `reads` gives: itself, where it is not one in front of another."""
        return self

    @property
    def in_step(self) -> bool:
        """Whether all ranks of the launch pass through it together, so that none can ask it alone."""
        return False

    @property
    def elsewhere(self) -> bool:
        """Whether it computes in another process, so that it can be asked in one thread while another one trains."""
        return False

    def attend(self) -> None:
        """Take part, where ranks pass in step, in the passes of the others, until none has anything to score."""
        return

    def reads(self, batch: TokenBatch) -> TokenBatch:
        """The batch as the teacher reads it: with the same responses, maybe behind other prompts."""
        return batch

    def locate(self, batches: Iterable[TokenBatch]) -> None:
        """Check that it has the signal of some batches, where it cannot make any.

        Raises:
            LimbeckError: it lacks one.
        """
        return

    def release(self) -> None:
        """Free the weights, where they are in memory; the next use loads them again."""
        return

    def reach(self) -> None:
        """Check that it can be used, where that takes more than looking at files.

        Raises:
            LimbeckError: it cannot.
        """
        return

    def fetch_ahead(self, batches: Iterable[TokenBatch], done: Callable[[int], None]) -> None:
        """Prepare the signals of batches that are asked for next, where several can be under way at a time.

        Args:
            done: called with the number of tokens of each part that is ready.
        """
        return

    def settled(self, batches: Iterable[TokenBatch] | None = None) -> None:
        """Called when what it said of some batches is on disk, so that it need not be kept twice; None is of all."""
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
        """The error for a request that the teacher cannot serve."""
        return LimbeckError(
            f"teacher {self.model.model} provides {', '.join(sorted(self.provides)) or 'nothing'}, expected {what}; "
            "set teacher.where=in_process"
        )


class TeacherLocation(Protocol):
    """A member of the registry: a kind of location of the teacher. Its fields are options."""

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> Teacher:
        """Open the teacher, without loading anything yet."""
        ...
