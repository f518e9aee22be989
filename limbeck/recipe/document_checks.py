"""Checks of a recipe whose source is plain text: nothing in it may ask for prompts, or read keys of prompts."""

from __future__ import annotations

from dataclasses import fields

from limbeck.recipe.response_source import source_name
from limbeck.recipe.sections import PromptsSection, Recipe
from limbeck.teachers.sees import StudentsPrompt
from limbeck.types import LimbeckError

# Of a source of text; the template is the one that the student is saved with.
_READ = {
    "source", "eval_fraction", "eval_limit", "heldout", "dataset_split", "dataset_config", "split_seed", "template",
    "chat_options",
}  # fmt: skip


def require_no_prompts(recipe: Recipe) -> None:
    """See that a recipe of plain text asks for no prompts.

    Raises:
        LimbeckError: it does; names the key to change.
    """
    named = f"responses.source={source_name(recipe.responses.source)} reads plain text"
    _check_prompt_keys(recipe, named)
    if recipe.preference is not None:
        raise LimbeckError(f"{named}, in which nothing is asked, but preference compares answers; set preference=null")
    if recipe.routing is not None:
        raise LimbeckError(
            f"{named}, but combine chooses a teacher for each prompt; set combine=mean_log_p, or one teacher alone"
        )
    for name, section in recipe.every_teacher.items():
        place = f"teachers.{name}" if name else "teacher"
        if not isinstance(section.sees, StudentsPrompt):
            raise LimbeckError(f"{named}, but {place}.sees changes what stands in prompts; set {place}.sees=prompt")
        if section.across is not None:
            raise LimbeckError(
                f"{named}, which {place}.across cannot compare in other tokens yet; take a teacher with the student's "
                f"tokens, or train on the text alone with objective={{name: ce}} {place}.across=null"
            )
    asking = [name for name, group in recipe.evaluate.groups.items() if "prompts" in group.needs()]
    if asking:
        rest = [name for name in recipe.evaluate.groups if name not in asking]
        raise LimbeckError(
            f"{named}, but evaluate.groups.{asking[0]} asks for answers to prompts; set evaluate.groups="
            f"[{', '.join(dict.fromkeys([*rest, 'perplexity']))}]"
        )


def _check_prompt_keys(recipe: Recipe, named: str) -> None:
    plain = PromptsSection()
    if recipe.prompts.source == plain.source:
        raise LimbeckError(
            f"{named}, but prompts.source={plain.source} holds prompts; name a file, a folder or a hub data set with a "
            "column of text, such as prompts.source=FILE.jsonl"
        )
    for f in fields(PromptsSection):
        if f.name in _READ or getattr(recipe.prompts, f.name) == getattr(plain, f.name):
            continue
        remedy = "set responses.source.max_tokens" if f.name == "limit" else "leave it out"
        remedy = "set responses.source.text_field" if f.name == "fields" else remedy
        raise LimbeckError(f"{named} and not prompts.{f.name}, which is for prompts; {remedy}")
