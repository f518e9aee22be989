"""The section `responses`: who writes what the student learns from, where, and which answers are learnt from."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.fields import (
    LATER,
    NEUTRAL,
    SAME_ARM,
    STRICT,
    Count,
    NonNegative,
    Positive,
    Probability,
    Seed,
    Strings,
    VerdictBy,
)
from limbeck.recipe.response_engine import EngineSetting
from limbeck.recipe.response_source import SourceSetting
from limbeck.rollouts.engines import InProcess
from limbeck.rollouts.options import InitialAuthor
from limbeck.rollouts.registry import TeacherResponses

CACHE_GIB = 2.0


@dataclass(config=STRICT, kw_only=True)
class ServerSection:
    base_url: Annotated[str | tuple[str, ...], NEUTRAL]
    """Of an OpenAI-compatible server, such as http://localhost:8000/v1; several with the same model share the
    prompts."""
    model: str | None = None
    """The server's name of the teacher; null takes the only model it offers."""
    api: Literal["auto", "completions", "chat"] = "auto"
    """Which of its two endpoints to use; auto takes the one that keeps tokens exact, where the server has it."""
    concurrency: Annotated[Count, NEUTRAL] = 8
    """Prompts asked at a time, of each server."""
    timeout_s: Annotated[Positive, NEUTRAL] = 120.0
    """Seconds for one whole answer."""
    retries: Annotated[int, Field(ge=0), NEUTRAL] = 5
    """Further tries when the server is out of reach, full or too slow; of several it is then left out, and the others
    do its work."""
    api_key_env: Annotated[str | None, NEUTRAL] = None
    """Name of the environment variable that holds the key; never the key itself."""


@dataclass(config=STRICT, kw_only=True)
class DraftSection:
    model: str
    """A model with the teacher's tokenizer, as for the teacher: the student of an earlier run (runs/NAME/student)."""
    tokens: Count = 4
    """Drafted before the teacher reads them."""
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(config=STRICT, kw_only=True)
class VerifyJudgeSection:
    """Another model behind a server, which compares answers to one prompt, each with each and in both orders."""

    base_url: Annotated[str, NEUTRAL]
    """Of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    model: str | None = None
    """The judge's name there; null takes the only model it offers."""
    verdict: Annotated[VerdictBy, LATER] = "text"
    """How the judge is read: as [[A]] in its reasons, or by the log-probabilities of one letter."""
    judgement_tokens: Count = 512
    """Length of a judgement in text."""
    concurrency: Annotated[Count, NEUTRAL] = 8
    timeout_s: Annotated[Positive, NEUTRAL] = 120.0
    retries: Annotated[int, Field(ge=0), NEUTRAL] = 5
    api_key_env: Annotated[str | None, NEUTRAL] = None
    """Environment variable that holds the key; never the key itself."""


@dataclass(config=STRICT, kw_only=True)
class VerifySection:
    """Which of the teacher's answers to a training prompt is learnt from: one that is right, or the best of several."""

    samples: Count = 1
    """Answers to a prompt at most (best of n): the next one is only written where none before was right; for a judge
    all of them are."""
    by: Literal["task", "math", "judge"] = "task"
    """How answers are checked: as the problems of prompts.task or prompts.generate are; as mathematics, against the
    reference answers of the data; or by a judge, who says which is best."""
    column: str | None = None
    """With by=math: the column of the data with the reference answer; null takes the data's answer."""
    judge: VerifyJudgeSection | None = None
    """With by=judge: who it is."""
    unverified: Literal["drop", "keep"] = "drop"
    """What happens to a prompt without a right answer: it is left out and counted, or its first answer is kept."""
    timeout_s: Positive = 10.0
    """For a program in the sandbox."""
    memory_mb: Count = 512
    """For a program with its files."""


@dataclass(config=STRICT, kw_only=True)
class ResponsesSection:
    source: SourceSetting = field(default_factory=TeacherResponses)
    """Who writes what the student learns from: a name of `limbeck sources`, or a mapping with name and options."""
    initial_author: InitialAuthor = "teacher"
    """Who wrote the responses that are there before training where the source is none of the two: held-out ones always,
    and those that mixed, replay, pairs and sft train on."""
    max_new_tokens: Count = 256
    temperature: NonNegative = 1.0
    """Of sampling alone; 0 is greedy. Never enters the loss."""
    top_p: Probability = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    stop: Strings = ()
    batch_size: Annotated[Count, SAME_ARM] = 48
    cache_gib: Annotated[Positive, SAME_ARM] = CACHE_GIB
    """Memory for the keys and values of a batch of the sampler in this process, in GiB: longer prompts make smaller
    batches. More of it is faster where a device has it."""
    seed: Seed = 0
    verify: VerifySection | None = None
    """Check the teacher's answers to training prompts, and learn from right ones."""
    server: ServerSection | None = None
    """Where the teacher answers instead of in this process; its signal still comes from the teacher here."""
    engine: EngineSetting = InProcess()
    """What writes the student's responses while it trains: a name of `limbeck engines`, or a mapping with name and
    options."""
    draft: DraftSection | None = None
    """A small model that drafts what the teacher answers in this process: fewer passes of the teacher, a sample of the
    same distribution (speculative sampling)."""
