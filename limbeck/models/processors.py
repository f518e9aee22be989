"""Processors of image-text models: which models read images, what stands for an image in a text, and its tokens.

A prompt's ids hold one placeholder for each image. Each model's own processor says which tokens stand for the image
instead, and what the vision tower is given: all of its outputs, whatever they are called.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.models.folders import read_json_object
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.models.sources import Source
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_FILES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
# What a processor needs beside the tokenizer's files; copied as they are when a student is saved.
PROCESSOR_FILES = (*_FILES, "video_preprocessor_config.json")
_PLACEHOLDER = "limbeck_placeholder"
# Of a picture that every processor reads, also one that takes it as it is: a multiple of 28 and of 32.
_PLAIN_SIDE = 224
# The same quantity in a processor and in the configuration of the vision tower.
_SHARED = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
_OF_THE_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """The token that stands for an image in a text."""

    token: str
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInput:
    """An image as a model is given it.

    Attributes:
        ids: the tokens that take the placeholder's place.
        inputs: what the vision tower is given: pixel_values, image_grid_thw, image_sizes, pixel_attention_mask, ...
    """

    ids: tuple[int, ...]
    inputs: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.inputs.values())


def reads_images(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a model that reads images and text.

    Models that transformers also has as causal language models (Gemma 3) are read as those.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    named = config.architectures[0] if config.architectures else None
    if named is None:
        named = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
        return named is not None and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    text = {one for one in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(one, str)}
    both = {one for one in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() if isinstance(one, str)}
    return named in both and named not in text


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that makes models of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def image_token_id(config: PretrainedConfig) -> int | None:
    """The id that a model takes for an image, by its configuration."""
    fields: Any = config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(fields, name, None), int):
            return found
    return None


def give_placeholder(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Let the tokenizer of an image-text model know its placeholder and its chat template, in place.

    Raises:
        LimbeckError: it has no token of the id that its configuration names.
    """
    from transformers import AutoConfig

    if source.gguf is not None or not has_processor(source):
        return
    with quiet_transformers():
        config = AutoConfig.from_pretrained(source.directory)
    if not reads_images(config):
        return
    index = image_token_id(config)
    token: Any = None if index is None else tokenizer.convert_ids_to_tokens(index)
    if index is None or not isinstance(token, str):
        raise LimbeckError(
            f"{source.name} reads images, but its tokenizer has no token for one (config.json says {index}); "
            "use the tokenizer that belongs to the model"
        )
    setattr(tokenizer, _PLACEHOLDER, Placeholder(token, index))
    # Where processors had their template before they shared it with the tokenizer.
    path = source.directory / "chat_template.json"
    if tokenizer.chat_template is None and path.is_file():
        tokenizer.chat_template = read_json_object(path).get("chat_template")


def placeholder_of(tokenizer: Any) -> Placeholder | None:
    """What stands for an image in the texts of a tokenizer; None where its model reads text alone."""
    return getattr(tokenizer, _PLACEHOLDER, None)


def has_processor(source: Source) -> bool:
    """Whether the files of a processor lie beside a model."""
    return any((source.directory / name).is_file() for name in _FILES)


def require_processor(source: Source, config: PretrainedConfig) -> None:
    """See that a model that reads images has a processor; without one it cannot be loaded.

    Raises:
        LimbeckError: it has none.
    """
    if reads_images(config) and not has_processor(source):
        raise LimbeckError(
            f"{source.name} has no processor (preprocessor_config.json is missing); save one there with "
            "processor.save_pretrained"
        )


def source_processor(source: Source, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor that lies beside an image-text model, with the tokenizer that is given.

    Raises:
        LimbeckError: there is none, it cannot be read, or it belongs to another model.
    """
    from limbeck.models.images import require_pillow

    require_pillow()
    require_processor(source, config)
    try:
        with quiet_transformers():
            processor = _load(source, config, tokenizer)
    except LimbeckError:
        raise
    except Exception as error:  # whatever transformers raises over damaged files or packages that are not there
        raise LimbeckError(
            f"{source.name}: its processor cannot be read: {one_line(error)[:300]}; check its files, or install what "
            "it needs: pip install 'limbeck[vision]'"
        ) from error
    placeholder = _require_belonging(source, config, processor, placeholder_of(tokenizer))
    _require_reading(source, processor, placeholder)
    return processor


def _load(source: Source, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor of the class that its files name, else of the model's own."""
    from transformers import AutoImageProcessor, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # pyright: ignore[reportPrivateImportUsage]

    fields: dict[str, Any] = dict(ProcessorMixin.get_processor_dict(str(source.directory))[0])
    name = fields.get("processor_class") or _of_preprocessor(source) or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    expected = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if expected is not None and name != expected:
        raise LimbeckError(
            f"{source.name} is a {config.model_type} model and its processor a {name}, expected a {expected}: it "
            "belongs to another model; download the processor's files again"
        )
    cls: Any = ProcessorMixin.get_possibly_dynamic_module(name)
    # A copy: some processors add tokens to what they are given.
    parts: dict[str, Any] = {"tokenizer": copy.deepcopy(tokenizer)}
    parts["image_processor"] = AutoImageProcessor.from_pretrained(source.directory)
    wanted = list(cls.get_attributes())
    if "video_processor" in wanted:
        cls, parts["video_processor"] = _without_videos(cls), None
    if missing := [part for part in wanted if part not in parts]:
        raise LimbeckError(f"{source.name}: its processor also has a {missing[0]}; only images and text are read here")
    for given in ("processor_class", "auto_map", "chat_template", *wanted):
        fields.pop(given, None)
    return cls(**parts, **fields)


def _of_preprocessor(source: Source) -> str | None:
    path = source.directory / "preprocessor_config.json"
    return read_json_object(path).get("processor_class") if path.is_file() else None


def _without_videos(cls: Any) -> Any:
    """A class of processors that wants none for videos, which nothing here reads: that one would need torchvision."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else super(made, self).check_argument_for_proper_class(name, argument)

    made = type(cls.__name__, (cls,), {"check_argument_for_proper_class": check})
    return made


def _require_belonging(
    source: Source, config: PretrainedConfig, processor: Any, placeholder: Placeholder | None
) -> Placeholder:
    """See that processor and model take the same token for an image and cut it into the same patches; returns it."""
    token = getattr(processor, "image_token", None)
    if placeholder is None or str(token) != placeholder.token:
        raise LimbeckError(
            f"{source.name}: its processor writes {token} for an image and its model reads "
            f"{placeholder.token if placeholder else 'none'}; they do not belong together: download both again"
        )
    tower: Any = getattr(config, "vision_config", None)
    for own, of_tower in _SHARED.items():
        said = getattr(processor, own, None)
        said = getattr(processor.image_processor, own, None) if said is None else said
        there = getattr(tower, of_tower, None)
        if isinstance(said, int) and isinstance(there, int) and said != there:
            raise LimbeckError(
                f"{source.name}: its processor has {own} {said} and its vision tower {there}; they do not belong "
                "together: download both again"
            )
    return placeholder


def _require_reading(source: Source, processor: Any, placeholder: Placeholder) -> None:
    """See that a processor reads a plain picture, so that what it refuses later is the fault of an image."""
    from PIL import Image

    picture = Image.new("RGB", (_PLAIN_SIDE, _PLAIN_SIDE), "grey")
    try:
        with quiet_transformers():
            plain_inputs(processor, [placeholder.token], [picture])
    except ImportError as error:
        raise LimbeckError(
            f"{source.name}: its processor cannot be used: {one_line(error)[:300]}; install what it needs: "
            "pip install 'limbeck[vision]'"
        ) from error
    except Exception as error:  # each processor has its own
        raise LimbeckError(
            f"{source.name}: its {type(processor).__name__} with {type(processor.image_processor).__name__} "
            f"(preprocessor_config.json) reads no picture at all ({one_line(error)[:200]}): the file belongs to "
            "another model or is damaged; download the processor's files again"
        ) from error


def image_input(processor: Any, placeholder: Placeholder, picture: Any, where: str) -> ImageInput:
    """What a processor makes of one image.

    Raises:
        LimbeckError: it refuses the image (Qwen2-VL: sides of more than 200 to 1).
    """
    try:
        with quiet_transformers():
            made = plain_inputs(processor, [placeholder.token], [picture])
    except Exception as error:  # each processor has its own
        raise LimbeckError(
            f"{where}: {type(processor).__name__} refuses the image ({one_line(error)[:200]}); change or drop it"
        ) from error
    ids = made["input_ids"][0].tolist()
    return ImageInput(ids=tuple(ids), inputs={name: value for name, value in made.items() if name not in _OF_THE_TEXT})


def plain_inputs(processor: Any, texts: Sequence[str], pictures: Sequence[Any]) -> dict[str, Any]:
    """What a processor makes of one text with its images: the naive way, ids and pixels together."""
    return dict(processor(text=list(texts), images=list(pictures), return_tensors="pt", add_special_tokens=False))
