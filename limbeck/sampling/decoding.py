"""One batch from prompts to responses: prefill, then one token per row and step, finished rows dropped.

Shape suffixes: B rows still being written, R rows of a prefill group, T slots of the cache, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.models.heads import project
from limbeck.sampling.image_prompts import image_inputs, shift_of
from limbeck.sampling.kv_cache import DecodeCache, order_without
from limbeck.sampling.stop_strings import StopStrings
from limbeck.sampling.top_p import ATTEMPTS, draw
from limbeck.types import Author, Head, LimbeckError, Sampling, StopReason, TokenPrompt

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

# Large enough for matrix products at full speed, small enough that a layer's activations stay in the cache.
PREFILL_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class DecodingModel:
    """A model for the decode loop, with the tokens and strings that end a response.

    Attributes:
        decoder: the model without its head; its `last_hidden_state` is what `head` projects.
        eos_token_ids: any of them ends a response and stays in it.
        pad_token_id: fills the slots left of short prompts; never seen by attention.
        model: the whole of it, where prompts hold images.
    """

    decoder: nn.Module
    head: Head
    config: PreTrainedConfig
    eos_token_ids: frozenset[int]
    pad_token_id: int
    stops: StopStrings | None
    model: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return self.head.weight_VD.device

    def forward(
        self,
        ids_RT: Tensor,
        positions_RT: Tensor,
        mask_RT: Tensor | None,
        cache: DecodeCache,
        prompts: Sequence[TokenPrompt] = (),
    ) -> Tensor:
        """Hidden states at the last slot of every row: (R, D).

        Args:
            prompts: of the rows, where some hold images.
        """
        inputs: dict[str, Any] = {"input_ids": ids_RT, "position_ids": positions_RT}
        if prompts:
            assert self.model is not None, "prompts were expanded for a model"
            inputs = image_inputs(self.model, prompts, ids_RT, positions_RT)
        output = self.decoder(**inputs, attention_mask=mask_RT, past_key_values=cache, use_cache=True)
        cache.advance(ids_RT.shape[1])
        return output.last_hidden_state[:, -1]


@dataclass(kw_only=True, eq=False)
class SequenceState:
    """A response that is being sampled."""

    index: int
    prompt: TokenPrompt
    uniforms: list[list[float]]
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    sampled_logp: list[float] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    stop: StopReason | None = None
    replaced: int | None = None


def row_seed(sampling: Sampling, author: Author, prompt_id: str) -> int:
    """The row's own seed, 64 bits with sign: a function of seed, author and prompt id alone."""
    key = f"{sampling.seed}\x1f{author}\x1f{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)


def row_uniforms(sampling: Sampling, author: Author, prompt_id: str) -> list[list[float]]:
    """The row's own random numbers in [0, 1), a few for every step: a function of seed, author and prompt id alone.

    The numbers of a step do not depend on `max_new_tokens`. Two prompts with one id get the same numbers.
    """
    generator = torch.Generator().manual_seed(row_seed(sampling, author, prompt_id))
    return torch.rand(sampling.max_new_tokens, ATTEMPTS + 1, generator=generator, dtype=torch.float64).tolist()


def decode(
    writer: DecodingModel,
    drafts: Sequence[SequenceState],
    sampling: Sampling,
    *,
    keep_logp: bool,
    keep_hidden: bool,
    on_step: Callable[[int, int], None],
) -> None:
    """Complete all drafts in place.

    Args:
        drafts: sorted by prompt length, so that little is padded.
        on_step: called after every step with the number of tokens drawn and of responses finished by it.
    """
    with torch.inference_mode():
        longest = max(len(draft.prompt.ids) for draft in drafts)
        cache = DecodeCache(writer.config, rows=len(drafts), capacity=longest + sampling.max_new_tokens - 1)
        hidden_BD = _prefill(writer, drafts, cache, longest)
        mask_BT = _slots(drafts, longest, cache_slots=longest + sampling.max_new_tokens, device=writer.device)
        live = list(drafts)
        while True:
            _extend(writer, live, hidden_BD, sampling, keep_logp=keep_logp, keep_hidden=keep_hidden)
            finished = [draft.stop is not None for draft in live]
            on_step(len(live), sum(finished))
            if all(finished):
                return
            if any(finished):
                order = order_without(finished)
                cache.keep(order)
                live = [live[row] for row in order]
                mask_BT = None if mask_BT is None else mask_BT[order]
            ids_B1 = torch.tensor([[draft.ids[-1]] for draft in live], device=writer.device)
            positions_B1 = torch.tensor(
                [[len(draft.prompt.ids) + len(draft.ids) - 1 + shift_of(draft.prompt)] for draft in live],
                device=writer.device,
            )
            slots = cache.window.length + 1
            mask_BS = None if mask_BT is None else mask_BT[:, :slots]
            hidden_BD = writer.forward(ids_B1, positions_B1, mask_BS, cache)


def _extend(
    writer: DecodingModel,
    live: list[SequenceState],
    hidden_BD: Tensor,
    sampling: Sampling,
    *,
    keep_logp: bool,
    keep_hidden: bool,
) -> None:
    """Draw the next token of every live draft from its hidden state and decide whether it was the last."""
    logits_BV = project(writer.head, hidden_BD)
    # Half-precision logits are drawn from as transformers does: widened first.
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    require_finite(logits_BV, live)
    step = len(live[0].ids)
    uniform_BA = torch.tensor([draft.uniforms[step] for draft in live], dtype=torch.float64, device=writer.device)
    ids_B = draw(logits_BV, uniform_BA, sampling)
    if keep_logp:
        logp_B = logits_BV.gather(-1, ids_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
        for draft, logp in zip(live, logp_B.tolist(), strict=True):
            draft.logp.append(logp)
    if keep_hidden:
        for draft, hidden_D in zip(live, hidden_BD.float().unbind(), strict=True):
            draft.hidden.append(hidden_D)
    for draft, token in zip(live, ids_B.tolist(), strict=True):
        draft.ids.append(token)
        draft.stop = stop_reason(writer, draft, sampling)


def stop_reason(writer: DecodingModel, draft: SequenceState, sampling: Sampling) -> StopReason | None:
    """Reason why the newest id was the last one; None where it was not."""
    if draft.ids[-1] in writer.eos_token_ids:
        return "eos"
    if writer.stops is not None and writer.stops.complete(draft.ids):
        return "stop"
    return "length" if len(draft.ids) == sampling.max_new_tokens else None


def require_finite(logits_BV: Tensor, live: Sequence[SequenceState]) -> None:
    """Stop at logits that are NaN or infinite.

    Raises:
        LimbeckError: names the prompt and the place in the response.
    """
    # One pass: a sum over logits is finite exactly where all of them are.
    finite_B = logits_BV.sum(-1).isfinite()
    if finite_B.all():
        return
    draft = live[int((~finite_B).nonzero()[0])]
    raise LimbeckError(
        f"the model's logits for prompt {draft.prompt.id!r} are NaN or infinite at response token {len(draft.ids)}, "
        "expected finite numbers: check the weights, or sample in float32"
    )


def _prefill(writer: DecodingModel, drafts: Sequence[SequenceState], cache: DecodeCache, longest: int) -> Tensor:
    """Fill the cache with the prompts, rows ending at the same slot; hidden states at the last prompt token: (B, D)."""
    hidden = []
    for first, group in prefill_groups(drafts, whole=not cache.splits_rows):
        width = max(len(draft.prompt.ids) for draft in group)
        cache.look_at(first, len(group), start=longest - width, length=0)
        ids_RT = torch.full((len(group), width), writer.pad_token_id)
        for row, draft in enumerate(group):
            ids_RT[row, width - len(draft.prompt.ids) :] = torch.tensor(draft.prompt.ids)
        lengths_R1 = torch.tensor([[len(draft.prompt.ids)] for draft in group])
        positions_RT = (torch.arange(width) + lengths_R1 - width).clamp_(min=0)
        mask_RT = _slots(group, width, cache_slots=width, device=writer.device)
        prompts = [draft.prompt for draft in group] if any(draft.prompt.images for draft in group) else ()
        hidden.append(writer.forward(ids_RT.to(writer.device), positions_RT.to(writer.device), mask_RT, cache, prompts))
    cache.look_at(0, len(drafts), start=0, length=longest)
    return torch.cat(hidden)


def prefill_groups(drafts: Sequence[SequenceState], *, whole: bool) -> Iterator[tuple[int, Sequence[SequenceState]]]:
    """Neighbouring rows whose padded prompts hold at most `PREFILL_TOKENS` tokens (one row may hold more)."""
    first = 0
    for end in range(1, len(drafts) + 1):
        width = max(len(draft.prompt.ids) for draft in drafts[first : end + 1])
        if end == len(drafts) or (not whole and width * (end + 1 - first) > PREFILL_TOKENS):
            yield first, drafts[first:end]
            first = end


def _slots(drafts: Sequence[SequenceState], longest: int, *, cache_slots: int, device: torch.device) -> Tensor | None:
    """True where a slot holds a token of its row, None where all do: without a mask attention takes a faster kernel."""
    lengths = [len(draft.prompt.ids) for draft in drafts]
    if min(lengths) == longest:
        return None
    return torch.arange(cache_slots, device=device) >= longest - torch.tensor(lengths, device=device)[:, None]
