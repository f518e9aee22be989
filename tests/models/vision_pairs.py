"""Two tiny image-text models with other patches, pictures in a folder, and conversations about them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.models.images import ImageFolder
from limbeck.models.loading import LoadedModel, load_model
from limbeck.models.vision import bind_images, require_reader
from limbeck.types import Author, Response
from tests.tiny_vision import QWEN, Family, scenes, write_vision_model

# Question, answer and number of images.
TALKS = (
    ("What colour?", "red", 1),
    (" How many?", "two three", 2),
    ("How many?", "one", 0),
    (" What shape?", "disc bar red", 1),
)


@dataclass(frozen=True)
class VisionPair:
    """A pair of one family on disk: the student sees larger patches, so an image has fewer tokens for it."""

    folder: Path
    family: Family

    @classmethod
    def write(cls, folder: Path, family: Family) -> VisionPair:
        write_vision_model(folder / "teacher", family, seed=1)
        write_vision_model(folder / "student", family, seed=2, patch=16, layers=1)
        return cls(folder, family)

    @cached_property
    def images(self) -> ImageFolder:
        return ImageFolder(self.folder / "images")

    def picture(self, number: int) -> str:
        """The id of a picture."""
        data = io.BytesIO()
        scenes(8)[number].draw(32 if number % 2 else 48).save(data, "PNG")
        return self.images.add(data.getvalue())

    def load(self, who: str) -> LoadedModel:
        loaded = load_model(self.folder / who)
        bind_images(loaded.model, self.images.path)
        return loaded

    def texts(self) -> list[tuple[str, str, list[str]]]:
        """Prompt, answer and pictures of each talk."""
        place = "<|vision_start|><|image_pad|><|vision_end|>" if self.family in QWEN else "<image>"
        found, number = [], 0
        for question, answer, count in TALKS:
            prompt = f"<|im_start|>user\n{place * count}{question}<|im_end|>\n<|im_start|>assistant\n"
            found.append((prompt, f"{answer}<|im_end|>", [self.picture(number + i) for i in range(count)]))
            number += count
        return found

    def responses(self, tokenizer: Any, author: Author = "data") -> list[Response]:
        """The talks with their answers."""
        return [
            Response(
                prompt_id=str(i),
                author=author,
                prompt_ids=tuple(tokenizer(prompt)["input_ids"]),
                response_ids=tuple(tokenizer(answer)["input_ids"]),
                stop="eos",
                images=tuple(images),
            )
            for i, (prompt, answer, images) in enumerate(self.texts())
        ]

    def plain_logits(self, model: Any, vocab_size: int) -> Tensor:
        """The naive line: logits at all answer tokens, from the model's own forward pass on what its processor makes
        of the whole text, a talk at a time."""
        processor, found = require_reader(model).processor, []
        for prompt, answer, images in self.texts():
            pictures = [self.images.open(name) for name in images]
            inputs = processor(text=[prompt + answer], images=pictures or None, return_tensors="pt")
            count = len(processor.tokenizer(answer)["input_ids"])
            found.append(model(**inputs).logits[0, -count - 1 : -1, :vocab_size])
        return torch.cat(found)


def labels(responses: Sequence[Response]) -> Tensor:
    """All tokens of the answers."""
    return torch.tensor([i for r in responses for i in r.response_ids])
