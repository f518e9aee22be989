"""Where preference pairs come from, as a recipe sets it: frozen dataclasses whose fields are the options.

A member builds the pairs from the materials that the run hands over: answers of the distilled student, the teacher, a
judge, rows of data. Importing this module loads no model library.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.fields import LATER, NEUTRAL, STRICT, Count, NonNegative, Positive, Probability, Seed, VerdictBy
from limbeck.rollouts.preference.pairs import PairSet, best_and_worst, in_words, rankable
from limbeck.types import LimbeckError, Response

# Where the options stand in a recipe, as messages name them.
PAIRS_KEY = "preference.pairs"
Answers = Mapping[str, Sequence[Response]]


class PairMaterials(Protocol):
    """What a run hands over."""

    def sampled(self, how: SampledPairs) -> Answers:
        """Several answers of the distilled student to each training prompt, by prompt id."""
        ...

    def teacher_logp(self, answers: Answers) -> Mapping[str, float]:
        """The teacher's mean log-likelihood per token of each answer, by response id."""
        ...

    def judged(self, judge: JudgePairs, answers: Answers) -> Mapping[str, float | None]:
        """Share of its comparisons that each answer wins, ties half, by response id; None where one was unread."""
        ...

    def of_data(self, data: DataPairs) -> PairSet:
        """The pairs of a data set."""
        ...

    def name_of(self, prompt_id: str) -> str:
        """A prompt with its place in the source, for messages."""
        ...


@dataclass(config=STRICT, kw_only=True)
class PairOptions(ABC):
    """A way to have preference pairs.

    Class attributes:
        needs_teacher: whether the teacher says how likely it finds answers of the student.
    """

    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def build(self, materials: PairMaterials) -> PairSet:
        """The pairs.

        Raises:
            LimbeckError: there are none, with what was left out and why.
        """


@dataclass(config=STRICT, kw_only=True)
class SampledPairs(PairOptions):
    """Several answers of the distilled student to each training prompt; the best and the worst of them are a pair."""

    samples: Annotated[int, Field(ge=2)] = 4
    """Answers to each prompt."""
    prompts: Count | None = None
    """At most so many training prompts, by the hash of their ids; null for all."""
    temperature: Positive = 1.0
    """Of the answers; so are top_p and top_k."""
    top_p: Probability = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Count | None = None
    """Length of the answers; null takes responses.max_new_tokens."""
    seed: Seed = 0
    margin: NonNegative = 0.0
    """Answers whose scores are no further apart than this are a tie."""

    @abstractmethod
    def scores(self, materials: PairMaterials, answers: Answers) -> Mapping[str, float | None]:
        """How good each answer is, by response id; None where they cannot be ranked."""

    def build(self, materials: PairMaterials) -> PairSet:
        answers = materials.sampled(self)
        candidates, left_out = rankable(answers)
        pairs, more = best_and_worst(
            candidates, self.scores(materials, candidates) if candidates else {}, margin=self.margin
        )
        left_out += more
        if not pairs:
            first = materials.name_of(next(iter(answers)))
            nearer = f"lower {PAIRS_KEY}.margin, " if self.margin else ""
            raise LimbeckError(
                f"{PAIRS_KEY}: none of {len(answers)} training prompts, such as {first}, gives a pair "
                f"({in_words(left_out)}), so there is nothing to prefer; {nearer}raise {PAIRS_KEY}.samples or "
                f"{PAIRS_KEY}.temperature, or give other prompts"
            )
        return PairSet(
            pairs=tuple(pairs),
            left_out=dict(left_out),
            prompts=len(answers),
            answers=sum(len(given) for given in answers.values()),
        )


@dataclass(config=STRICT, kw_only=True)
class TeacherPairs(SampledPairs):
    """The teacher ranks answers of the distilled student, by their mean log-likelihood per token."""

    needs_teacher: ClassVar[bool] = True

    def scores(self, materials: PairMaterials, answers: Answers) -> Mapping[str, float | None]:
        return materials.teacher_logp(answers)


@dataclass(config=STRICT, kw_only=True)
class JudgePairs(SampledPairs):
    """A judge, another model behind a server, compares answers of the distilled student, each pair in both orders."""

    samples: Annotated[int, Field(ge=2)] = 2
    """Answers to each prompt; each is compared with each."""
    base_url: Annotated[str | None, NEUTRAL] = None
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

    def scores(self, materials: PairMaterials, answers: Answers) -> Mapping[str, float | None]:
        return materials.judged(self, answers)


@dataclass(config=STRICT, kw_only=True)
class DataPairs(PairOptions):
    """The data says which of two answers is preferred, in its columns chosen and rejected."""

    source: str | None = None
    """Rows with a prompt, chosen and rejected, as for prompts.source; null takes prompts.source. Rows whose prompt is
    held out are left out."""
    dataset_split: str = "train"
    dataset_config: str | None = None
    identical: Literal["error", "drop"] = "error"
    """What happens to a row whose two answers are the same; dropped ones are counted and reported."""
    max_new_tokens: Count | None = None
    """Longer answers are cut; null takes responses.max_new_tokens."""

    def build(self, materials: PairMaterials) -> PairSet:
        return materials.of_data(self)
