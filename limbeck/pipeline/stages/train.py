"""Stage 4: build the student and train it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch

from limbeck.models.quantization.files import read_blocks
from limbeck.models.slices import is_unread
from limbeck.models.vocabulary import real_vocab_size
from limbeck.models.whole import whole_on_first_rank
from limbeck.objectives import Temperature
from limbeck.objectives.base import Objective
from limbeck.objectives.sums import nested
from limbeck.pipeline.across import aligned_share, in_shared_tokens
from limbeck.pipeline.build import loss_plan_of, sft_loss_plan, temperature_of, token_weighting_of, trial_loss_plan
from limbeck.pipeline.cached_teacher import round_teacher
from limbeck.pipeline.checks import check_student
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.elastic import train_inputs
from limbeck.pipeline.fidelity_in_training import fidelity_on
from limbeck.pipeline.initial_student import build_initial_student, measured_blocks
from limbeck.pipeline.lm_corpus import corpus_inputs, open_corpus
from limbeck.pipeline.response_sources import response_source_of
from limbeck.pipeline.sampled_responses import pad_token_id
from limbeck.pipeline.self_teaching import TrainingTeacher, self_teaching_inputs, training_teacher
from limbeck.pipeline.sharing import student_inputs
from limbeck.pipeline.signal_windows import SignalWindows
from limbeck.pipeline.stages.respond import load_responses, load_sft_answers
from limbeck.pipeline.stages.teach import open_teacher
from limbeck.pipeline.student_endings import endings_record, say_endings
from limbeck.pipeline.student_engine import engine_folder
from limbeck.pipeline.students_choice import choosing
from limbeck.recipe import load
from limbeck.recipe.keys import fingerprinted_member
from limbeck.recipe.sections import SftSection
from limbeck.recipe.teacher import ITSELF
from limbeck.rollouts.account import never_acted, summary
from limbeck.rollouts.development import FEWEST, LARGEST_SHARE, ids_of_prompts, set_aside
from limbeck.rollouts.engines import ENGINE_KEY
from limbeck.rollouts.options import SOURCE_KEY
from limbeck.rollouts.sources import SourceFactory, offline
from limbeck.rollouts.table import in_a_row
from limbeck.runtime.files import write_json
from limbeck.runtime.folders import remove
from limbeck.runtime.json_lines import json_lines
from limbeck.runtime.records import flatten
from limbeck.student.build import Student
from limbeck.student.saving import save_student
from limbeck.teachers.base import Teacher
from limbeck.teachers.local import NullTeacher
from limbeck.training import checkpoints, launch, sharding, trained_weights
from limbeck.training.background import Background
from limbeck.training.loop import find_learning_rate, train
from limbeck.training.metrics import LoopContext
from limbeck.types import Interrupted, Json, Response, SignalSource


def _student_inputs(context: RunContext) -> Json:
    recipe = context.recipe
    inputs = student_inputs(context) | corpus_inputs(context)
    inputs |= {"objective": asdict(recipe.objective), "train": train_inputs(context)}
    if recipe.teacher.across is not None:
        inputs |= {"across": asdict(recipe.teacher.across)}
    if recipe.on_policy:
        inputs |= {"source": fingerprinted_member(SOURCE_KEY, recipe.responses.source)}
    if recipe.responses.engine.elsewhere:
        inputs |= {"engine": fingerprinted_member(ENGINE_KEY, recipe.responses.engine)}
    inputs |= self_teaching_inputs(context)
    return inputs | {"contrast": asdict(recipe.contrast), "sft": None if recipe.sft is None else asdict(recipe.sft)}


def _run_student(context: RunContext) -> Json:
    recipe, run = context.recipe, context.run
    student = _begun(context)
    say_endings(context, student)
    asked = training_teacher(context, student)
    # Not beside a student that learns from what is on disk; where the teacher itself is asked, it loads again.
    if not _asks_teacher(context) or asked.teacher is not context.teacher:
        context.teacher.release()
    # Dropout inside adapters draws from torch's own generator.
    torch.manual_seed(recipe.train.seed)
    with context.stop.deferred() as should_stop, Background() as beside:
        try:
            if recipe.sft is not None:
                if checkpoints.usable(run.checkpoints) is None:
                    if recipe.train.learning_rate == "auto":
                        _search_learning_rate(context, student, asked.teacher, should_stop)
                    _run_sft(context, student, recipe.sft, should_stop, beside)
                    if asked.teacher is not context.teacher:
                        context.teacher.release()
                if not context.rank:
                    # Not asked for again, whether it ended now or in a run that was killed before it came here.
                    for old in checkpoints.all_in(run.checkpoints / "sft"):
                        remove(old)
            trained = _run_training(context, student, asked, should_stop, beside)
        except Interrupted as stopped:
            context.console.say(f"train: {stopped}")
            if context.stop.requested:
                raise KeyboardInterrupt(context.stop.number) from stopped
            raise
    # One that is sharded need not fit into the memory of the first rank.
    with whole_on_first_rank(trained, run.checkpoints / ".whole.partial") as trained:
        if context.rank:
            return {}
        save_student(trained, student.tokenizer, run.student, quantization=student.quantization)
    # What ranks read at the beginning, what servers loaded for the last round, what the teacher said of the last steps.
    remove(run.start)
    remove(engine_folder(context))
    remove(run.signal_windows)
    write_json(run.student / "student.json", _student_record(context, student))
    last = json.loads([line for _, line in json_lines(run.metrics.read_text("utf-8"))][-1])
    if account := summary(last):
        context.console.say(f"train: {account}")
    aligned = aligned_share(run.metrics) if recipe.teacher.across is not None else {}
    if aligned:
        context.console.say(
            f"train: {aligned['aligned']:.1%} of the student's tokens were compared with the teacher's distribution, "
            "where both have the same token"
        )
    return aligned | {
        "steps": last["step"],
        "tokens": last["tokens"],
        "loop_tokens_per_s": last["tokens"] / last["seconds"],
        "never_acted": never_acted(last),
        "temperature": {
            part.name: temperature_of(recipe).record(part)
            for objective in loss_plan_of(recipe).objectives
            for part in nested(objective)
            if isinstance(part, Objective)
        },
    }


def _begun(context: RunContext) -> Student:
    """The student before training; one that is sharded is read from its files by slices, where that can be."""
    recipe = context.recipe
    # A teacher that is made of the student is made of all its weights.
    by_slices = sharding.is_asked(recipe.train) and recipe.teacher.model not in ITSELF
    student = build_initial_student(context, unread=by_slices, take=not _asks_teacher(context))
    if is_unread(student.model):
        settings = replace(recipe.train, report_to=())
        made = launch.accelerator(settings, context.run.root, run_name=recipe.name, tracker_config={})
        sharding.shard(student.model, made, bf16=settings.bf16)
    return student


def _asks_teacher(context: RunContext) -> bool:
    """Whether the teacher runs during training."""
    recipe = context.recipe
    plans = [loss_plan_of(recipe)] + ([] if recipe.sft is None else [sft_loss_plan(recipe, recipe.sft)])
    uncached = not recipe.teacher.keeps_whole and any(plan.needs_teacher for plan in plans)
    return recipe.on_policy or uncached or (recipe.sft_on_data and plans[-1].needs_teacher)


def _run_sft(
    context: RunContext, student: Student, section: SftSection, should_stop: Callable[[], bool], beside: Background
) -> None:
    """Run the first stage, on responses written before training; training starts from its last checkpoint."""
    recipe, run = context.recipe, context.run
    settings = replace(
        recipe.train,
        num_train_epochs=section.num_train_epochs,
        max_steps=None,
        learning_rate=section.learning_rate or recipe.train.learning_rate,
        eval_steps=None,
        report_to=(),
    )
    folder = run.checkpoints / "sft"
    done = folder / "done"
    if trained_weights.has(done):
        trained_weights.restore(done, student.model)
        return
    if done.exists():
        context.console.warn(f"{done} is not what was written; the first stage is trained again")
    vocab_size = real_vocab_size(student.tokenizer)
    source, teacher = _sft_responses(context, section, should_stop, beside, vocab_size=vocab_size)
    train(
        student.model,
        source,
        teacher,
        sft_loss_plan(recipe, section),
        temperature=Temperature(),
        settings=settings,
        vocab_size=vocab_size,
        pad_id=pad_token_id(student.tokenizer),
        context=_context(context, should_stop, checkpoints=folder, metrics=run.sft_metrics, label="sft"),
    )
    trained_weights.save(done, student.model)


def _sft_responses(
    context: RunContext, section: SftSection, should_stop: Callable[[], bool], beside: Background, *, vocab_size: int
) -> tuple[SourceFactory, SignalSource]:
    """Responses of the first stage, and the source of their teacher signals, which are not stored for the data's
    answers."""
    heeded = sft_loss_plan(context.recipe, section).needs_teacher
    if context.recipe.sft_on_data:
        answers = offline(load_sft_answers(context))
        return answers, in_shared_tokens(context, context.teacher) if heeded else NullTeacher.of(vocab_size)
    responses = offline(in_a_row(load_responses(context, "train")))
    if not context.recipe.teacher.keeps_whole and not heeded:
        return responses, NullTeacher.of(vocab_size)
    if context.recipe.teacher.cache_limit_gib is not None:
        windows = SignalWindows.of(context, context.teacher, should_stop, beside=beside)
        return windows.source(responses), in_shared_tokens(context, windows)
    return responses, in_shared_tokens(context, open_teacher(context))


def _search_learning_rate(
    context: RunContext, student: Student, teacher: Teacher, should_stop: Callable[[], bool]
) -> None:
    """Search the learning rate of the main training before the first stage, on responses written before training."""
    recipe, run = context.recipe, context.run
    by_row, _ = _trained_and_aside(context)
    loss_plan, vocab_size = trial_loss_plan(recipe), real_vocab_size(student.tokenizer)
    heeded = recipe.teacher.keeps_whole or loss_plan.needs_teacher
    windowed = recipe.teacher.cache_limit_gib is not None
    # Of a few steps, which are scored as they are tried.
    signals = SignalWindows.of(context, teacher, should_stop) if windowed else open_teacher(context, teacher)
    find_learning_rate(
        student.model,
        offline(in_a_row(by_row)),
        in_shared_tokens(context, signals) if heeded else NullTeacher.of(vocab_size),
        loss_plan,
        temperature=temperature_of(recipe),
        schedule=recipe.objective.schedule,
        settings=recipe.train,
        vocab_size=vocab_size,
        pad_id=pad_token_id(student.tokenizer),
        context=_context(context, should_stop, checkpoints=run.checkpoints, metrics=run.metrics, label="train"),
    )


def _run_training(
    context: RunContext,
    student: Student,
    asked: TrainingTeacher,
    should_stop: Callable[[], bool],
    beside: Background,
) -> torch.nn.Module:
    """Run the main training."""
    recipe, run = context.recipe, context.run
    by_row, aside = _trained_and_aside(context)
    if recipe.train.eval_steps and not aside:
        context.console.warn(
            f"train.eval_steps: {len(by_row)} answered training prompts are too few to set some aside "
            f"({round(FEWEST / LARGEST_SHARE)} would do), so the last student is handed on unmeasured"
        )
    vocab_size = real_vocab_size(student.tokenizer)
    if recipe.on_policy:
        asking = choosing(context, asked.teacher, student)
        teacher = round_teacher(context, chain(by_row.values(), aside.values()), asking)
    elif not recipe.teacher.keeps_whole and not loss_plan_of(recipe).needs_teacher:
        teacher = NullTeacher.of(vocab_size)
    elif recipe.teacher.cache_limit_gib is not None:
        teacher = SignalWindows.of(context, asked.teacher, should_stop, beside=beside, aside=list(aside.values()))
    else:
        teacher = open_teacher(context, asked.teacher)
    development = dict(enumerate(aside.values(), start=len(by_row)))
    # A teacher that says little of the training responses, or nothing, has no distribution to be compared with.
    measured = aside and "fidelity" in recipe.evaluate.groups and recipe.teacher.support == "full"
    measured = measured and not isinstance(teacher, NullTeacher)
    source = response_source_of(context, student, in_a_row(by_row), teacher, should_stop, aside=ids_of_prompts(aside))
    return train(
        student.model,
        teacher.source(source) if isinstance(teacher, SignalWindows) else source,
        teacher if isinstance(teacher, NullTeacher) else in_shared_tokens(context, teacher),
        loss_plan_of(recipe),
        temperature=temperature_of(recipe),
        schedule=recipe.objective.schedule,
        weighting=token_weighting_of(recipe),
        heldout=in_a_row(load_responses(context, "heldout")),
        development=development,
        fidelity=fidelity_on(development, teacher, vocab_size=vocab_size, device=context.device) if measured else None,
        corpus=open_corpus(context, student.tokenizer),
        average=asked.average,
        settings=recipe.train,
        vocab_size=vocab_size,
        pad_id=pad_token_id(student.tokenizer),
        context=_context(context, should_stop, checkpoints=run.checkpoints, metrics=run.metrics, label="train"),
    )


def _trained_and_aside(context: RunContext) -> tuple[Mapping[int, Response], Mapping[int, Response]]:
    """The training responses by their row on disk, and those set aside to measure on while it trains."""
    responses, settings = load_responses(context, "train"), context.recipe.train
    return set_aside(responses, settings.eval_size) if settings.eval_steps else (responses, {})


def _context(
    context: RunContext, should_stop: Callable[[], bool], *, checkpoints: Path, metrics: Path, label: str
) -> LoopContext:
    return LoopContext(
        checkpoints=checkpoints,
        metrics=metrics,
        learning_rate=context.run.learning_rate / f"{label}.json",
        examples=context.run.examples if context.recipe.on_policy and label == "train" else None,
        console=context.console,
        should_stop=should_stop,
        pause_at=context.pause_at if label == "train" else None,
        tracker_config=_tracker_config(context.recipe),
        run_name=context.recipe.name,
        label=label,
    )


def _tracker_config(recipe: load.Recipe) -> Json:
    """The recipe as flat scalars, which is what trackers take."""
    flat = flatten(load.as_tree(recipe))
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flat.items()}


def _student_record(context: RunContext, student: Student) -> Json:
    """student.json: size and anatomy, for the report and the model card."""
    folder, teacher = context.run.student, context.teacher
    return (
        {
            "init": context.recipe.student.init,
            "parameters": student.parameters,
            "trainable": student.trainable,
            "share": student.share_of_teacher,
            "size_mb": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
            "teacher_size_mb": None if (size := teacher.bytes_on_disk) is None else size / 1e6,
            "teacher_parameters": student.teacher_parameters,
            "teacher_layers": teacher.blocks,
        }
        | _widths(context)
        | endings_record(context, student)
        | _bits(context, student)
        | _anatomy(context.run.root / "blocks.json")
    )


def _widths(context: RunContext) -> Json:
    """The sizes that were cut, where the student was pruned in width."""
    width = context.recipe.student.width
    return {} if width is None else {"width": {name: n for name, n in asdict(width).items() if n is not None}}


def _bits(context: RunContext, student: Student) -> Json:
    """How the weights are quantised, and the size of what ships: blocks, and float32 where there are none."""
    section, packed = context.recipe.student.quantize, read_blocks(context.run.student)
    if section is None or packed is None:
        return {}
    return {
        "quantized": asdict(section)
        | {
            "formats": dict(Counter(packed.formats.values())),
            "size_mb": (packed.bytes + 4 * (student.parameters - packed.weights)) / 1e6,
        }
    }


def _anatomy(blocks: Path) -> Json:
    """Which blocks of the teacher were kept, and the score of each, where blocks were removed; what else was cut."""
    if not blocks.exists():
        return {}
    measured = measured_blocks(blocks)
    width = measured.get("width")
    narrowed = {} if width is None else {"width_importance": width["importance"]}
    if not measured["keep"]:
        return narrowed
    return narrowed | {
        "kept_blocks": measured["keep"],
        "removed_blocks": measured["removed"],
        "block_scores": measured["influence"] or None,
        "kl_path": measured["path"] or None,
        "criterion": measured["criterion"],
    }


STAGE = Stage(
    name="train",
    check=check_student,
    inputs=_student_inputs,
    run=_run_student,
    outputs=lambda run: (
        run.student,
        run.checkpoints,
        run.rounds,
        run.metrics,
        run.sft_metrics,
        run.learning_rate,
        run.corpus,
        run.root / "blocks.json",
    ),
    # The model card is the evaluation's.
    working=("checkpoints/*", "rounds/*", "learning_rate/*", "metrics*.jsonl", "student/README.md"),
)
