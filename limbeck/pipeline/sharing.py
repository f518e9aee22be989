"""Results that runs of a sweep share below a whole stage: block scores, the student before training, answers.

What each is made from is in its key; see `limbeck.runtime.artifact_cache` for what happens with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from limbeck.models.fingerprints import model_fingerprint
from limbeck.models.sources import resolve
from limbeck.pipeline.context import RunContext
from limbeck.runtime.records import fingerprint
from limbeck.types import Json


@contextmanager
def once(context: RunContext, made_from: Json, folder: Path, patterns: Sequence[str]) -> Iterator[None]:
    """A block that writes files into a folder unless they are there, by this run or another one of the sweep.

    Args:
        made_from: everything the files depend on, beside what stages before the student's have written.
        patterns: of the files, in the folder.
    """
    if context.artifacts is None:
        yield
        return
    key = fingerprint({"stages": stages_before(context), **made_from})
    with context.artifacts.lock(key):
        context.artifacts.restore(key, folder)
        yield
        context.artifacts.store(key, folder, [path for pattern in patterns for path in sorted(folder.glob(pattern))])


def stages_before(context: RunContext) -> Json:
    """Fingerprints of the stages before the student's, whose files decide what it begins as."""
    return {name: (context.run.manifest(name) or {}).get("fingerprint") for name in ("respond", "teach")}


def student_inputs(context: RunContext) -> Json:
    """The section `student`, and the weights it names."""
    section, weights = context.recipe.student, None
    if section.model is not None:
        # Fresh weights need no old ones: a configuration and a tokenizer will do.
        source = resolve(
            section.model,
            revision=section.revision,
            weights=section.init != "scratch",
            trust_remote_code=section.trust_remote_code,
        )
        weights = model_fingerprint(source)
    return {"student": asdict(section), "weights": weights}


def initial_student(context: RunContext) -> Json:
    """Inputs of the student before training, beside the responses that blocks are measured on."""
    section = context.recipe.student
    # Only fresh weights are drawn; all other students begin the same whatever the seed.
    drawn = section.init == "scratch" or section.lora is not None
    return student_inputs(context) | {"seed": context.recipe.train.seed if drawn else None}


def choice_inputs(context: RunContext) -> Json:
    """What the student's choice of tokens before training depends on, for fingerprints; nothing where there is none."""
    count = context.recipe.teacher.student_k
    return {"student_k": count, "student": initial_student(context)} if count else {}
