"""The section `evaluate` of a recipe: one section for each group of metrics, see `recipe_sections`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.fields import NEUTRAL, SAME_ARM, STRICT, Count, NonNegative, Positive, Seed, Strings

Whose = Literal["responses", "teacher", "student", "references"]
EvaluationGroup = Literal["fidelity", "rouge", "diversity", "judge", "tasks", "speculation", "cost", "nll"]


@dataclass(config=STRICT, kw_only=True)
class FidelitySection:
    whose: tuple[Whose, ...] = ("responses",)
    """Whose answers the two models are compared on: the held-out responses of the run, fresh ones of the teacher or of
    the student (exposure bias), or the data's references."""
    top_k: Annotated[int, Field(ge=2)] = 5
    """Tokens of the top-k agreement."""
    temperature: NonNegative = 1.0
    """Of the fresh answers; their length is evaluate.max_new_tokens."""
    seed: Seed = 0


@dataclass(config=STRICT, kw_only=True)
class NllSection:
    whose: Literal["responses", "references"] = "responses"
    """Whose answers the student's likelihood is measured on: the held-out responses of the run, or the data's."""


@dataclass(config=STRICT, kw_only=True)
class RougeSection:
    against: tuple[Literal["teacher", "references"], ...] = ("teacher",)
    """teacher: greedy answers beside the teacher's greedy ones. references: the papers' protocol, sampled answers
    beside the reference answers of the data, the best of several counts."""
    seeds: tuple[Seed, ...] = (10, 20, 30, 40, 50)
    """references: one answer a prompt for each; the mean over them is reported."""
    temperature: NonNegative = 1.0
    """references: of the sampled answers."""


@dataclass(config=STRICT, kw_only=True)
class DiversitySection:
    temperatures: tuple[NonNegative, ...] = (1.0,)
    """Decoding temperatures; each is a point of the fidelity-diversity curve."""
    samples: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt."""
    prompts: Count | None = 64
    """At most so many prompts; null for all."""
    seed: Seed = 0


@dataclass(config=STRICT, kw_only=True)
class JudgeSection:
    base_url: Annotated[str | None, NEUTRAL] = None
    """Of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    model: str | None = None
    """The judge's name there; null takes the only model it offers."""
    against: Literal["teacher", "references", "before"] = "teacher"
    """Whose answers the student's are set beside."""
    concurrency: Annotated[Count, NEUTRAL] = 8
    timeout_s: Annotated[Positive, NEUTRAL] = 120.0
    retries: Annotated[int, Field(ge=0), NEUTRAL] = 5
    api_key_env: Annotated[str | None, NEUTRAL] = None
    """Environment variable that holds the key; never the key itself."""
    max_new_tokens: Count = 512
    """Length of a judgement."""
    price_per_million: Annotated[tuple[NonNegative, NonNegative] | None, NEUTRAL] = None
    """Of input and output tokens, in any currency, for the estimate."""


@dataclass(config=STRICT, kw_only=True)
class TasksSection:
    files: dict[Literal["gsm8k", "math", "humaneval", "mbpp"], str] = field(default_factory=dict)
    """The tasks and where their problems lie (JSONL in the fields of the original data sets)."""
    limit: Count | None = None
    """Only so many problems of each."""
    samples: Count = 1
    """Answers to each problem."""
    temperature: NonNegative = 0.0
    """Of the answers; more than one sample needs one above 0."""
    pass_at: tuple[Count, ...] = (1,)
    """k of pass@k, none above samples."""
    max_new_tokens: Count = 256
    timeout_s: Positive = 10.0
    """For a program in the sandbox."""
    memory_mb: Count = 512
    """For a program with its files, which lie in memory: they get 64 MiB of it, a quarter at most."""
    seed: Seed = 0
    lm_eval: Strings = ()
    """Tasks of lm-evaluation-harness, where it is installed."""


@dataclass(config=STRICT, kw_only=True)
class SpeculationSection:
    draft_tokens: tuple[Count, ...] = (4,)
    """Tokens that the student drafts for each of the teacher's passes."""
    prompts: Count = 16
    temperature: NonNegative = 1.0
    seed: Seed = 0


@dataclass(config=STRICT, kw_only=True)
class CostSection:
    prompt_tokens: Count = 256
    """Length of the prompt that is read."""
    new_tokens: Count = 32
    """Tokens decoded one by one."""
    repeats: Count = 3
    """Each is measured so often; the detail has the medians."""


@dataclass(config=STRICT, kw_only=True)
class EvaluateSection:
    """What is measured and how; a list alone, `evaluate: [fidelity, rouge]`, stands for its groups."""

    groups: tuple[EvaluationGroup, ...] = ("fidelity", "rouge")
    max_new_tokens: Count = 64
    """Length of the answers that are measured."""
    prompts: Count | None = None
    """Answers for at most this many held-out prompts; null for all."""
    samples: Annotated[int, Field(ge=0)] = 6
    """Answers shown side by side in the report."""
    batch_size: Annotated[Count, SAME_ARM] = 32
    fidelity: FidelitySection = field(default_factory=FidelitySection)
    nll: NllSection = field(default_factory=NllSection)
    rouge: RougeSection = field(default_factory=RougeSection)
    diversity: DiversitySection = field(default_factory=DiversitySection)
    judge: JudgeSection = field(default_factory=JudgeSection)
    tasks: TasksSection = field(default_factory=TasksSection)
    speculation: SpeculationSection = field(default_factory=SpeculationSection)
    cost: CostSection = field(default_factory=CostSection)
