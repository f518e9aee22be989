"""The teacher's answers with a small model drafting them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from limbeck.models.fingerprints import model_fingerprint
from limbeck.models.loading import load_model
from limbeck.models.sources import resolve
from limbeck.models.vocabulary import compare, describe
from limbeck.pipeline.engine import Story
from limbeck.recipe.sections import DraftSection
from limbeck.runtime.rundir import Json, read_fields, write_json
from limbeck.sampling.acceptance import Tally
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.types import LimbeckError


def draft_inputs(section: DraftSection) -> Json:
    """What of the section changes what is written. The distribution is the teacher's, the sample is another."""
    source = resolve(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
    return {"weights": model_fingerprint(source), "tokens": section.tokens}


def check_draft(story: Story) -> None:
    """The draft model is there and speaks the teacher's tokens.

    Raises:
        LimbeckError: it is not, or does not.
    """
    section = story.recipe.responses.draft
    if section is None:
        return
    card = describe(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
    differences = compare(story.teacher_card, card).differences
    if differences:
        raise LimbeckError(
            f"responses.draft.model {section.model} cannot draft for the teacher {story.recipe.teacher.model}: "
            f"{differences[0]}; choose a model with the teacher's tokenizer, such as a student of it"
        )


def with_draft(story: Story, section: DraftSection, alone: LocalSampler) -> SpeculativeSampler:
    """The sampler of a teacher, with a draft model beside it in the teacher's precision."""
    teacher = story.recipe.teacher
    draft = load_model(
        section.model,
        dtype=teacher.dtype,
        attn_implementation=teacher.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        revision=section.revision,
        progress=story.console.say,
    ).model
    draft.to(story.device)  # type: ignore[arg-type]
    return SpeculativeSampler(
        model=alone.model,
        draft=draft,
        eos_token_ids=alone.eos_token_ids,
        pad_token_id=alone.pad_token_id,
        vocab_size=alone.vocab_size,
        tokenizer=alone.tokenizer,
        draft_tokens=section.tokens,
        batch_size=alone.batch_size,
    )


def keep_counts(sampler: LocalSampler | SpeculativeSampler, batch: Path) -> None:
    """Write the draft's counts beside a batch that has just ended, and count anew. Before the batch itself is there."""
    if isinstance(sampler, SpeculativeSampler):
        write_json(_counts_of(batch), asdict(sampler.tally.taken()))


def draft_record(section: DraftSection | None, batches: Iterable[Path]) -> Json:
    """What the manifest says of the draft model: its counts over all batches."""
    if section is None:
        return {}
    total = Tally()
    for batch in batches:
        total.add(Tally(**read_fields(_counts_of(batch), dict.fromkeys(asdict(Tally()), int))))
    acceptance = {"acceptance": round(total.acceptance, 4)} if total.drafted else {}
    return {"draft": {"model": section.model, "tokens": section.tokens} | asdict(total) | acceptance}


def _counts_of(batch: Path) -> Path:
    return batch.with_suffix(".draft.json")
