"""Stage 1: read the prompts and split them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from limbeck.models.images import ImageFolder
from limbeck.pipeline.across import require_one_answer_each
from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.image_prompts import check_image_methods, digest_of_images, reads_images
from limbeck.pipeline.problems import ProblemReader, generated_rows
from limbeck.pipeline.seen_prompts import require_single_answers
from limbeck.pipeline.several import check_routes
from limbeck.prompts.capped import at_most_heldout
from limbeck.prompts.columns import unread_line
from limbeck.prompts.images import RowImages
from limbeck.prompts.io import write_lines
from limbeck.prompts.preferences import ANSWERS
from limbeck.prompts.readers import source_digest
from limbeck.prompts.references import require_answers_for_sft, require_references
from limbeck.prompts.scratch import ScratchFile, lines_of
from limbeck.prompts.sources import PromptSet, load_prompts, with_heldout
from limbeck.recipe.keys import fingerprinted_member
from limbeck.recipe.sections import GENERATE, PromptsSection
from limbeck.rollouts.preference.options import DataPairs
from limbeck.types import Json, Prompt


def prompt_inputs(context: RunContext) -> Json:
    """Inputs of the prompts: their section, and the content of their files."""
    section = asdict(context.recipe.prompts) | ({"documents": True} if context.recipe.documents else {})
    for later in ("template", "chat_options", "too_long", "max_prompt_length", "control_tokens", "loss_on"):
        del section[later]
    for rare in ("ignore_columns", "task", "generate", "heldout", "eval_limit"):
        if not section[rare]:
            del section[rare]
    if (heldout := context.recipe.prompts.heldout) is not None:
        section["heldout_content"] = _content_of(context, replace(context.recipe.prompts, source=heldout))
    if columns := context.recipe.kept_columns:
        section["seen_columns"] = list(columns)
    if (generate := context.recipe.prompts.generate) is not None:
        return section | {"generate": fingerprinted_member(GENERATE.key, generate)}
    return section | _content_of(context, context.recipe.prompts)


def _content_of(context: RunContext, prompts: PromptsSection) -> Json:
    """Hashes of a source's files and of the images that they name."""
    content: Json = {"content": source_digest(prompts.source)}
    if content["content"] is not None and not context.recipe.documents and reads_images(context):
        ignored = (*prompts.ignore_columns, *_read_by_preference(context))
        digest = digest_of_images(prompts, ignored, context.recipe.kept_columns)
        if digest is not None:
            content["images"] = digest
    return content


@contextmanager
def read_prompt_source(context: RunContext, heldout_fraction: float) -> Iterator[PromptSet]:
    """Read the prompts of a recipe and write them, with a check for the reference answers that groups need.

    Those that it gives are in a scratch file, which is there inside the block.
    """
    with ScratchFile(context.run.root) as scratch:
        yield _read_into(scratch, context, heldout_fraction)


def _read_into(scratch: ScratchFile, context: RunContext, heldout_fraction: float) -> PromptSet:
    section = context.recipe.prompts
    problems = ProblemReader(section.problems_of) if section.problems_of else None
    options: dict[str, Any] = {
        "split_seed": section.split_seed,
        "fields": section.fields,
        "dataset_split": section.dataset_split,
        "dataset_config": section.dataset_config,
        "ignore_columns": (*section.ignore_columns, *_read_by_preference(context)),
        "rewrite": problems.as_prompt if problems else None,
        "images": RowImages(ImageFolder(context.run.images)) if reads_images(context) else None,
        "seen_columns": context.recipe.kept_columns,
        "distinct_columns": context.recipe.teacher_columns,
        "scratch": scratch,
    }
    loaded = load_prompts(
        section.source if section.generate is None else GENERATE.name_of(section.generate),
        heldout_fraction=heldout_fraction if section.heldout is None else None,
        limit=section.limit,
        rows=None if section.generate is None else generated_rows(section.generate),
        **options,
    )
    if section.heldout is not None:
        loaded = with_heldout(loaded, load_prompts(section.heldout, heldout_fraction=1.0, **options))
    if section.eval_limit is not None:
        # Held-out prompts of a source of their own are not trained on, nor those of an evaluation alone.
        others = "left_out" if section.heldout is not None or heldout_fraction == 1.0 else "train"
        loaded = at_most_heldout(loaded, section.eval_limit, split_seed=section.split_seed, others=others)
    require_single_answers(context, loaded.prompts)
    require_one_answer_each(context, loaded.prompts)
    check_routes(context, loaded.prompts)
    if options["images"] is not None:
        check_image_methods(context, loaded.prompts)
    if loaded.unread:
        context.console.say(unread_line(loaded.unread, loaded.rows))
    if loaded.duplicates:
        others = f"; {loaded.contradicted} of them have another answer" if loaded.contradicted else ""
        context.console.say(f"prompts: {loaded.duplicates} rows ask what an earlier row asks, and are left out{others}")
    _require_known_answers(context, loaded.of("heldout"))
    if problems:
        problems.write(context.run.problems, loaded.prompts)
    write_lines(context.run.prompts, lines_of(loaded.prompts))
    return loaded


def _read_by_preference(context: RunContext) -> tuple[str, ...]:
    """The columns of this source that preference tuning alone reads."""
    recipe = context.recipe
    pairs = recipe.preference.pairs if recipe.preference else None
    same = isinstance(pairs, DataPairs) and pairs.source in (None, recipe.prompts.source)
    return tuple(name for name in ANSWERS if name not in recipe.prompts.ignore_columns) if same else ()


def _require_known_answers(context: RunContext, heldout: Sequence[Prompt]) -> None:
    """Check that the data has the reference answers that groups will need.

    Raises:
        LimbeckError: a held-out prompt has none; names it and its place in the data.
    """
    for group in context.recipe.evaluate.groups.values():
        if "references" in group.needs():
            require_references(heldout, group.references_remedy)


def _run_prompts(context: RunContext) -> Json:
    if context.recipe.documents:
        # Nothing is asked; the stage respond reads the text.
        write_lines(context.run.prompts, ())
        return {"documents": True}
    with read_prompt_source(context, context.recipe.prompts.eval_fraction) as loaded:
        if context.recipe.sft_on_data:
            require_answers_for_sft(loaded.of("train"))
        counts = loaded.counts()
    context.console.say(f"prompts: {counts['train']} to train on, {counts['heldout']} held out")
    return {**counts, "unread_columns": dict(loaded.unread)}


STAGE = Stage(
    name="prompts",
    inputs=prompt_inputs,
    run=_run_prompts,
    outputs=lambda run: (run.prompts, run.images, run.problems),
)
