"""Two models decode one batch: one drafts some tokens per round, the other reads them in one pass, a rule decides.

    drafter   d1 ► d2 ► d3 ► d4       four passes over one token
    verifier  [last d1 d2 d3 d4]      one pass over five
    rule      d1 d2 stand, x follows  the next round begins at x

Rows keep different numbers of tokens, so both caches are ragged: the tokens refused are written over. The random
numbers of a token belong to its place in the row. Tokens up to a place never depended on the numbers behind it, so
a place that is drafted again after a refusal may use its own again.

Shape suffixes: B rows still being written, K tokens drafted, J places where the verifier is read, W tokens that the
drafter has not read, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from limbeck.models.heads import project
from limbeck.sampling.acceptance import AcceptanceRule, AcceptanceStats, AcceptedTokens, DraftedTokens
from limbeck.sampling.decoding import DecodingModel, SequenceState, require_finite, stop_reason
from limbeck.sampling.kv_cache import order_without
from limbeck.sampling.ragged_cache import CacheReader
from limbeck.sampling.top_p import pick, probabilities
from limbeck.types import Sampling, TokenPrompt

# Columns of a place's uniform numbers: for the draft (as a model alone would use it), the decision, what follows.
_PROPOSE, _ACCEPT, _NEXT = 0, 1, 2


@dataclass(kw_only=True, eq=False)
class _Row:
    """A response that is being sampled.

    Attributes:
        verified: the prompt as the verifier reads it.
        behind: tokens that the drafter has not read: the last, or the last two where all drafts stood and one followed.
    """

    draft: SequenceState
    verified: TokenPrompt
    behind: int = 1

    @property
    def length(self) -> int:
        return len(self.draft.prompt.ids) + len(self.draft.ids)

    @property
    def shift(self) -> int:
        """By how much a token of the response stands further back for the verifier."""
        return len(self.verified.ids) - len(self.draft.prompt.ids)

    @property
    def last(self) -> int:
        """The last token, as the verifier reads it."""
        return self.draft.ids[-1] if self.draft.ids else self.verified.ids[-1]

    def token(self, position: int) -> int:
        prompt_ids = self.draft.prompt.ids
        return prompt_ids[position] if position < len(prompt_ids) else self.draft.ids[position - len(prompt_ids)]


@dataclass(frozen=True, kw_only=True)
class DraftVerifyPair:
    """The two models of speculative decoding, and their rule.

    Attributes:
        drafter, verifier: both end responses at the same tokens.
        draft_tokens: the most per round.
        logp_of_drafter: whether the drafter's log-probabilities are kept, not the verifier's.
    """

    drafter: DecodingModel
    verifier: DecodingModel
    rule: AcceptanceRule
    draft_tokens: int
    keep_logp: bool
    keep_hidden: bool
    logp_of_drafter: bool


def decode_speculative(
    pair: DraftVerifyPair,
    drafts: Sequence[SequenceState],
    sampling: Sampling,
    tally: AcceptanceStats,
    on_step: Callable[[int, int], None],
    verified: Sequence[TokenPrompt],
) -> None:
    """Complete all drafts in place.

    Args:
        drafts: sorted by prompt length, so that little is padded.
        on_step: called after every round with the number of tokens written and of responses finished by it.
        verified: the prompt of each draft as the verifier reads it.
    """
    with torch.inference_mode():
        rows = [_Row(draft=draft, verified=own) for draft, own in zip(drafts, verified, strict=True)]
        as_verified = [replace(draft, prompt=own) for draft, own in zip(drafts, verified, strict=True)]
        drafter, verifier = (
            CacheReader.of(writer, rows=len(read), capacity=_longest(read) + sampling.max_new_tokens)
            for writer, read in ((pair.drafter, drafts), (pair.verifier, as_verified))
        )
        drafter.prefill(drafts)
        verifier.prefill(as_verified)
        while rows:
            finished, written = _round(pair, drafter, verifier, rows, sampling, tally)
            on_step(written, sum(finished))
            if any(finished):
                order = order_without(finished)
                drafter.cache.keep(order)
                verifier.cache.keep(order)
                rows = [rows[row] for row in order]


def _longest(drafts: Sequence[SequenceState]) -> int:
    return max(len(draft.prompt.ids) for draft in drafts)


def _round(
    pair: DraftVerifyPair,
    drafter: CacheReader,
    verifier: CacheReader,
    rows: list[_Row],
    sampling: Sampling,
    tally: AcceptanceStats,
) -> tuple[list[bool], int]:
    """Rows that a round finished, and the tokens it wrote."""
    # Not fewer for a row that ends before: what it drafts at a place must not depend on how much may follow.
    drafted = min(pair.draft_tokens, max(sampling.max_new_tokens - len(row.draft.ids) for row in rows))
    uniform_BJA = _uniforms(rows, drafted + 1, sampling, drafter.writer.device)
    ids_BK, draft_BKV, q_BKV = _draft(drafter, rows, uniform_BJA[:, :drafted, _PROPOSE], sampling)
    hidden_BJD, verifier_BJV = _verify(verifier, rows, ids_BK, sampling, looks_ahead=pair.rule.looks_ahead)
    next_BJ = uniform_BJA[..., _NEXT]
    # Nothing is drafted at the last place: the token after it is drawn as the verifier alone would draw it.
    next_BJ[:, -1] = uniform_BJA[:, -1, _PROPOSE]
    seen = DraftedTokens(
        ids_BK=ids_BK,
        q_BKV=q_BKV,
        verifier_BJV=verifier_BJV,
        accept_BK=uniform_BJA[:, :drafted, _ACCEPT],
        next_BJ=next_BJ[:, : verifier_BJV.shape[1]],
        sampling=sampling,
    )
    verdict = pair.rule(seen)
    runs = _runs(pair.verifier, rows, seen, verdict, tally)
    if pair.keep_logp:
        logits_BJV = draft_BKV if pair.logp_of_drafter else verifier_BJV
        for row, logp in zip(rows, _of_runs(logits_BJV.log_softmax(-1), runs), strict=True):
            row.draft.logp += logp
    if verdict.drawn_from_BKV is not None:
        for row, logp in zip(rows, _of_runs(verdict.drawn_from_BKV.log(), runs), strict=True):
            row.draft.sampled_logp += logp
    if pair.keep_hidden:
        for row, run, hidden_JD in zip(rows, runs, hidden_BJD, strict=True):
            # A copy, which lets go of the rest of the round.
            row.draft.hidden += hidden_JD[: len(run)].to(torch.float32, copy=True).unbind()
    return [row.draft.stop is not None for row in rows], sum(len(run) for run in runs)


def _uniforms(rows: list[_Row], places: int, sampling: Sampling, device: torch.device) -> Tensor:
    """The numbers of the next places of each row, (B, J, A); behind the end of a row those of its last place."""
    last = sampling.max_new_tokens - 1
    numbers = [[row.draft.uniforms[min(len(row.draft.ids) + j, last)] for j in range(places)] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _positions(
    rows: list[_Row], ahead: int, count: int, sampling: Sampling, *, verifier: bool = False
) -> tuple[Tensor, int]:
    """`count` positions of each row, from `ahead` of its last token on; and the slots they reach.

    The last token a row may have is never read: positions from there on are all that one, which no other token sees.
    """
    places = []
    for row in rows:
        shift = row.shift if verifier else 0
        last = len(row.draft.prompt.ids) + sampling.max_new_tokens - 1 + shift
        places.append([min(max(row.length - 1 + ahead + j + shift, 0), last) for j in range(count)])
    return torch.tensor(places), max(place[-1] for place in places) + 1


def _logits(reader: CacheReader, hidden_BJD: Tensor, rows: list[_Row]) -> Tensor:
    logits_BJV = project(reader.writer.head, hidden_BJD)
    # Half-precision logits are drawn from as transformers does: widened first.
    logits_BJV = logits_BJV if logits_BJV.dtype == torch.float64 else logits_BJV.float()
    require_finite(logits_BJV.flatten(1), [row.draft for row in rows])
    return logits_BJV


def _draft(
    drafter: CacheReader, rows: list[_Row], uniform_BK: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Drafted ids (B, K), their logits and the distributions they were drawn from (B, K, V)."""
    device = drafter.writer.device
    width = max(row.behind for row in rows)
    # A row that is behind by less reads a token once more, into the slot where it stands.
    tokens = [[row.token(max(row.length - width + j, 0)) for j in range(width)] for row in rows]
    ids_BW = torch.tensor(tokens, device=device)
    ids, logits, q = [], [], []
    for step in range(uniform_BK.shape[1]):
        ahead = step if step else 1 - width
        positions_BW, reach = _positions(rows, ahead, ids_BW.shape[1], sampling)
        hidden_BWD = drafter.read(ids_BW, positions_BW.to(device), reach)
        logits_BV = _logits(drafter, hidden_BWD[:, -1:], rows)[:, 0]
        q_BV = probabilities(logits_BV, sampling)
        ids_B = pick(q_BV, uniform_BK[:, step])
        ids.append(ids_B)
        logits.append(logits_BV)
        q.append(q_BV)
        ids_BW = ids_B[:, None]
    return torch.stack(ids, 1), torch.stack(logits, 1), torch.stack(q, 1)


def _verify(
    verifier: CacheReader, rows: list[_Row], ids_BK: Tensor, sampling: Sampling, *, looks_ahead: bool
) -> tuple[Tensor, Tensor]:
    """The verifier's hidden states (B, J, D) and logits (B, J, V) at the drafted tokens and at the one after them."""
    last_B1 = torch.tensor([[row.last] for row in rows], device=ids_BK.device)
    ids_BJ = torch.cat([last_B1, ids_BK if looks_ahead else ids_BK[:, :-1]], dim=1)
    positions_BJ, reach = _positions(rows, 0, ids_BJ.shape[1], sampling, verifier=True)
    hidden_BJD = verifier.read(ids_BJ, positions_BJ.to(ids_BJ.device), reach)
    return hidden_BJD, _logits(verifier, hidden_BJD, rows)


def _runs(
    writer: DecodingModel, rows: list[_Row], seen: DraftedTokens, verdict: AcceptedTokens, tally: AcceptanceStats
) -> list[list[int]]:
    """Give each row its tokens, up to the one that ends it; these tokens."""
    runs = []
    decided = zip(rows, seen.ids_BK.tolist(), verdict.kept_B.tolist(), verdict.next_B.tolist(), strict=True)
    for row, drafted, kept, follows in decided:
        draft, run = row.draft, []
        room = seen.sampling.max_new_tokens - len(draft.ids)
        for token in drafted[:kept] + [follows] * (follows >= 0):
            run.append(token)
            draft.ids.append(token)
            draft.stop = stop_reason(writer, draft, seen.sampling)
            if draft.stop is not None:
                break
        row.behind = 2 if len(run) > len(drafted) else 1
        tally.rounds += 1
        tally.drafted += min(len(run) if draft.stop in ("eos", "stop") else room, len(drafted))
        refused = kept < min(len(drafted), len(run))
        tally.decided(min(kept, len(run)), refused)
        if draft.replaced is not None:
            draft.replaced += refused
        runs.append(run)
    return runs


def _of_runs(values_BJV: Tensor, runs: list[list[int]]) -> list[list[float]]:
    """The values of the tokens of each run."""
    places = values_BJV.shape[1]
    ids_BJ = torch.tensor([run + [0] * (places - len(run)) for run in runs], device=values_BJV.device)
    values_BJ = values_BJV.gather(-1, ids_BJ[..., None])[..., 0]
    return [values[: len(run)] for values, run in zip(values_BJ.tolist(), runs, strict=True)]
