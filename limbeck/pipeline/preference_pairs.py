"""What preference pairs of a run are made from: answers of its distilled student, its teacher, a judge, or data.

All that is expensive is kept below `preferences/` as it comes: answers batch by batch, the teacher's scores by shards,
judgements one by one in `judgements.jsonl`, which outlives the run's stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from limbeck.evaluation.context import response_text
from limbeck.evaluation.judge.questions import request_text
from limbeck.evaluation.likelihood import mean_logp
from limbeck.models.loading import LoadedModel, load_model
from limbeck.pipeline.capturing import SCORING_BATCH_SIZE, SHARD_ROWS
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.fitting_prompts import fitting_prompts
from limbeck.pipeline.judged_answers import judge_server, shares_won
from limbeck.pipeline.resumable import write_in_batches
from limbeck.pipeline.sampled_responses import sampler_for, sampling_meter
from limbeck.pipeline.text_only import text_options
from limbeck.prompts.io import StoredPrompts
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.preferences import ANSWERS, Preferences, read_preferences, while_reading
from limbeck.prompts.sources import asked_id
from limbeck.prompts.templates import encode_responses
from limbeck.rollouts.preference.options import PAIRS_KEY, Answers, DataPairs, JudgePairs, SampledPairs
from limbeck.rollouts.preference.pairs import PairSet, PreferencePair
from limbeck.runtime.files import write_json
from limbeck.runtime.records import read_fields, read_object
from limbeck.types import LimbeckError, Prompt, Response, Sampling


def load_distilled(context: RunContext) -> LoadedModel:
    """The student as distillation left it."""
    section = context.recipe.student
    loaded = load_model(
        context.run.student,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        trust_remote_code=context.student_trusted,
    )
    loaded.model.to(context.device)  # type: ignore[arg-type]
    return loaded


def preferences_of(context: RunContext, data: DataPairs) -> Preferences:
    """The rows of preference data that a recipe names.

    Raises:
        LimbeckError: a row that is none, naming its place.
    """
    prompts, known = context.recipe.prompts, context.run.prompts
    # Checked before the prompts are read, too: then rows of held-out prompts are still among the rest.
    asked = StoredPrompts(known) if prompts.heldout and known.exists() else ()
    return read_preferences(
        data.source or prompts.source,
        heldout_fraction=0.0 if prompts.heldout else prompts.eval_fraction,
        heldout_ids={asked_id(prompt) for prompt in asked if prompt.split == "heldout"},
        split_seed=prompts.split_seed,
        dataset_split=data.dataset_split if data.source else prompts.dataset_split,
        dataset_config=data.dataset_config if data.source else prompts.dataset_config,
        identical=data.identical,
    )


@dataclass
class RunMaterials:
    """A run's materials (`limbeck.rollouts.preference.options.PairMaterials`)."""

    context: RunContext

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """The training prompts by id, in the order of their hashes."""
        return {p.id: p for p in StoredPrompts(self.context.run.prompts) if p.split == "train"}

    @cached_property
    def template(self) -> Any:
        """How the student's prompts become text."""
        return read_fields(self.context.run.manifest_path("respond"), {"template": str})["template"]

    def name_of(self, prompt_id: str) -> str:
        return prompt_label(self.prompts[prompt_id])

    def sampled(self, how: SampledPairs) -> Answers:
        context = self.context
        student = load_distilled(context)
        most = how.max_new_tokens or context.recipe.responses.max_new_tokens
        chosen = list(self.prompts.values())[: how.prompts]
        asked = fitting_prompts(context, chosen, student.tokenizer, self.template, max_new_tokens=most).kept
        sampler = sampler_for(
            context,
            student.model,
            student.tokenizer,
            self.template,
            "student",
            context.recipe.responses.batch_size,
        )
        answers: dict[str, list[Response]] = {prompt.id: [] for prompt in asked}
        for number in range(1, how.samples + 1):
            sampling = Sampling(
                max_new_tokens=most,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=how.top_k,
                stop=context.recipe.responses.stop,
                seed=how.seed + number - 1,
            )
            found, _ = write_in_batches(
                sampler,
                asked,
                sampling,
                context.run.preferences / "answers" / f"{number:02d}",
                stop=context.stop,
                watching=lambda done, number=number: sampling_meter(
                    context, f"prefer: answers {number} of {how.samples}", len(asked), done
                ),
            )
            for response in found:
                # What tells several answers to one prompt apart in their ids.
                answers[response.prompt_id].append(replace(response, round=number))
        return answers

    def teacher_logp(self, answers: Answers) -> Mapping[str, float]:
        context, every = self.context, [response for given in answers.values() for response in given]
        folder, scores = context.run.preferences / "scores", dict[str, float]()
        with context.console.meter("prefer: teacher", sum(r.tokens for r in every), "tokens") as meter:
            for start in range(0, len(every), SHARD_ROWS):
                shard = every[start : start + SHARD_ROWS]
                path = folder / f"{start // SHARD_ROWS:05d}.json"
                if not path.exists():
                    found = mean_logp(context.teacher, shard, batch_size=SCORING_BATCH_SIZE, device=context.device)
                    with context.stop.deferred():
                        write_json(path, {shard[place].id: logp for place, logp in found})
                    context.stop.raise_if_requested()
                read = read_object(path)
                if read.keys() != {response.id for response in shard}:
                    raise LimbeckError(
                        f"{path} is damaged (it holds scores of other answers); delete it and run the same "
                        "command again"
                    )
                scores |= read
                meter.advance(sum(response.tokens for response in shard))
        context.teacher.release()
        return scores

    def judged(self, judge: JudgePairs, answers: Answers) -> Mapping[str, float | None]:
        tokenizer: Any = load_distilled(self.context).tokenizer
        texts = {name: [(r.id, response_text(r, tokenizer)) for r in given] for name, given in answers.items()}
        requests = {name: request_text(self.prompts[name]) for name in answers}
        return shares_won(self.context, judge, judge_server(judge, PAIRS_KEY), texts, requests, stage="prefer")

    def of_data(self, data: DataPairs) -> PairSet:
        return pairs_of_data(self.context, data, load_distilled(self.context).tokenizer, self.template)


def pairs_of_data(context: RunContext, data: DataPairs, tokenizer: Any, template: Any) -> PairSet:
    """The pairs of preference data, in the student's tokens.

    Args:
        template: how the student's prompts become text.

    Raises:
        LimbeckError: a row that is no pair, or cannot be read by the student, naming its place; no pair is left.
    """
    found, most = preferences_of(context, data), data.max_new_tokens or context.recipe.responses.max_new_tokens
    asked = [chosen for chosen, _ in found.rows]
    fitting = {p.id for p in fitting_prompts(context, asked, tokenizer, template, max_new_tokens=most).kept}
    rows = [row for row in found.rows if row[0].id in fitting]
    left_out = Counter(
        rows_heldout=found.heldout, rows_identical=found.identical, rows_too_long=len(found.rows) - len(rows)
    )
    pairs: list[PreferencePair] = []
    answers_of: Counter[str] = Counter()
    for better, worse in zip(*_answers_of_data(context, rows, tokenizer, template, most), strict=True):
        if better.response_ids == worse.response_ids:
            # Their difference was beyond the limit.
            left_out["rows_identical"] += 1
            continue
        number = answers_of[better.prompt_id]
        answers_of[better.prompt_id] += 2
        pairs.append(PreferencePair(chosen=replace(better, round=number), rejected=replace(worse, round=number + 1)))
    if not pairs:
        raise LimbeckError(
            f"{PAIRS_KEY}: the two answers of all {len(rows)} rows are the same in their first {most} tokens; "
            f"raise {PAIRS_KEY}.max_new_tokens"
        )
    every = len(found.rows) + found.heldout + found.identical
    return PairSet(pairs=tuple(pairs), left_out=dict(left_out), prompts=every, answers=2 * every)


def _answers_of_data(
    context: RunContext, rows: Sequence[tuple[Prompt, Prompt]], tokenizer: Any, template: Any, most: int
) -> list[list[Response]]:
    """The chosen answers of rows, and the rejected ones."""
    answers = []
    for place, name in enumerate(ANSWERS):
        with while_reading(name):
            answers.append(
                encode_responses(
                    [row[place] for row in rows],
                    tokenizer,
                    template,
                    max_new_tokens=most,
                    control_tokens=context.recipe.prompts.control_tokens,
                    chat_options=text_options(context, tokenizer),
                    loss_on="last",
                )
            )
    return answers
