"""Checks before the first stage, of mistakes that can be found without loading a model.

A wrong pair, objective or tracker would otherwise come to light after the teacher has sampled for hours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from limbeck.models.folders import EXPERT_COUNTS
from limbeck.models.gguf_architectures import require_known
from limbeck.models.loading import source_config
from limbeck.models.processors import reads_images, require_processor
from limbeck.models.quantization import FORMATS
from limbeck.models.quantization.layout import replaced
from limbeck.models.sources import resolve
from limbeck.pipeline.across import check_across
from limbeck.pipeline.build import check_objectives
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.documents import check_documents
from limbeck.pipeline.drafted_responses import check_draft
from limbeck.pipeline.hosted_responses import check_hosted
from limbeck.pipeline.lm_corpus import check_corpus
from limbeck.pipeline.made_first import require_made
from limbeck.pipeline.provisions import check_provisions
from limbeck.pipeline.seen_prompts import check_sees
from limbeck.pipeline.self_teaching import check_self_teaching
from limbeck.pipeline.served_responses import check_server
from limbeck.pipeline.several import check_several
from limbeck.pipeline.stored_teacher import check_stored
from limbeck.pipeline.student_endings import check_endings
from limbeck.pipeline.student_engine import check_engine
from limbeck.pipeline.text_only import check_text_only
from limbeck.pipeline.verified_responses import check_verification
from limbeck.prompts.templates import resolve_template
from limbeck.recipe.optimizers import require_optimizer
from limbeck.recipe.sections import Recipe, StudentSection, TeacherSection
from limbeck.rollouts.options import SOURCE_KEY, OnPolicyOptions
from limbeck.student.adapters import LoraSpec, check_adapters
from limbeck.student.blocks import pruned_config
from limbeck.student.build import StudentSpec, fresh_model
from limbeck.student.quantizing import QuantizeSpec, check_quantizing, formats_of
from limbeck.student.width import WidthSpec, require_cuttable, width_config
from limbeck.training.launch import require_trackers
from limbeck.types import LimbeckError


def student_spec(context: RunContext) -> StudentSpec:
    """The student that a recipe asks for."""
    section = context.recipe.student
    lora, quantize = section.lora, section.quantize
    return StudentSpec(
        init=section.init,
        model=section.model,
        revision=section.revision,
        layers=section.layers,
        keep=section.keep,
        width=None if section.width is None else WidthSpec(**asdict(section.width)),
        config=section.config,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=context.student_trusted,
        freeze_embeddings=section.freeze_embeddings,
        freeze_vision=section.freeze_vision,
        lora=LoraSpec(**asdict(lora)) if lora else None,
        quantize=QuantizeSpec(**asdict(quantize)) if quantize else None,
        gradient_checkpointing=context.recipe.train.gradient_checkpointing,
        seed=context.recipe.train.seed,
    )


def check_responses(context: RunContext) -> None:
    """Check that the teacher is a model, and that its tokenizer has the template.

    Raises:
        LimbeckError: a model that is to be made first, no such teacher, or no such template.
    """
    require_made(context.recipe)
    for name, section in context.recipe.every_teacher.items():
        given = context.run_teachers.get(name, context.run_teacher).provides
        resolvable(context.recipe.source_of(section), weights=not given or "weights" in given)
    check_several(context)
    check_documents(context)
    window = context.window
    if window is not None and window <= context.recipe.responses.max_new_tokens:
        raise LimbeckError(
            f"responses.max_new_tokens is {context.recipe.responses.max_new_tokens} and the window of the pair "
            f"{window} tokens, so no prompt fits; lower it"
        )
    check_template(context, context.teacher.tokenizer)
    check_provisions(context)
    check_sees(context)
    check_stored(context)
    check_server(context)
    check_hosted(context)
    check_verification(context)
    check_draft(context)


def check_student(context: RunContext) -> None:
    """Check that the student can be built and has the teacher's tokens, and that objective and trackers exist.

    Raises:
        LimbeckError: anything else.
    """
    check_across(context)
    check_objectives(context)
    check_self_teaching(context)
    _check_sharding(context)
    require_optimizer(context.recipe.train.optim, sharded=context.launch.sharded)
    responses = context.recipe.responses
    responses.source.check_memory(max_new_tokens=responses.max_new_tokens)
    require_trackers(context.recipe.train.report_to)
    check_corpus(context)
    section = context.recipe.student
    if section.model is not None and section.init != "scratch":
        resolvable(section)
    check_text_only(context)
    check_endings(context)
    _check_anatomy(context)
    check_engine(context)


def _check_sharding(context: RunContext) -> None:
    """Check that the student of a sharded launch can be sharded."""
    why = why_whole(context.recipe)
    if context.launch.sharded and why is not None:
        what, remedy = why
        raise LimbeckError(f"{what}, and this launch shards it over the ranks; set {remedy}, or train.sharding=none")


def why_whole(recipe: Recipe) -> tuple[str, str] | None:
    """What asks the whole student of a training, and the remedy; None where it may be sharded over ranks."""
    if recipe.teacher.model == "live":
        return (
            "teacher.model=live asks the whole student in every step",
            "teacher.model=ema, which keeps a whole average",
        )
    source, count = recipe.responses.source, recipe.teacher.student_k
    if count and isinstance(source, OnPolicyOptions):
        # It is whole only while it writes a round.
        asks = f"teacher.student_k is {count}, which asks the whole student for its likeliest tokens"
        if source.round_steps == 1:
            return f"{asks} whenever a step has new responses", "teacher.student_k=0"
        if source.paired and source.samples_teacher:
            return f"{asks} when the teacher has written", f"{SOURCE_KEY}.resample_teacher=false"
    return None


def check_rounds(context: RunContext, prompts: int) -> None:
    """Check the number of training prompts against the response source, such as rounds that end with an epoch.

    Raises:
        LimbeckError: it asks for another.
    """
    recipe, ranks = context.recipe, int(os.environ.get("WORLD_SIZE", "1"))
    rows = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps * ranks
    recipe.responses.source.check_steps(prompts=prompts, step_rows=rows)


def check_template(context: RunContext, tokenizer: Any) -> None:
    """Check that a tokenizer has the chat template of the recipe.

    Raises:
        LimbeckError: it has none.
    """
    if context.recipe.prompts.template == "chat":
        resolve_template("chat", tokenizer, ())


def resolvable(section: TeacherSection | StudentSection, *, weights: bool = True) -> None:
    """Check that a model can be found.

    Args:
        weights: with its weights, where it is a folder of this machine, and the processor that they are loaded with.

    Raises:
        LimbeckError: it is not.
    """
    assert section.model is not None
    # Of a model that is not here yet only the small files: the weights are fetched when a stage needs them.
    source = resolve(
        section.model,
        revision=section.revision,
        weights=weights and Path(section.model).expanduser().exists(),
        trust_remote_code=section.trust_remote_code,
    )
    if weights:
        require_processor(source, source_config(source, trust_remote_code=section.trust_remote_code))


def _check_anatomy(context: RunContext) -> None:
    """Check depth, configuration, adapters and formats of the student against the model that it starts from."""
    spec = student_spec(context)
    if spec.quantize is not None:
        check_quantizing(spec.quantize, dtype=spec.dtype, init=spec.init, lora=spec.lora is not None)
    section = context.recipe.student if spec.model is not None else context.recipe.teacher
    assert section.model is not None
    source = resolve(section.model, revision=section.revision, weights=False, trust_remote_code=spec.trust_remote_code)
    there = source_config(source, trust_remote_code=spec.trust_remote_code)
    require_processor(source, there)
    if spec.lora is None:
        _say_unbalanced(context, there.get_text_config())
    if spec.init == "scratch" and spec.freeze_vision and reads_images(there):
        raise LimbeckError(
            "student.freeze_vision=true would leave a vision tower of fresh weights as it was drawn; "
            "set student.freeze_vision=false, or begin with a student that sees (student.init=pretrained)"
        )
    if spec.layers is not None or spec.keep:
        kept = kept_blocks(spec, section.model, there.get_text_config().num_hidden_layers)
        there = pruned_config(there, kept)
    if spec.width is not None:
        with torch.device("meta"):
            whole = fresh_model(there, spec)
        there = width_config(there, spec.width)
        require_cuttable(whole, spec.width)
    if spec.init == "scratch" or spec.lora is not None or spec.quantize is not None:
        with torch.device("meta"):
            model = fresh_model(there, spec)
        if spec.quantize is not None:
            formats = formats_of(model, spec.quantize)
            _check_baselines(context, formats)
            _say_replaced(context, spec.quantize, formats)
            _say_no_gguf(context, spec.quantize.format, there)
        if spec.lora is not None:
            check_adapters(model, spec.lora)


def _check_baselines(context: RunContext, formats: Mapping[str, str]) -> None:
    """llama.cpp quantises to the formats of its own files alone.

    Raises:
        LimbeckError: it is asked for others.
    """
    group = context.recipe.evaluate.groups.get("recovery")
    strange = [name for name in dict.fromkeys(formats.values()) if FORMATS[name].gguf is None]
    if strange and getattr(group, "baselines", ()):
        raise LimbeckError(
            f"evaluate.groups.recovery.baselines asks llama.cpp for {strange[0]}, which GGUF files do not hold; set "
            "evaluate.groups.recovery.baselines=[], or choose a student.quantize.format that they do"
        )


def _say_replaced(context: RunContext, quantize: QuantizeSpec, formats: Mapping[str, str]) -> None:
    """Say which weights get another format than the recipe's."""
    for chosen, names in replaced(formats, quantize.format, quantize.embeddings).items():
        context.console.warn(
            f"student.quantize: {len(names)} of {len(formats)} matrices are kept in {chosen}, since their rows are no "
            f"multiple of the block of {quantize.format} ({names[0]}, ...)"
        )


def _say_no_gguf(context: RunContext, format: str, config: Any) -> None:
    """Say that weights on the grid of a GGUF file will not become one, where the export does not know the model."""
    if FORMATS[format].gguf is None:
        return
    try:
        require_known(config)
    except LimbeckError as error:
        context.console.warn(f"student.quantize: the student will not become a GGUF file: {error}")


def _say_unbalanced(context: RunContext, config: Any) -> None:
    """What the training of a mixture of experts leaves out."""
    experts = max(getattr(config, name, None) or 0 for name in EXPERT_COUNTS)
    if experts > 1:
        context.console.warn(
            f"the student is a mixture of {experts} experts, and the loss that spreads tokens evenly over them is not "
            "part of the training; compare how often each is chosen before and after, or train "
            "student.lora={target_modules: [q_proj, v_proj]} alone"
        )


def kept_blocks(spec: StudentSpec, name: str, depth: int) -> Sequence[int]:
    """Numbers of the blocks to keep; any as many where they are still to be measured.

    Args:
        name: of the model that they are blocks of, for messages.
        depth: how many it has.

    Raises:
        LimbeckError: it has no such blocks, or too few.
    """
    if spec.layers is not None and not 2 <= spec.layers < depth:
        raise LimbeckError(f"student.layers is {spec.layers}; {name} has {depth} blocks, so expected 2 to {depth - 1}")
    if spec.keep and list(spec.keep) != sorted(set(spec.keep) & set(range(depth))):
        raise LimbeckError(
            f"student.keep is {list(spec.keep)}; {name} has {depth} blocks, so expected ascending numbers from 0 "
            f"to {depth - 1}"
        )
    return spec.keep or range(spec.layers or depth)
