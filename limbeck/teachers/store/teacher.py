"""A teacher whose signals lie in a store: no weights of it are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from limbeck.fields import NEUTRAL
from limbeck.teachers.base import Provision, Teacher, TeacherModel
from limbeck.types import (
    Head,
    Json,
    LimbeckError,
    Response,
    Sampling,
    Signal,
    TokenBatch,
    TokenPrompt,
    as_asked,
    shared_ids,
)

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress
    from limbeck.teachers.store.manifest import Manifest
    from limbeck.teachers.store.reader import Store
    from limbeck.teachers.store.source import StoredSignals
    from limbeck.teachers.store.texts import Text


@dataclass(frozen=True, kw_only=True)
class InStore:
    """Signals that `limbeck store` has captured; `teacher.model` gives its tokenizer and its window alone.

    Attributes:
        path: the folder of the store. It may be moved without anything being done again.
    """

    path: Annotated[str, NEUTRAL]

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> StoreTeacher:
        """Open the store; nothing is read yet."""
        return StoreTeacher(model=model, device=device, progress=progress, path=Path(self.path).expanduser())


def sampling_tree(sampling: Sampling) -> Json:
    """How answers were sampled, as a store keeps it."""
    return asdict(sampling) | {"stop": list(sampling.stop)}


def _response(prompt: TokenPrompt, text: Text, sampling: Sampling) -> Response:
    return Response(
        prompt_id=prompt.id,
        author="teacher",
        prompt_ids=prompt.ids,
        response_ids=shared_ids(text.ids[text.prompt :]),
        stop=text.stop,
        sampling=sampling,
        split=prompt.split,
        images=prompt.images,
    )


@dataclass(kw_only=True)
class StoreTeacher(Teacher):
    """A teacher that gives the signals of the texts in a store, and of no others.

    Attributes:
        path: the folder of the store.
    """

    path: Path

    @property
    def provides(self) -> frozenset[Provision]:
        return frozenset({"captured", "answers"}) if self._store.samplings else frozenset({"captured"})

    def answers(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        from limbeck.teachers.store.texts import prompt_key

        keys = [prompt_key(as_asked(prompt).ids, prompt.images) for prompt in prompts]
        how = sampling_tree(sampling)
        found = self._store.answers(keys, how)
        if missing := sum(key not in found for key in keys):
            others = [other for other in self._store.samplings if other != how]
            said = f"those it has were sampled with {others[0]}, " if others and missing == len(keys) else ""
            raise LimbeckError(
                f"{self.path} has no answer of the teacher to {missing} of {len(keys)} prompts with {how}; {said}"
                "add these with `limbeck store capture`, or set responses to what was captured"
            )
        return [_response(as_asked(prompt), found[key], sampling) for prompt, key in zip(prompts, keys, strict=True)]

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @cached_property
    def _store(self) -> Store:
        from limbeck.teachers.store.reader import Store

        return Store(self.path)

    @property
    def manifest(self) -> Manifest:
        return self._store.manifest

    @property
    def bytes_on_disk(self) -> int:
        """Size of the teacher's files of weights, as the store says."""
        return self.manifest.teacher.weight_bytes

    def check(self) -> None:
        """Check that the store was captured from this teacher, as far as its files here say.

        Raises:
            LimbeckError: it is another teacher's, or another tokenizer's.
        """
        from limbeck.models.fingerprints import tokenizer_fingerprint

        known = self.manifest
        ours = {
            "tokenizer": (tokenizer_fingerprint(self.tokenizer), known.tokenizer),
            "dtype": (self.model.dtype, known.teacher.dtype),
            "attn_implementation": (self.model.attn_implementation, known.teacher.attention),
            "model": (self._fingerprint_here, known.teacher.fingerprint),
            "configuration": (self.configuration_hash, known.teacher.configuration),
        }
        for what, (here, there) in ours.items():
            if here and there and here != there:
                said = f"{there[:12]} of {known.teacher.name}" if len(there) == 64 else there
                raise LimbeckError(
                    f"{self.path} was captured from another teacher ({what} {said}), but teacher.model="
                    f"{self.model.model} has {here[:12]}; set teacher.{what if what in ('dtype', 'model') else 'model'}"
                    " to that of the store, or capture a store of this one"
                )

    @property
    def _fingerprint_here(self) -> str:
        """The fingerprint of the model, where its weights lie in a folder of this machine; else empty."""
        source = self._source()
        here = source.kind == "gguf" or any(source.directory.glob("*.safetensors"))
        if source.kind == "hub" or not here:
            return ""
        return self._fingerprint_of_files

    def locate(self, batches: Iterable[TokenBatch]) -> None:
        """Look up the rows of some batches, all in one pass.

        Raises:
            LimbeckError: the store lacks one.
        """
        self._signals.locate(batches)

    def signal(self, batch: TokenBatch) -> Signal:
        return self._signals.signal(batch)

    def read_stored(self, batch: TokenBatch) -> Signal:
        return self._signals.read_stored(batch)

    @cached_property
    def _signals(self) -> StoredSignals:
        from limbeck.teachers.store.source import StoredSignals

        return StoredSignals(self._store, self.device)

    @property
    def head(self) -> Head:
        """The head of the hidden states of held-out texts.

        Raises:
            LimbeckError: the store keeps none.
        """
        if not self._signals.heads:
            raise self.lacks("hidden")
        return next(iter(self._signals.heads.values()))

    def release(self) -> None:
        """Let go of the heads; the next use reads them again."""
        vars(self).pop("_signals", None)
