"""The amount of work of a run: responses, tokens, optimizer steps, before any model runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from math import ceil
from statistics import linear_regression
from typing import Any

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.hosted_cost import hosted_costs, hosted_teachers
from limbeck.pipeline.stages import prompts as prompts_stage
from limbeck.pipeline.store_estimate import lengths_of
from limbeck.prompts.io import read_prompts
from limbeck.prompts.templates import encode_prompts
from limbeck.recipe.load import Recipe
from limbeck.rollouts.development import FEWEST, LARGEST_SHARE
from limbeck.rollouts.options import OnPolicyOptions
from limbeck.teachers.hosted_account import NOTHING
from limbeck.teachers.hosted_asking import AROUND_A_TURN
from limbeck.teachers.store.estimate import Length
from limbeck.training.schedules import total_steps
from limbeck.types import Prompt

# Short trainings that a search for the learning rate usually takes: a guess and its two neighbours.
USUAL_TRIALS = 3
# Prompts that are tokenised; the lengths of the others follow from their bytes.
SAMPLED = 200


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of one split.

    Attributes:
        tokens: of all responses.
        ids: of all prompts and responses.
        longest: ids of the longest text.
    """

    count: int
    tokens: int
    ids: int
    longest: int

    @classmethod
    def of(cls, lengths: list[Length]) -> Texts:
        return cls(
            count=len(lengths),
            tokens=sum(length.loss for length in lengths),
            ids=sum(length.ids for length in lengths),
            longest=max((length.ids for length in lengths), default=0),
        )

    @property
    def mean(self) -> float:
        """Ids of a text."""
        return self.ids / max(self.count, 1)

    @property
    def answer(self) -> float:
        """Tokens of a response."""
        return self.tokens / max(self.count, 1)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The texts of a run.

    Attributes:
        exact: whether the responses are known; else each counts as long as it may become, or as is assumed of all.
        asked_bytes: of all prompts, and of what stands around their turns at most; 0 where the responses are known.
        hosted_usd: the most that hosted teachers can cost, with all attempts and without what is paid for; None where
            they are not asked about these prompts, or a price is missing.
    """

    train: Texts
    heldout: Texts
    exact: bool
    asked_bytes: int = 0
    hosted_usd: Decimal | None = None

    @property
    def count(self) -> int:
        return self.train.count + self.heldout.count

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.heldout.tokens

    @property
    def ids(self) -> int:
        return self.train.ids + self.heldout.ids


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Optimizer steps of a run.

    Attributes:
        rows: responses of a step over all ranks.
        per_epoch: steps of an epoch over the prompts that are not set aside.
        aside: those that the loss is measured on meanwhile.
        main: of the training; `first` of a first stage, `searching` of the search for the learning rate.
        written: responses that the student writes while it trains.
        by_teacher: and the teacher.
    """

    rows: int
    per_epoch: int
    aside: int
    main: int
    first: int
    searching: int
    written: int
    by_teacher: int


def workload_of(context: RunContext, *, answer: float | None = None) -> Workload:
    """The texts of a recipe; responses that are not written yet count as long as they may become.

    Args:
        answer: mean length of such a response in tokens, where it is known better.

    Raises:
        LimbeckError: the prompts cannot be read.
    """
    recipe, done = context.recipe, context.run.done("respond")
    if not recipe.on_policy and (done or recipe.base_author == "data"):
        lengths, _ = lengths_of(context)
        return Workload(train=Texts.of(lengths["train"]), heldout=Texts.of(lengths["heldout"]), exact=True)
    prompts, asked_bytes, hosted_usd = _asked(context)
    most = recipe.responses.max_new_tokens
    loss = most if answer is None else max(round(answer), 1)
    found = {side: [Length(loss=loss, ids=ids + loss) for ids in some] for side, some in prompts.items()}
    if done:
        # What the student is yet to write is not known; what is held out is, and what it also trains on.
        written, _ = lengths_of(context)
        found["heldout"] = list(written["heldout"])
        found["train"] = list(written["train"]) if recipe.responses.source.trains_on_initial else found["train"]
    sides = {side: Texts.of(lengths) for side, lengths in found.items()}
    return Workload(
        train=sides["train"], heldout=sides["heldout"], exact=False, asked_bytes=asked_bytes, hosted_usd=hosted_usd
    )


def _asked(context: RunContext) -> tuple[dict[str, list[int]], int, Decimal | None]:
    """Tokens of each prompt of both splits, bytes of all, and what hosted teachers can cost."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = RunContext(replace(context.recipe, output_dir=folder), context.console)
        prompts_stage.STAGE.run(scratch)
        prompts = read_prompts(scratch.run.prompts)
    per_byte, added = _tokens_of(context, prompts)
    found: dict[str, list[int]] = {"train": [], "heldout": []}
    longest = context.recipe.prompts.max_prompt_length
    for prompt in prompts:
        ids = round(added + per_byte * _bytes_of(prompt))
        found[prompt.split].append(ids if longest is None else min(ids, longest))
    turns = sum(max(len(prompt.messages or ()), 1) for prompt in prompts)
    return found, sum(map(_bytes_of, prompts)) + AROUND_A_TURN * turns, _hosted_usd(context, prompts)


def _hosted_usd(context: RunContext, prompts: Sequence[Prompt]) -> Decimal | None:
    if any(one.where.price_per_million is None for one in hosted_teachers(context).values()):
        return None
    costs = hosted_costs(context, prompts).values()
    return sum((cost.usd for cost in costs), NOTHING) if costs else None


def _tokens_of(context: RunContext, prompts: Sequence[Prompt]) -> tuple[float, float]:
    """Tokens of a byte of a prompt, and those that the template adds: a line through some prompts."""
    some = list(prompts[:: max(len(prompts) // SAMPLED, 1)])
    section = context.recipe.prompts
    encoded = encode_prompts(
        some,
        context.teacher.tokenizer,
        section.template,
        control_tokens=section.control_tokens,
        chat_options=section.chat_options,
    )
    points = [(_bytes_of(prompt), len(one.ids)) for prompt, one in zip(some, encoded, strict=True)]
    if len({size for size, _ in points}) < 2:
        return 0.0, points[0][1] if points else 0.0
    slope, start = linear_regression([x for x, _ in points], [y for _, y in points])
    return slope, start


def _bytes_of(prompt: Prompt) -> int:
    texts = [prompt.text or "", *(turn.content for turn in prompt.messages or ())]
    return sum(len(text.encode("utf-8", "replace")) for text in texts)


def assumed_workload(*, prompts: int, prompt_tokens: int, answer: int, heldout: float) -> Workload:
    """So many prompts of one length, with answers of one length."""
    held = round(prompts * heldout)
    sides = [
        Texts(count=n, tokens=n * answer, ids=n * (prompt_tokens + answer), longest=prompt_tokens + answer)
        for n in (prompts - held, held)
    ]
    return Workload(train=sides[0], heldout=sides[1], exact=False)


def steps_of(recipe: Recipe, work: Workload, ranks: int) -> Steps:
    """Optimizer steps of a recipe on so many ranks."""
    train, source = recipe.train, recipe.responses.source
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    count = work.train.count
    # As `limbeck.rollouts.development.set_aside` takes them.
    spared = int(LARGEST_SHARE * count)
    aside = min(train.eval_size, spared) if train.eval_steps and spared >= FEWEST else 0
    # A step of pairs has half as many prompts.
    prompts_of_step = max(rows // 2, 1) if source.paired else rows
    per_epoch = max(ceil((count - aside) / prompts_of_step), 1)
    main = total_steps(train, per_epoch)
    first = ceil(recipe.sft.num_train_epochs * ceil(count / rows)) if recipe.sft else 0
    written, by_teacher = _written(source, main, rows)
    searches = (train.learning_rate == "auto") + (recipe.sft is not None and _first_rate(recipe) == "auto")
    return Steps(
        rows=rows,
        per_epoch=per_epoch,
        aside=aside,
        main=main,
        first=first,
        searching=searches * USUAL_TRIALS,
        written=written,
        by_teacher=by_teacher,
    )


def _first_rate(recipe: Recipe) -> Any:
    assert recipe.sft is not None, "asked of a recipe with a first stage"
    return recipe.sft.learning_rate or recipe.train.learning_rate


def _written(source: Any, steps: int, rows: int) -> tuple[int, int]:
    """Responses of the student, and of the teacher, during so many steps."""
    if not isinstance(source, OnPolicyOptions):
        return 0, 0
    if source.paired:
        half = rows // 2 * steps
        return half, half if source.samples_teacher else 0
    return round(source.expected_share * steps * rows), 0
