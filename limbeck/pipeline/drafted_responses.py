"""Responses of the teacher by speculative decoding with a small draft model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from limbeck.models.fingerprints import model_fingerprint
from limbeck.models.loading import load_model
from limbeck.models.sources import resolve
from limbeck.models.vocabulary import compare_vocabularies, describe_vocabulary
from limbeck.pipeline.context import RunContext
from limbeck.recipe.responses import DraftSection
from limbeck.runtime.files import write_json
from limbeck.runtime.records import read_fields
from limbeck.sampling.acceptance import AcceptanceStats
from limbeck.sampling.local import LocalSampler
from limbeck.sampling.speculative import SpeculativeSampler
from limbeck.types import Json, LimbeckError


def draft_inputs(section: DraftSection) -> Json:
    """The settings that change the sample; its distribution is the teacher's with any of them."""
    source = resolve(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
    return {"weights": model_fingerprint(source), "tokens": section.tokens}


def check_draft(context: RunContext) -> None:
    """Check that the draft model can be found and has the teacher's tokens.

    Raises:
        LimbeckError: it is not, or does not.
    """
    section = context.recipe.responses.draft
    if section is None:
        return
    card = describe_vocabulary(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
    differences = compare_vocabularies(context.teacher_card, card).differences
    if differences:
        raise LimbeckError(
            f"responses.draft.model {section.model} cannot draft for the teacher {context.recipe.teacher.model}: "
            f"{differences[0]}; choose a model with the teacher's tokenizer, such as a student of it"
        )


def with_draft(context: RunContext, section: DraftSection, alone: LocalSampler) -> SpeculativeSampler:
    """The sampler of a teacher, with a draft model beside it in the teacher's precision."""
    teacher = context.recipe.teacher
    draft = load_model(
        section.model,
        dtype=teacher.dtype,
        attn_implementation=teacher.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        revision=section.revision,
        progress=context.console.say,
    ).model
    draft.to(context.device)  # type: ignore[arg-type]
    return SpeculativeSampler(
        model=alone.model,
        draft=draft,
        eos_token_ids=alone.eos_token_ids,
        pad_token_id=alone.pad_token_id,
        vocab_size=alone.vocab_size,
        tokenizer=alone.tokenizer,
        draft_tokens=section.tokens,
        batch_size=alone.batch_size,
        cache_gib=alone.cache_gib,
    )


def keep_counts(sampler: LocalSampler | SpeculativeSampler, batch: Path) -> None:
    """Write the draft's counts beside a batch that has just ended, before the batch itself, and reset them."""
    if isinstance(sampler, SpeculativeSampler):
        write_json(_counts_of(batch), sampler.tally.taken().counts())


def draft_record(section: DraftSection | None, batches: Iterable[Path]) -> Json:
    """The draft model's counts over all batches, for the manifest."""
    if section is None:
        return {}
    total = AcceptanceStats()
    for batch in batches:
        total.add(AcceptanceStats(**read_fields(_counts_of(batch), dict.fromkeys(total.counts(), int))))
    acceptance = {"acceptance": round(total.acceptance, 4)} if total.drafted else {}
    return {"draft": {"model": section.model, "tokens": section.tokens} | total.counts() | acceptance}


def _counts_of(batch: Path) -> Path:
    return batch.with_suffix(".draft.json")
