"""A teacher whose weights are in this process: loaded when first needed, freed on request."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic.dataclasses import dataclass

from limbeck.fields import NEUTRAL, STRICT, Count
from limbeck.runtime.memory import give_back_freed
from limbeck.teachers.base import Provision, Teacher, TeacherModel
from limbeck.types import Head, LimbeckError, Signal, TokenBatch

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress
    from limbeck.models.loading import LoadedModel
    from limbeck.teachers.local import LocalTeacher


@dataclass(config=STRICT, kw_only=True)
class InProcess:
    """The model runs in this process."""

    max_tokens_per_batch: Annotated[Count | None, NEUTRAL] = None
    """Tokens of a forward pass at most, padding included, where responses are scored; a longer one is alone. Null
    scores batches as they come: 16 responses, or those of a micro-batch."""

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> InProcessTeacher:
        """Open the teacher; nothing is loaded yet."""
        return InProcessTeacher(model=model, device=device, progress=progress, max_tokens=self.max_tokens_per_batch)


@dataclasses.dataclass(kw_only=True)
class InProcessTeacher(Teacher):
    """A teacher model in this process, which provides everything."""

    max_tokens: int | None = None
    _loaded: LoadedModel | None = None
    _local: LocalTeacher | None = None

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"hidden", "weights", "writing"})

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._loaded is not None

    def weights(self) -> LoadedModel:
        return self._model()

    def _model(self) -> LoadedModel:
        from limbeck.models.vision import bind_images

        if self._loaded is None:
            self._loaded = self._load()
            if self.images is not None:
                bind_images(self._loaded.model, self.images)
        return self._loaded

    def reach(self) -> None:
        """Check that its weights can be kept in few bits, where they are to be.

        Raises:
            LimbeckError: the library is not installed, or its file is a GGUF file.
        """
        from limbeck.models.few_bits import require_library

        if self.model.bits is not None:
            require_library(self.model.bits)
            if self._source().gguf is not None:
                raise LimbeckError(
                    f"teacher.bits={self.model.bits} rounds weights as they are read from safetensors files, and "
                    f"{self.model.model} is a GGUF file, which is unpacked whole; name a folder, or remove teacher.bits"
                )

    def _load(self) -> LoadedModel:
        if self.model.bits is not None:
            # What lies in few bits is made on its device.
            return self._read(device_map={"": str(self.device)}, bits=self.model.bits)
        loaded = self._read()
        loaded.model.to(self.device)  # type: ignore[arg-type]
        return loaded

    def _read(self, **placing: Any) -> LoadedModel:
        from limbeck.models.loading import load_model

        model = self.model
        return load_model(
            model.model,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            revision=model.revision,
            progress=self.progress,
            **placing,
        )

    @property
    def head(self) -> Head:
        """The head of the model in memory; else the head alone, read from its file."""
        if not self.loaded and (head := self._stored_head) is not None:
            return head
        return self._scorer().head

    @cached_property
    def _stored_head(self) -> Head | None:
        from dataclasses import replace

        from limbeck.models.loading import as_dtype
        from limbeck.models.skeleton import stored_head
        from limbeck.models.vocabulary import real_vocab_size

        dtype, vocab_size = as_dtype(self.model.dtype), real_vocab_size(self.tokenizer)
        head = stored_head(self._source(weights=True), self.skeleton, vocab_size, dtype)
        if head is None:
            return None
        bias_V = None if head.bias_V is None else head.bias_V.to(self.device)
        return replace(head, weight_VD=head.weight_VD.to(self.device), bias_V=bias_V)

    @property
    def state_width(self) -> int:
        """The same, known without weights; 0 for a model without a head."""
        embeddings = self.skeleton.get_output_embeddings()
        return 0 if embeddings is None else embeddings.weight.shape[1]

    def signal(self, batch: TokenBatch) -> Signal:
        return self._scorer().signal(batch)

    def release(self) -> None:
        held = self._loaded is not None
        self._loaded = self._local = None
        vars(self).pop("_stored_head", None)
        if held:
            give_back_freed()

    def _scorer(self) -> LocalTeacher:
        from limbeck.models.heads import head_of
        from limbeck.models.vocabulary import real_vocab_size
        from limbeck.teachers.local import LocalTeacher

        if self._local is None:
            model = self._model().model
            self._local = LocalTeacher(model, head_of(model, real_vocab_size(self.tokenizer)), self.max_tokens)
        return self._local
