"""Base class of the samplers in `speculative`: two models, one that drafts and one that verifies.

They have the surface of `LocalSampler`; what they differ in is who drafts and which rule decides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from limbeck.models.forward import evaluating
from limbeck.ops import onednn
from limbeck.ops.packed_linear import PackedLinears
from limbeck.sampling.acceptance import AcceptanceRule, AcceptanceStats
from limbeck.sampling.batching import (
    batches_left,
    cache_bytes_per_token,
    check_prompts,
    check_sizes,
    plan_batches,
    require_text,
)
from limbeck.sampling.decoding import DecodingModel, SequenceState, row_uniforms
from limbeck.sampling.draft_verify_pair import DraftVerifyPair, decode_speculative
from limbeck.sampling.local import (
    SampledBatch,
    SamplingProgress,
    decoding_model,
    finished_response,
    in_order,
    stops_of,
    with_progress,
)
from limbeck.sampling.ragged_cache import require_ragged
from limbeck.types import Author, LimbeckError, Response, Sampling, TokenPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SpeculativeSamplerBase(ABC):
    """Base class of samplers with two models (`limbeck.types.Sampler`).

    A response depends on both models, the prompt's ids and id, the author, the `Sampling` and the number of draft
    tokens, and on no neighbour (see `LocalSampler` for what that means in float32). The hidden states handed over are
    the teacher's, float32: those that predicted each id of the response. Making a sampler runs both models on a few
    tokens, to see that they bear rows of different lengths.

    A round holds the logits and distributions of `batch_size` rows at `draft_tokens` + 1 places from both models.

    Attributes:
        model: the model whose responses they are: a transformers causal language model, or PEFT around one.
        eos_token_ids: any of them ends a response and stays in its ids.
        vocab_size: number of real token ids; padded slots of either head are never drawn.
        tokenizer: needed only for stop strings.
        draft_tokens: tokens that are drafted before the other model reads them.
        batch_size: rows at most.
        cache_gib: keys and values of a batch in both models at most; longer prompts make smaller batches.
        packed_gib: weights laid out for oneDNN while sampling in float32 on a CPU, at most.
        keep_logp: keep the log-probability at temperature 1 under `model` of each id in `Response.logp`.
        on_progress: called after every round.
        mine: asked just before each batch whether this process answers it; where several share them, others do.
        tally: counts of all calls so far; a copy by `dataclasses.replace` goes on counting in the same one.
    """

    model: nn.Module
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase | None = None
    draft_tokens: int = 4
    batch_size: int = 48
    cache_gib: float = 2.0
    packed_gib: float = 2.0
    keep_logp: bool = False
    on_progress: Callable[[SamplingProgress], None] | None = None
    mine: Callable[[tuple[int, ...]], bool] = lambda batch: True
    tally: AcceptanceStats = field(default_factory=AcceptanceStats, compare=False)

    @property
    @abstractmethod
    def author(self) -> Author: ...

    @property
    @abstractmethod
    def _drafter(self) -> tuple[str, nn.Module]:
        """Name of the drafting model in messages, and the model."""

    @property
    @abstractmethod
    def _verifier(self) -> tuple[str, nn.Module]: ...

    @property
    @abstractmethod
    def _rule(self) -> AcceptanceRule: ...

    def _verified(self, prompts: Sequence[TokenPrompt]) -> Sequence[TokenPrompt]:
        """The prompts as the verifier reads them."""
        return prompts

    def __post_init__(self) -> None:
        check_sizes(self.batch_size, self.pad_token_id, self.vocab_size)
        if self.draft_tokens < 1:
            raise LimbeckError(f"draft_tokens is {self.draft_tokens}, expected at least 1: 4 is usual")
        devices = {role: next(model.parameters()).device for role, model in (self._drafter, self._verifier)}
        if len(set(devices.values())) > 1:
            where = " and ".join(f"the {role} on {device}" for role, device in devices.items())
            raise LimbeckError(f"{where}, expected both models on one device: move one of them")
        for role, model in (self._drafter, self._verifier):
            with evaluating(model):
                require_ragged(model, self._writer(model, Sampling()), role)

    def respond(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        """Answer every prompt, in the order given.

        Raises:
            LimbeckError: see `respond_in_batches`.
        """
        return in_order(self.respond_in_batches(prompts, sampling), len(prompts))

    def respond_in_batches(
        self,
        prompts: Sequence[TokenPrompt],
        sampling: Sampling,
        *,
        done: Collection[int] = (),
        capture_hidden: bool = False,
    ) -> Iterator[SampledBatch]:
        """Answer the prompts batch by batch, longest prompts first; arguments and errors as `LocalSampler` has them."""
        models = (self._drafter[1], self._verifier[1])
        require_text(prompts)
        for read in (prompts, self._verified(prompts)):
            check_prompts(read, sampling, models=models, vocab_size=self.vocab_size, tokenizer=self.tokenizer)
        batches = batches_left(self.plan(prompts, sampling), done)
        linears = nullcontext()
        if onednn.available():
            linears = PackedLinears(nn.ModuleList(models), rows=self.batch_size, packed_gib=self.packed_gib)
        for batch, count in with_progress(batches, self.on_progress, self.mine):
            yield self._answer([(i, prompts[i]) for i in batch], sampling, capture_hidden, count, linears)

    def plan(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[tuple[int, ...]]:
        """The batches, as indices into the list of prompts: a function of the prompts' lengths and the settings."""
        bytes_per_token = cache_bytes_per_token(self._drafter[1]) + cache_bytes_per_token(self._verifier[1])
        return plan_batches(prompts, sampling, self.batch_size, int(self.cache_gib * 2**30 / bytes_per_token))

    def _answer(
        self,
        asked: Sequence[tuple[int, TokenPrompt]],
        sampling: Sampling,
        capture_hidden: bool,
        on_step: Callable[[int, int], None],
        linears: AbstractContextManager[object],
    ) -> SampledBatch:
        (_, drafter), (_, verifier) = self._drafter, self._verifier
        # In the teacher's own responses nothing is replaced, whichever model drafted.
        replaced = 0 if drafter is self.model else None
        drafts = [
            SequenceState(
                index=index,
                prompt=prompt,
                uniforms=row_uniforms(sampling, self.author, prompt.id),
                replaced=replaced,
            )
            for index, prompt in asked
        ]
        pair = DraftVerifyPair(
            drafter=self._writer(drafter, sampling),
            verifier=self._writer(verifier, sampling),
            rule=self._rule,
            draft_tokens=self.draft_tokens,
            keep_logp=self.keep_logp,
            keep_hidden=capture_hidden,
            logp_of_drafter=drafter is self.model,
        )
        with evaluating(drafter), evaluating(verifier), linears:
            verified = self._verified([prompt for _, prompt in asked])
            decode_speculative(pair, drafts, sampling, self.tally, on_step, verified)
        # Stacked outside inference mode: the student's autograd graph may hold on to them.
        hidden = tuple(torch.stack(draft.hidden) for draft in drafts) if capture_hidden else None
        return SampledBatch(
            indices=tuple(index for index, _ in asked),
            responses=tuple(finished_response(draft, sampling, self.author) for draft in drafts),
            hidden=hidden,
        )

    def _writer(self, model: nn.Module, sampling: Sampling) -> DecodingModel:
        stops = stops_of(self.tokenizer, sampling)
        return decoding_model(model, self.vocab_size, self.eos_token_ids, self.pad_token_id, stops)
