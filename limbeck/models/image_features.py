"""Images of a run for one model: the tokens that its processor makes of them, the features of its vision tower.

The features of a tower that is not trained are computed once an image and kept, bounded in memory. Each image goes
through the tower by itself, so that its features do not depend on what else is in a batch. Where the projector behind
a frozen tower is trained, it is the tower's output that is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.models.images import ImageFolder
from limbeck.models.processors import ImageInput, Placeholder, image_input
from limbeck.types import LimbeckError

TrainedPart = Literal["tower", "projector", "nothing"]

KEPT_BYTES = 2 * 2**30
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


class Kept:
    """Tensors by name, the least recently used forgotten first where they take too much memory."""

    def __init__(self, most: int):
        self.most, self.size = most, 0
        self._of: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, name: str) -> Any:
        if name not in self._of:
            return None
        self._of.move_to_end(name)
        return self._of[name][0]

    def put(self, name: str, value: Any, size: int) -> None:
        if size > self.most:
            return
        self._of[name] = (value, size)
        self.size += size
        while self.size > self.most:
            self.size -= self._of.popitem(last=False)[1][1]


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

    def input(self, name: str) -> ImageInput:
        """An image as the model is given it."""
        found = self._inputs.get(name)
        if found is None:
            assert self.folder is not None, "bind_images comes before any image"
            found = image_input(self.processor, self.placeholder, self.folder.open(name), f"image {name}")
            self._inputs.put(name, found, found.bytes)
            self._ids[name] = found.ids
        return found

    def ids_of(self, name: str) -> tuple[int, ...]:
        """The tokens that stand for an image."""
        return self._ids[name] if name in self._ids else self.input(name).ids

    def expand(self, ids: Sequence[int], images: Sequence[str], written: Sequence[bool] = ()) -> ExpandedRow:
        """A row with its placeholders replaced.

        Args:
            written: for each id whether the answer's author wrote it: what a model writes is never an image.

        Raises:
            LimbeckError: another number of placeholders than of images.
        """
        places = [i == self.placeholder.id and not (written and written[t]) for t, i in enumerate(ids)]
        if sum(places) != len(images):
            raise LimbeckError(
                f"a prompt has {sum(places)} placeholders {self.placeholder.token} for {len(images)} images; "
                "its chat template changes their number: use the model's own"
            )
        out: list[int] = []
        marks: list[bool] = []
        last: list[int] = []
        left = iter(images)
        for index, placed in zip(ids, places, strict=True):
            own = self.ids_of(next(left)) if placed else (index,)
            out += own
            marks += [placed and i == self.placeholder.id for i in own]
            last.append(len(out) - 1)
        return ExpandedRow(ids=tuple(out), from_image=tuple(marks), images=tuple(images), last=tuple(last))

    def features(self, model: Any, names: Sequence[str]) -> Tensor:
        """The features of images, one after another, one for each image token: (tokens, D).

        Gradients reach what is trained on the way from pixels to features.
        """
        trained = _trained_part(model)
        return torch.cat([self._features_of(model, name, trained) for name in names])

    def _features_of(self, model: Any, name: str, trained: TrainedPart) -> Tensor:
        if trained == "tower":
            found = self._computed(model, name)
        elif trained == "projector":
            output = self._features.get(name)
            if output is None:
                output = self._tower_output(model, name)
                self._features.put(name, output, sum(tensor.nbytes for _, tensor in _named(output)))
            with _answering(vision_tower(model), output):
                found = self._projected(model, name)
        else:
            found = self._features.get(name)
            if found is None:
                with torch.inference_mode(False), torch.no_grad():
                    found = self._computed(model, name)
                self._features.put(name, found, found.nbytes)
        if len(found) != sum(i == self.placeholder.id for i in self.ids_of(name)):
            raise LimbeckError(
                f"the processor of {type(model).__name__} makes {self.ids_of(name).count(self.placeholder.id)} tokens "
                f"of an image and its vision tower {len(found)} features; they do not belong together"
            )
        return found

    def _computed(self, model: Any, name: str) -> Tensor:
        self.computed += 1
        return self._projected(model, name)

    def _projected(self, model: Any, name: str) -> Tensor:
        """Features by the model's own method, given everything that its processor made."""
        weight = next(vision_tower(model).parameters())
        inputs = {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in self.input(name).inputs.items()
        }
        made = model.get_image_features(**inputs)
        found = getattr(made, "pooler_output", made)
        return torch.cat([part.flatten(0, -2) for part in ([found] if isinstance(found, Tensor) else found)])

    def _tower_output(self, model: Any, name: str) -> Any:
        """What the vision tower gives for an image, without the parts of it that nothing reads."""
        seen: list[Any] = []
        # A copy: models write into what their tower gives.
        handle = vision_tower(model).register_forward_hook(lambda _, args, output: seen.append(_replaced(output, {})))
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._computed(model, name)
        finally:
            handle.remove()
        (output,) = seen
        if self._read is None:
            self._read = self._places_read(model, name, output)
        return _replaced(output, {place: None for place, _ in _named(output) if place not in self._read})

    def _places_read(self, model: Any, name: str, output: Any) -> tuple[Any, ...]:
        """The places of a tower's output that features are made of: those that a gradient reaches."""
        with torch.inference_mode(False), torch.enable_grad():
            named = {place: tensor.detach().clone().requires_grad_() for place, tensor in _named(output)}
            with _answering(vision_tower(model), _replaced(output, named)):
                features = self._projected(model, name)
            grads = torch.autograd.grad(features.float().sum(), list(named.values()), allow_unused=True)
        return tuple(place for place, grad in zip(named, grads, strict=True) if grad is not None)


def _named(output: Any) -> Iterator[tuple[Any, Tensor]]:
    """The floating tensors of a tower's output by key and place."""
    items = output.items() if hasattr(output, "items") else enumerate(output if isinstance(output, tuple) else [output])
    for key, value in items:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield (key, None), value
        elif isinstance(value, tuple | list):
            for i, inner in enumerate(value):
                if isinstance(inner, Tensor) and inner.is_floating_point():
                    yield (key, i), inner


def _replaced(output: Any, named: Mapping[Any, Tensor | None]) -> Any:
    """An output of the same kind with other tensors at some places."""

    def of(key: Any, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(named.get((key, i), inner) for i, inner in enumerate(value))
        return named.get((key, None), value)

    if hasattr(output, "items"):
        return type(output)(**{key: of(key, value) for key, value in output.items()})
    if isinstance(output, tuple):
        return tuple(of(i, value) for i, value in enumerate(output))
    return of(0, output)


@contextmanager
def _answering(tower: nn.Module, output: Any) -> Iterator[None]:
    """A tower that gives what it gave before."""
    before = tower.__dict__.get("forward")
    tower.forward = lambda *args, **kwargs: _replaced(output, {})
    try:
        yield
    finally:
        del tower.forward
        if before is not None:
            tower.forward = before


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
