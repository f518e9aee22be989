"""The student: as loaded, pruned or with fresh weights; trained in full or through LoRA adapters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from limbeck.models.assets import DownloadProgress
from limbeck.models.image_features import vision_tower
from limbeck.models.loading import (
    LoadedModel,
    Provenance,
    as_dtype,
    let_read_images,
    load_model,
    source_config,
    source_tokenizer,
    unbuildable,
    without_dropout,
)
from limbeck.models.processors import auto_class, reads_images
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.models.slices import is_unread
from limbeck.models.sources import resolve
from limbeck.models.vision import attach_reader, reader_of
from limbeck.models.vocabulary import real_vocab_size
from limbeck.ops import onednn
from limbeck.student.adapters import LoraSpec, with_adapters
from limbeck.student.blocks import blocks_stay_alike, depth_prune, per_layer_fields
from limbeck.student.endings import AnswerFormat
from limbeck.student.pruning import BlockChoice, choose_blocks
from limbeck.student.quantizing import Quantization, QuantizeSpec, check_quantizing, quantized
from limbeck.student.width import WidthChoice, WidthSpec
from limbeck.student.width_importance import choose_width
from limbeck.student.width_pruning import width_prune
from limbeck.types import LimbeckError, TokenBatch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Init = Literal["pretrained", "teacher", "depth_prune", "width_prune", "scratch"]
PRUNED = ("depth_prune", "width_prune")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentSpec:
    """Specification of a student.

    Attributes:
        init: "pretrained": as loaded; "teacher": a copy of the teacher; "depth_prune": `model` without some blocks;
            "width_prune": with fewer dimensions, neurons or heads, after some blocks are left out where it says so;
            "scratch": its architecture with fresh weights.
        model: asset, directory, GGUF file or hub id; None takes the teacher. With "scratch" a directory with nothing
            but config.json and a tokenizer will do.
        layers: blocks to keep with "depth_prune", and first with "width_prune".
        keep: the blocks to keep by number; empty lets `choose_blocks` measure them.
        width: the sizes of "width_prune".
        stays: what stays of the blocks that are kept; None lets `choose_width` measure it.
        config: changes to the model configuration with "scratch" (num_hidden_layers, hidden_size, ...).
        freeze_embeddings: leave input and output embeddings as they are.
        freeze_vision: leave the vision tower of an image-text model as it is.
        seed: of fresh weights and adapters.
    """

    init: Init = "pretrained"
    model: str | None = None
    revision: str | None = None
    layers: int | None = None
    keep: tuple[int, ...] = ()
    width: WidthSpec | None = None
    stays: WidthChoice | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    lora: LoraSpec | None = None
    quantize: QuantizeSpec | None = None
    freeze_embeddings: bool = False
    freeze_vision: bool = True
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A student ready to be trained: on the CPU, in eval mode, without dropout.

    Attributes:
        model: a transformers model, or a PEFT model around one.
        source: what it was loaded from; None with fresh weights.
        blocks: which blocks were kept and why; None unless depth-pruned by measurement.
        width: what stays of each width; None unless width-pruned.
        parameters: of the student as it will be saved, tied weights counted once, adapters not counted.
        trainable: parameters that get gradients.
        teacher_parameters: None without a teacher.
        answers: what it is trained and saved with, where that is known; its tokenizer is `tokenizer`.
        quantization: what of it is kept in few bits; None where nothing is.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    source: Provenance | None
    blocks: BlockChoice | None
    parameters: int
    trainable: int
    teacher_parameters: int | None
    answers: AnswerFormat | None = None
    quantization: Quantization | None = None
    width: WidthChoice | None = None

    @property
    def share_of_teacher(self) -> float | None:
        """Student parameters over teacher parameters."""
        return None if self.teacher_parameters is None else self.parameters / self.teacher_parameters


def build_student(
    spec: StudentSpec,
    *,
    teacher: LoadedModel | None = None,
    teacher_parameters: int | None = None,
    calibration: Sequence[TokenBatch] = (),
    progress: DownloadProgress | None = None,
    unread: bool = False,
    take: bool = False,
) -> Student:
    """Build the student of a spec. The teacher is not changed.

    Args:
        teacher: needed where `spec.model` is None.
        teacher_parameters: the reference for the parameter share; None counts those of `teacher`, if there is one.
        calibration: batches of responses with their prompts; needed by "depth_prune" unless `spec.keep` is given, by
            "width_prune" unless `spec.stays` is, and by a quantisation whose grids are chosen by importance.
        unread: leave the weights in their files until the student is sharded, where nothing here reads them (see
            `limbeck.models.slices`).
        take: cut blocks out of the teacher without copies of what stays: it must not be used once the student trains.

    Raises:
        LimbeckError: options that contradict each other, an unknown configuration field, a model that cannot be had.
    """
    _check(spec, teacher)
    blocks, width, source = None, None, None
    if spec.init == "scratch":
        model, tokenizer = _from_scratch(spec, teacher)
    else:
        start = _start(spec, teacher, progress, unread=unread)
        source, tokenizer, model = start.provenance, start.tokenizer, start.model
        if spec.layers is not None or spec.keep:
            keep: Sequence[int] = spec.keep
            if not keep:
                assert spec.layers is not None
                blocks = choose_blocks(
                    model,
                    calibration,
                    spec.layers,
                    vocab_size=real_vocab_size(tokenizer),
                    progress=progress,
                )
                keep = blocks.keep
            # What was loaded for the student alone is its own.
            own = teacher is None or model is not teacher.model
            model = depth_prune(model, keep, dtype=as_dtype(spec.dtype), take=take or own)
        if spec.width is not None:
            width = spec.stays or choose_width(model, calibration, spec.width)
            model = width_prune(model, width, dtype=as_dtype(spec.dtype))
    parameters = _count(model)
    if teacher_parameters is None and teacher is not None:
        teacher_parameters = _count(teacher.model)
    freeze_parts(model, spec)
    quantization = None if spec.quantize is None else quantized(model, spec.quantize, calibration)
    trained = with_trained_parts(model, spec)
    return Student(
        model=trained.eval(),
        tokenizer=tokenizer,
        source=source,
        blocks=blocks,
        parameters=parameters,
        trainable=sum(p.numel() for p in trained.parameters() if p.requires_grad),
        teacher_parameters=teacher_parameters,
        quantization=quantization,
        width=width,
    )


def freeze_parts(model: Any, spec: StudentSpec) -> None:
    """Leave out of training what a spec leaves out of it."""
    if spec.freeze_embeddings:
        freeze_embeddings(model)
    if reader_of(model) is not None:
        vision_tower(model).requires_grad_(not spec.freeze_vision)


def with_trained_parts(model: Any, spec: StudentSpec) -> nn.Module:
    """A student with the adapters of a spec, if any, that computes activations again where it says so."""
    trained = model
    if spec.lora is not None:
        frozen = vision_tower(model) if reader_of(model) is not None and spec.freeze_vision else None
        trained = with_adapters(model, spec.lora, spec.seed, left_alone=frozen)
    if spec.gradient_checkpointing:
        _checkpoint_gradients(model)
    return trained


def freeze_embeddings(model: Any) -> None:
    """Leave input and output embeddings out of training."""
    for embedding in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        embedding.requires_grad_(False)


def _check(spec: StudentSpec, teacher: LoadedModel | None) -> None:
    if spec.model is None and teacher is None:
        raise LimbeckError("student.model is not set and there is no teacher to take it from; name a model")
    if spec.init not in get_args(Init):
        raise LimbeckError(f"student.init is {spec.init!r}; expected one of {', '.join(get_args(Init))}")
    if spec.quantize is not None:
        check_quantizing(spec.quantize, dtype=spec.dtype, init=spec.init, lora=spec.lora is not None)
    if spec.init == "depth_prune" and (spec.layers is None) == (not spec.keep):
        raise LimbeckError(
            "student.init=depth_prune needs either student.layers (how many blocks) or student.keep (which), "
            f"got layers={spec.layers} and keep={list(spec.keep)}"
        )
    if spec.init not in PRUNED and (spec.layers is not None or spec.keep):
        raise LimbeckError(f"student.layers and student.keep belong to init=depth_prune, not to init={spec.init}")
    if (spec.init == "width_prune") != (spec.width is not None):
        raise LimbeckError(
            f"student.width is what init=width_prune needs and no other reads, got width={spec.width} and "
            f"init={spec.init}"
        )
    if spec.init != "scratch" and spec.config:
        raise LimbeckError(f"student.config belongs to init=scratch, not to init={spec.init}; leave it out")


def _start(
    spec: StudentSpec, teacher: LoadedModel | None, progress: DownloadProgress | None, *, unread: bool
) -> LoadedModel:
    """The weights to start from. Pruning only reads them, so it can share the teacher's where the precision agrees."""
    # Blocks that are given can be left out unseen; all else that is cut is measured or cut up.
    cut = spec.init == "depth_prune" and bool(spec.keep)
    unread = unread and spec.quantize is None and (cut or spec.init not in PRUNED)
    if spec.model is None:
        assert teacher is not None
        same = teacher.model.dtype == as_dtype(spec.dtype)
        if spec.init in PRUNED and same:
            return teacher
    load = partial(
        load_model,
        spec.model if spec.model is not None else _teacher(teacher).provenance.name,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
        revision=spec.revision if spec.model is not None else _teacher(teacher).provenance.revision,
        progress=progress,
    )
    loaded = load(unread=unread)
    if cut and is_unread(loaded.model) and not blocks_stay_alike(loaded.model, spec.keep):
        return load()
    return loaded


def _teacher(teacher: LoadedModel | None) -> LoadedModel:
    assert teacher is not None
    return teacher


def _from_scratch(spec: StudentSpec, teacher: LoadedModel | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if spec.model is None:
        given = _teacher(teacher)
        model = fresh_model(given.model.config, spec)
        if (reader := reader_of(given.model)) is not None:
            attach_reader(model, reader.for_another())
        return model, given.tokenizer
    source = resolve(spec.model, revision=spec.revision, weights=False, trust_remote_code=spec.trust_remote_code)
    config = source_config(source, trust_remote_code=spec.trust_remote_code)
    tokenizer = source_tokenizer(source, trust_remote_code=spec.trust_remote_code)
    model = fresh_model(config, spec)
    if reads_images(config):
        let_read_images(model, source, config, tokenizer)
    return model, tokenizer


def fresh_model(config: PretrainedConfig, spec: StudentSpec) -> PreTrainedModel:
    """An architecture with the changes of `spec.config` and fresh weights; none at all under torch.device("meta").

    Raises:
        LimbeckError: no such model can be built.
    """
    config = without_dropout(changed_config(config, spec.config))
    try:
        with quiet_transformers(), torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            return auto_class(config).from_config(
                config,
                dtype=as_dtype(spec.dtype),
                attn_implementation=spec.attn_implementation,
                trust_remote_code=spec.trust_remote_code,
            )
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, AssertionError, ImportError) as error:
        # What is not installed is a kernel of attention.
        if "attention implementation" in str(error) or isinstance(error, ImportError):
            raise LimbeckError(f"{one_line(error).split('. ')[0]}; set student.attn_implementation=eager") from error
        if not spec.config and spec.width is None:
            raise unbuildable(config, error) from error
        raise LimbeckError(
            f"no model can be built from student.config={dict(spec.config)}: {one_line(error)}; make the sizes fit"
        ) from error


def changed_config(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """A copy of a configuration with some fields changed; fields that describe every block follow a new depth.

    Raises:
        LimbeckError: a field the architecture does not have (the nearest is named), or a value it refuses.
    """
    from huggingface_hub.errors import StrictDataclassError

    fields = config.to_dict()
    names = {**dict.fromkeys(fields), **dict.fromkeys(config.attribute_map)}
    for key in changes:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise LimbeckError(f"student.config.{key}: {type(config).__name__} has no such field{hint}")
    own = {config.attribute_map.get(key, key): _merged(fields.get(key), value) for key, value in changes.items()}
    if own.get(config.attribute_map.get("num_hidden_layers", "num_hidden_layers")) is not None:
        # The class writes these lists anew for the new depth.
        fields = {key: value for key, value in fields.items() if key not in per_layer_fields(config)}
    # One head's width is stored beside the sizes it follows from.
    if {"hidden_size", "num_attention_heads"} & own.keys() and "head_dim" not in own and fields.get("head_dim"):
        derived = fields["hidden_size"] // fields["num_attention_heads"]
        if fields["head_dim"] == derived:
            del fields["head_dim"]
    try:
        return type(config).from_dict({**fields, **own})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise LimbeckError(f"student.config={dict(changes)} is refused: {one_line(error)}") from error


def _merged(old: Any, new: Any) -> Any:
    """A nested configuration with some of its fields changed."""
    return {**old, **new} if isinstance(old, dict) and isinstance(new, Mapping) else new


def _checkpoint_gradients(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. Takes effect in train mode, as transformers has it."""
    # Renamed in transformers 5.2x; the old name warns there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False, "context_fn": onednn.checkpoint_contexts})
    except ValueError as error:
        raise LimbeckError(f"gradient_checkpointing: {one_line(error)}; switch it off") from error


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
