"""Stage 5, where a recipe has a section `preference`: pairs of answers, and the distilled student tuned on them.

Its first half writes `preferences/pairs.jsonl`, its second trains with TRL's DPOTrainer; both go on where a kill left
them. The student that distillation left stays in `student/`; the tuned one is `preferred/`, which is what the run hands
on: it is evaluated, published and exported.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

from limbeck.pipeline.context import RunContext, Stage
from limbeck.pipeline.judged_answers import judge_server, require_judge
from limbeck.pipeline.preference_pairs import RunMaterials, load_distilled, preferences_of
from limbeck.pipeline.stages.respond import teacher_inputs
from limbeck.prompts.readers import source_digest
from limbeck.recipe.keys import fingerprinted, fingerprinted_member
from limbeck.recipe.preference import PAIRS_SETTING, PreferenceSection
from limbeck.rollouts.preference.options import PAIRS_KEY, DataPairs, JudgePairs
from limbeck.rollouts.preference.pairs import PreferencePair, in_words, read_pairs, write_pairs
from limbeck.runtime.files import write_json, write_text
from limbeck.runtime.records import read_object, read_sealed, sealed
from limbeck.student.build import freeze_embeddings
from limbeck.student.saving import save_student
from limbeck.types import Interrupted, Json, LimbeckError


def _section(context: RunContext) -> PreferenceSection:
    section = context.recipe.preference
    assert section is not None, "the stage is none of a recipe without it"
    return section


def check_preference(context: RunContext) -> None:
    """TRL is there, one process trains, and the data or the judge is there.

    Raises:
        LimbeckError: one of them is not.
    """
    section = context.recipe.preference
    if section is None:
        return
    if importlib.util.find_spec("trl") is None:
        raise LimbeckError(
            "the section preference tunes with TRL's DPOTrainer, and TRL is not installed; "
            "pip install 'limbeck[preference]', or remove the section"
        )
    if context.launch.ranks > 1:
        raise LimbeckError(
            f"the section preference tunes in one process, and {context.launch.ranks} were launched; "
            "run `limbeck train` with them, then the whole run without the launcher"
        )
    if isinstance(section.pairs, DataPairs):
        preferences_of(context, section.pairs)
    elif isinstance(section.pairs, JudgePairs) and not context.run.done("prefer"):
        judge_server(section.pairs, PAIRS_KEY).check_key()
        if context.wants("prefer"):
            require_judge(section.pairs, PAIRS_KEY)


def _preference_inputs(context: RunContext) -> Json:
    section = _section(context)
    inputs = fingerprinted(section) | {"pairs": fingerprinted_member(PAIRS_KEY, section.pairs)}
    if section.pairs.needs_teacher:
        inputs["teacher"] = teacher_inputs(context)
    if isinstance(section.pairs, DataPairs):
        inputs["content"] = source_digest(section.pairs.source or context.recipe.prompts.source)
    return inputs


def _run_preference(context: RunContext) -> Json:
    pairs, record = _pairs(context)
    rewards = _tune(context, pairs)
    last = rewards[-1]
    margin, accuracy = last["rewards/margins"], last["rewards/accuracies"]
    context.console.say(
        f"prefer: {last['step']} steps, reward margin {margin:.4g} and accuracy {accuracy:.3g} in the last one"
    )
    return dict(record) | {"steps": last["step"], "reward_margin": margin, "reward_accuracy": accuracy}


def _pairs(context: RunContext) -> tuple[list[PreferencePair], Mapping[str, Any]]:
    """The pairs and what the manifest says of them; made once, the record last."""
    path, record = context.run.preferences / "pairs.jsonl", context.run.preferences / "pairs.json"
    if not record.exists():
        section = _section(context)
        found = section.pairs.build(RunMaterials(context))
        write_pairs(path, found.pairs)
        counts = {
            "pairs_by": PAIRS_SETTING.name_of(section.pairs),
            "pairs": len(found.pairs),
            "prompts": found.prompts,
            "answers": found.answers,
            "left_out": {name: count for name, count in found.left_out.items() if count},
        }
        write_json(record, sealed(counts))
    counts = read_sealed(record)
    left_out = in_words(counts["left_out"])
    context.console.say(
        f"prefer: {counts['pairs']} pairs, preferred by the {counts['pairs_by']}"
        + (f"; left out: {left_out}" if left_out else "")
    )
    return read_pairs(path), counts


def _tune(context: RunContext, pairs: list[PreferencePair]) -> list[Json]:
    """Tune the distilled student and save it as it was saved; returns what was logged of each step."""
    from limbeck.training.dpo import tune_preferences

    run, student = context.run, load_distilled(context)
    if context.recipe.student.freeze_embeddings:
        freeze_embeddings(student.model)
    with context.stop.deferred() as should_stop:
        try:
            rewards = tune_preferences(
                student.model,
                student.tokenizer,
                pairs,
                _section(context),
                seed=context.recipe.train.seed,
                device=context.device,
                checkpoints=run.preferences / "checkpoints",
                console=context.console,
                should_stop=should_stop,
            )
        except Interrupted as stopped:
            context.console.say(f"prefer: {stopped}")
            if context.stop.requested:
                raise KeyboardInterrupt(context.stop.number) from stopped
            raise
    write_text(run.preferences / "rewards.jsonl", "".join(json.dumps(row) + "\n" for row in rewards))
    save_student(student.model, student.tokenizer, run.preferred)
    write_json(run.preferred / "student.json", read_object(run.student / "student.json"))
    return rewards


STAGE = Stage(
    name="prefer",
    check=check_preference,
    inputs=_preference_inputs,
    run=_run_preference,
    outputs=lambda run: (run.preferences, run.preferred),
    # The model card is the evaluation's.
    working=("preferences/answers/*", "preferences/scores/*", "preferences/checkpoints/*", "preferred/README.md"),
    included=lambda recipe: recipe.preference is not None,
)
