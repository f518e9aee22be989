"""Samplers with two models; see `draft_verify_pair` for the method.

    SpeculativeSampler   the teacher's responses, drafted by a small model: a sample of the teacher alone, only faster
    SkdSampler           the student's, with tokens that the teacher finds unlikely replaced (speculative KD)
    MixtureSampler       each token from a mixture of both (MiniLLM)

Both models share tokenizer and vocabulary; their heads may be padded differently. No weight outlives a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from limbeck.sampling.acceptance import AcceptanceRule, MixtureSampling, Redraw, SpeculativeSampling, TopKVeto
from limbeck.sampling.draft_and_verify import SpeculativeSamplerBase
from limbeck.types import Author, LimbeckError, TokenPrompt


@dataclass(frozen=True, kw_only=True)
class SpeculativeSampler(SpeculativeSamplerBase):
    """The teacher's responses, with a small model drafting and the teacher reading its drafts in one pass.

    The responses are a sample of the teacher alone, whatever the draft model is (Leviathan et al. 2023,
    arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318); the better it agrees with the teacher, the fewer passes of
    the teacher they take. With the teacher itself as the draft model they are `LocalSampler`'s, token for token, unless
    `top_p` or `top_k` cut the distribution.

    Attributes:
        model: the teacher.
        draft: the draft model, usually the student.
    """

    draft: nn.Module

    @property
    def author(self) -> Author:
        return "teacher"

    @property
    def _drafter(self) -> tuple[str, nn.Module]:
        return "draft model", self.draft

    @property
    def _verifier(self) -> tuple[str, nn.Module]:
        return "teacher", self.model

    @property
    def _rule(self) -> AcceptanceRule:
        return SpeculativeSampling()


@dataclass(frozen=True, kw_only=True)
class StudentWithTeacher(SpeculativeSamplerBase):
    """Base class of samplers in which the student drafts its own responses and the teacher verifies each token.

    Attributes:
        model: the student.
        teacher: whose hidden states are handed over.
        seen: gives prompts as the teacher reads them, where it sees others than the student.
    """

    teacher: nn.Module
    seen: Callable[[Sequence[TokenPrompt]], Sequence[TokenPrompt]] | None = None

    def _verified(self, prompts: Sequence[TokenPrompt]) -> Sequence[TokenPrompt]:
        return prompts if self.seen is None else self.seen(prompts)

    @property
    def author(self) -> Author:
        return "student"

    @property
    def _drafter(self) -> tuple[str, nn.Module]:
        return "student", self.model

    @property
    def _verifier(self) -> tuple[str, nn.Module]:
        return "teacher", self.teacher


@dataclass(frozen=True, kw_only=True)
class SkdSampler(StudentWithTeacher):
    """The student's responses, with the tokens outside the teacher's `top_k` replaced by the teacher's: speculative
    knowledge distillation (Xu et al. 2025, arXiv:2410.11325).

    Each token is drawn from the student with the settings of sampling. One that is not among the teacher's `top_k` most
    likely there is replaced by a draw from those, at the same temperature, or as the authors' code has it from the
    teacher's distribution with the settings of sampling (temperature, top-p, top-k). With the whole vocabulary as
    `top_k` the responses are the student's own; with 1 and a draw from those they are the teacher's greedy ones.
    `tally.replaced` counts.

    Attributes:
        top_k: K; 25 in the paper.
        redraw: what a token is replaced by: a draw from the teacher's K ("top_k") or from its nucleus ("nucleus").
    """

    top_k: int = 25
    redraw: Redraw = "top_k"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise LimbeckError(f"top_k is {self.top_k}, expected at least 1 token of the teacher: 25 is the paper's")
        SpeculativeSamplerBase.__post_init__(self)

    @property
    def _rule(self) -> AcceptanceRule:
        return TopKVeto(top_k=self.top_k, redraw=self.redraw)


@dataclass(frozen=True, kw_only=True)
class MixtureSampler(StudentWithTeacher):
    """Each token from alpha * p + (1 - alpha) * q, p the teacher and q the student, both with the settings of sampling:
    teacher-mixed sampling (Gu et al. 2024, MiniLLM, arXiv:2306.08543, section 2.2).

    `Response.sampled_logp` holds the log-probability under this mixture, `Response.logp` (kept unless `keep_logp` is
    False) that under the student at temperature 1: MiniLLM's importance weight of a token is
    exp(logp - sampled_logp). The student drafts and the mixture is drawn exactly, as in `SpeculativeSampler`: at least
    1 - alpha of the drafts stand, so the teacher is run less than once per token.

    Attributes:
        alpha: the teacher's share; 0.2 in the paper.
    """

    alpha: float = 0.2
    keep_logp: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise LimbeckError(f"alpha is {self.alpha}, expected the teacher's share in [0, 1]: 0.2 is the paper's")
        SpeculativeSamplerBase.__post_init__(self)

    @property
    def _rule(self) -> AcceptanceRule:
        return MixtureSampling(alpha=self.alpha)
