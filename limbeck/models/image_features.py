"""Images of a run for one model: the tokens that its processor makes of them, the features of its vision tower.

The features of a tower that is not trained are computed once an image and kept, bounded in memory. Each image goes
through the tower by itself, so that its features do not depend on what else is in a batch. Where the projector behind
a frozen tower is trained, it is the tower's output that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.models.images import ImageFolder
from limbeck.models.processors import ImageInput, Placeholder, image_input
from limbeck.models.quiet import one_line
from limbeck.models.tower_outputs import Kept, answering, tensors_in, with_tensors
from limbeck.runtime.errors import explain
from limbeck.types import LimbeckError

TrainedPart = Literal["tower", "projector", "nothing"]

KEPT_BYTES = 2 * 2**30
_MISFIT = (
    "they do not belong together: download the processor's files again (preprocessor_config.json, "
    "processor_config.json)"
)
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpandedRow:
    """A row as one model reads it.

    Attributes:
        ids: its tokens, those of images expanded.
        from_image: for each of them whether the vision tower says what it is.
        images: ids of its images.
        last: for each id of the row as it was, the place of its last token here.
    """

    ids: tuple[int, ...]
    from_image: tuple[bool, ...]
    images: tuple[str, ...]
    last: tuple[int, ...]


@dataclass(eq=False)
class ImageReader:
    """Reads the images of a run for one model, by its processor.

    Attributes:
        files: folder of the processor's files.
        computed: how many times the vision tower was asked.
        verified: whether the model's features were compared with its own forward pass.
    """

    processor: Any
    placeholder: Placeholder
    files: Path
    folder: ImageFolder | None = None
    computed: int = 0
    verified: bool = False
    _inputs: Kept = field(default_factory=lambda: Kept(KEPT_BYTES // 4))
    _features: Kept = field(default_factory=lambda: Kept(KEPT_BYTES))
    _ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _read: tuple[Any, ...] | None = None

    def for_another(self) -> ImageReader:
        """A reader of the same images for another model with the same processor."""
        return ImageReader(processor=self.processor, placeholder=self.placeholder, files=self.files, folder=self.folder)

    def input(self, name: str, where: str = "") -> ImageInput:
        """An image as the model is given it.

        Args:
            where: names its place in messages.
        """
        found = self._inputs.get(name)
        if found is None:
            assert self.folder is not None, "bind_images comes before any image"
            found = image_input(self.processor, self.placeholder, self.folder.open(name), where or f"image {name}")
            self._inputs.put(name, found, found.bytes)
            self._ids[name] = found.ids
        return found

    def ids_of(self, name: str, where: str = "") -> tuple[int, ...]:
        """The tokens that stand for an image."""
        return self._ids[name] if name in self._ids else self.input(name, where).ids

    def expand(
        self, ids: Sequence[int], images: Sequence[str], written: Sequence[bool] = (), *, where: str = "a prompt"
    ) -> ExpandedRow:
        """A row with its placeholders replaced.

        Args:
            written: for each id whether the answer's author wrote it: what a model writes is never an image.
            where: names the row in messages.

        Raises:
            LimbeckError: another number of placeholders than of images.
        """
        places = [i == self.placeholder.id and not (written and written[t]) for t, i in enumerate(ids)]
        if sum(places) != len(images):
            raise LimbeckError(
                f"{where} has {sum(places)} placeholders {self.placeholder.token} for {len(images)} images; "
                "its chat template changes their number: use the model's own"
            )
        out: list[int] = []
        marks: list[bool] = []
        last: list[int] = []
        left = ((name, f"{where}: image {number} ({name})") for number, name in enumerate(images, start=1))
        for index, placed in zip(ids, places, strict=True):
            own = self.ids_of(*next(left)) if placed else (index,)
            out += own
            marks += [placed and i == self.placeholder.id for i in own]
            last.append(len(out) - 1)
        return ExpandedRow(ids=tuple(out), from_image=tuple(marks), images=tuple(images), last=tuple(last))

    def features(self, model: Any, names: Sequence[str]) -> Tensor:
        """The features of images, one after another, one for each image token: (tokens, D).

        Gradients reach what is trained on the way from pixels to features.
        """
        trained = _trained_part(model)
        if trained == "tower":
            return self._together(model, names)
        return torch.cat([self._features_of(model, name, trained) for name in names])

    def _together(self, model: Any, names: Sequence[str]) -> Tensor:
        """Features of a tower that is trained: images of the same shapes go through it at once."""
        by_shapes: dict[Any, list[int]] = {}
        for place, name in enumerate(names):
            inputs = self.input(name).inputs
            by_shapes.setdefault(tuple((key, value.shape[1:]) for key, value in inputs.items()), []).append(place)
        found: dict[int, Tensor] = {}
        for places in by_shapes.values():
            self.computed += len(places)
            features = self._projected(model, [names[place] for place in places])
            found |= zip(places, features.split([self._tokens_of(names[place]) for place in places]), strict=True)
        return torch.cat([found[place] for place in range(len(names))])

    def _tokens_of(self, name: str) -> int:
        return self.ids_of(name).count(self.placeholder.id)

    def _features_of(self, model: Any, name: str, trained: TrainedPart) -> Tensor:
        if trained == "projector":
            output = self._features.get(name)
            if output is None:
                output = self._tower_output(model, name)
                self._features.put(name, output, sum(tensor.nbytes for _, tensor in tensors_in(output)))
            with answering(vision_tower(model), output):
                return self._projected(model, [name])
        found = self._features.get(name)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = self._together(model, [name])
            self._features.put(name, found, found.nbytes)
        return found

    def _projected(self, model: Any, names: Sequence[str]) -> Tensor:
        """Features by the model's own method, given everything that its processor made of images of the same shapes.

        Raises:
            LimbeckError: others than the processor has tokens for.
        """
        weight = next(vision_tower(model).parameters())
        every = [self.input(name).inputs for name in names]
        inputs = {key: torch.cat([inputs[key] for inputs in every]) for key in every[0]}
        given = {k: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        with self.fitting():
            made = model.get_image_features(**given)
        pooled = getattr(made, "pooler_output", made)
        found = torch.cat([part.flatten(0, -2) for part in ([pooled] if isinstance(pooled, Tensor) else pooled)])
        expected = sum(self._tokens_of(name) for name in names)
        if len(found) != expected:
            raise LimbeckError(
                f"{self.files}: its processor makes {expected} tokens of {len(names)} images and its vision tower "
                f"{len(found)} features; {_MISFIT}"
            )
        return found

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Let what a model says to inputs of its processor be one line.

        Raises:
            LimbeckError: it fails over them.
        """
        try:
            yield
        except Exception as error:  # each architecture has its own
            if explain(error) is not None:
                raise
            raise LimbeckError(
                f"{self.files}: its model fails on what its processor makes of an image ({one_line(error)[:200]}); "
                f"{_MISFIT}"
            ) from error

    def _tower_output(self, model: Any, name: str) -> Any:
        """What the vision tower gives for an image, without the parts of it that nothing reads."""
        seen: list[Any] = []
        # A copy: models write into what their tower gives.
        handle = vision_tower(model).register_forward_hook(
            lambda _, args, output: seen.append(with_tensors(output, {}))
        )
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._together(model, [name])
        finally:
            handle.remove()
        (output,) = seen
        if self._read is None:
            self._read = self._places_read(model, name, output)
        return with_tensors(output, {place: None for place, _ in tensors_in(output) if place not in self._read})

    def _places_read(self, model: Any, name: str, output: Any) -> tuple[Any, ...]:
        """The places of a tower's output that features are made of: those that a gradient reaches."""
        with torch.inference_mode(False), torch.enable_grad():
            named = {place: tensor.detach().clone().requires_grad_() for place, tensor in tensors_in(output)}
            with answering(vision_tower(model), with_tensors(output, named)):
                features = self._projected(model, [name])
            grads = torch.autograd.grad(features.float().sum(), list(named.values()), allow_unused=True)
        return tuple(place for place, grad in zip(named, grads, strict=True) if grad is not None)


def vision_tower(model: Any) -> nn.Module:
    """The vision tower of an image-text model.

    Raises:
        LimbeckError: it has none by any of the usual names.
    """
    for part in (model, model.base_model):
        for name in _TOWERS:
            if isinstance(found := getattr(part, name, None), nn.Module):
                return found
    raise LimbeckError(f"{type(model).__name__} has no vision tower that is known; this architecture is not supported")


def _trained_part(model: Any) -> TrainedPart:
    """The first part of the way from pixels to features that gets gradients."""
    if any(parameter.requires_grad for parameter in vision_tower(model).parameters()):
        return "tower"
    head = model.get_output_embeddings()
    text = {id(p) for part in (model.get_decoder(), head) if part is not None for p in part.parameters()}
    return "projector" if any(p.requires_grad for p in model.parameters() if id(p) not in text) else "nothing"
