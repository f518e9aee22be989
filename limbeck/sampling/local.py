"""The sampler that runs a model in this process.

`LocalSampler` defines what it is fast at by the naive line it replaces: ``model.generate(do_sample=True, ...)``. It
draws from the same distribution, with three differences: each row has its own random numbers, so that a response does
not depend on the rows beside it; finished rows cost nothing; batches are made of prompts of similar length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from limbeck.models.forward import evaluating
from limbeck.models.heads import causal_model, decoder_of, head_of
from limbeck.ops import onednn
from limbeck.ops.packed_linear import PackedLinears
from limbeck.sampling.batching import batches_left, cache_bytes_per_token, check_prompts, check_sizes, plan_batches
from limbeck.sampling.decoding import DecodingModel, SequenceState, decode, row_uniforms
from limbeck.sampling.image_prompts import expanded_prompts
from limbeck.sampling.stop_strings import StopStrings
from limbeck.types import Author, Response, Sampling, TokenPrompt, as_asked

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingProgress:
    """Progress of a call of the sampler. Responses and tokens of batches that were skipped are not counted as done."""

    responses_done: int
    responses_total: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledBatch:
    """A finished batch.

    Attributes:
        indices: where its prompts stand in the list the sampler was given.
        responses: one for each index, in the same order.
        hidden: on request, for each response the final hidden states that predicted its ids, float32
            (response ids, D). Projected by the model's head they are the author's own logits.
    """

    indices: tuple[int, ...]
    responses: tuple[Response, ...]
    hidden: tuple[Tensor, ...] | None


@dataclass(frozen=True, kw_only=True)
class LocalSampler:
    """Samples from a transformers model in this process (`limbeck.types.Sampler`).

    A response depends on the model, the prompt's ids and id, the author and the `Sampling`. In exact arithmetic it
    depends on nothing else; in float32 the shape of a batch moves logits in their last bits, so batches are a
    function of the list of prompts and the settings alone, and skipping finished ones (`done`) leaves the others as
    they were, bit for bit.

    Attributes:
        model: a transformers causal language model, or PEFT around one.
        eos_token_ids: any of them ends a response and stays in its ids.
        vocab_size: number of real token ids; padded slots of the head are never drawn.
        tokenizer: needed only for stop strings.
        batch_size: rows at most.
        cache_gib: keys and values of a batch at most; longer prompts make smaller batches.
        packed_gib: weights laid out for oneDNN while sampling in float32 on a CPU, at most; 0 saves the memory and
            costs about a fifth of the speed of small batches.
        keep_logp: keep the log-probability at temperature 1 of each id in `Response.logp`.
        on_progress: called after every step.
        mine: asked just before each batch whether this process answers it; where several share them, others do.
    """

    model: nn.Module
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vocab_size: int
    author: Author
    tokenizer: PreTrainedTokenizerBase | None = None
    batch_size: int = 48
    cache_gib: float = 2.0
    packed_gib: float = 2.0
    keep_logp: bool = False
    on_progress: Callable[[SamplingProgress], None] | None = None
    mine: Callable[[tuple[int, ...]], bool] = lambda batch: True

    def __post_init__(self) -> None:
        check_sizes(self.batch_size, self.pad_token_id, self.vocab_size)

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
        """Answer the prompts batch by batch, longest prompts first, so that each batch can be kept once it is there.

        Args:
            done: indices of prompts answered before. A batch is skipped when all of its indices are among them, else it
                is sampled whole, so that a resumed run repeats what an uninterrupted one would have written.
            capture_hidden: also hand over the hidden states that predicted the responses.

        Raises:
            LimbeckError: an empty prompt, ids outside the vocabulary, a prompt that leaves no room for
                `max_new_tokens` in the model's window, stop strings without a tokenizer, impossible sampling settings,
                or (while sampling) logits that are NaN or infinite.
        """
        prompts = expanded_prompts(self.model, prompts)
        check_prompts(prompts, sampling, models=(self.model,), vocab_size=self.vocab_size, tokenizer=self.tokenizer)
        batches = batches_left(self.plan(prompts, sampling), done)
        linears = (
            PackedLinears(self.model, rows=self.batch_size, packed_gib=self.packed_gib) if onednn.available() else None
        )
        for batch, count in with_progress(batches, self.on_progress, self.mine):
            yield self._answer(prompts, batch, sampling, capture_hidden, count, linears or nullcontext())

    def plan(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[tuple[int, ...]]:
        """The batches, as indices into the list of prompts: a function of the prompts' lengths and the settings."""
        bytes_per_token = cache_bytes_per_token(self.model)
        prompts = expanded_prompts(self.model, prompts)
        return plan_batches(prompts, sampling, self.batch_size, int(self.cache_gib * 2**30 / bytes_per_token))

    def _answer(
        self,
        prompts: Sequence[TokenPrompt],
        batch: tuple[int, ...],
        sampling: Sampling,
        capture_hidden: bool,
        on_step: Callable[[int, int], None],
        linears: AbstractContextManager[object],
    ) -> SampledBatch:
        drafts = [
            SequenceState(
                index=index,
                prompt=prompts[index],
                uniforms=row_uniforms(sampling, self.author, prompts[index].id),
            )
            for index in batch
        ]
        with evaluating(self.model), linears:
            decode(
                self._writer(sampling),
                drafts,
                sampling,
                keep_logp=self.keep_logp,
                keep_hidden=capture_hidden,
                on_step=on_step,
            )
        # Stacked outside inference mode: the student's autograd graph may hold on to them.
        hidden = tuple(torch.stack(draft.hidden) for draft in drafts) if capture_hidden else None
        return SampledBatch(
            indices=batch,
            responses=tuple(finished_response(draft, sampling, self.author) for draft in drafts),
            hidden=hidden,
        )

    def _writer(self, sampling: Sampling) -> DecodingModel:
        return decoding_model(
            self.model, self.vocab_size, self.eos_token_ids, self.pad_token_id, stops_of(self.tokenizer, sampling)
        )


def decoding_model(
    model: nn.Module, vocab_size: int, eos_token_ids: Collection[int], pad_token_id: int, stops: StopStrings | None
) -> DecodingModel:
    """A model prepared for the decode loops."""
    return DecodingModel(
        decoder=decoder_of(model),
        head=head_of(model, vocab_size, verify=False),
        config=causal_model(model).config,
        eos_token_ids=frozenset(eos_token_ids),
        pad_token_id=pad_token_id,
        stops=stops,
        model=model,
    )


def stops_of(tokenizer: PreTrainedTokenizerBase | None, sampling: Sampling) -> StopStrings | None:
    """Search for the stop strings; None where there are none."""
    if not sampling.stop:
        return None
    assert tokenizer is not None
    return StopStrings(tokenizer, sampling.stop)


def finished_response(draft: SequenceState, sampling: Sampling, author: Author) -> Response:
    """The response of a finished draft."""
    assert draft.stop is not None
    asked = as_asked(draft.prompt)
    return Response(
        prompt_id=asked.id,
        author=author,
        prompt_ids=asked.ids,
        response_ids=tuple(draft.ids),
        stop=draft.stop,
        sampling=sampling,
        split=asked.split,
        logp=tuple(draft.logp) or None,
        sampled_logp=tuple(draft.sampled_logp) or None,
        replaced=draft.replaced,
        images=asked.images,
    )


def with_progress(
    batches: Sequence[tuple[int, ...]],
    on_progress: Callable[[SamplingProgress], None] | None,
    mine: Callable[[tuple[int, ...]], bool],
) -> Iterator[tuple[tuple[int, ...], Callable[[int, int], None]]]:
    """Each batch of this process with a callback for the number of tokens drawn and of responses finished by a step."""
    total, finished, tokens = sum(len(batch) for batch in batches), 0, 0

    def count(drawn: int, ended: int) -> None:
        nonlocal finished, tokens
        finished, tokens = finished + ended, tokens + drawn
        if on_progress is not None:
            on_progress(SamplingProgress(responses_done=finished, responses_total=total, tokens=tokens))

    for batch in batches:
        if mine(batch):
            yield batch, count


def in_order(batches: Iterable[SampledBatch], count: int) -> list[Response]:
    """The responses of all batches in the order of their prompts."""
    responses: list[Response | None] = [None] * count
    for answered in batches:
        for index, response in zip(answered.indices, answered.responses, strict=True):
            responses[index] = response
    return [response for response in responses if response is not None]
