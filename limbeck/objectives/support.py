"""Supports: on which entries of the vocabulary student and teacher are compared, and the way back to all of them.

    full         every token (the teacher by hidden states)
    topk_renorm  the teacher's k tokens, both sides renormalised over them: says nothing of the mass outside
    topk_tail    the k tokens and one class for all others: a true divergence (KLs, JS, TV: at most the full)
    sampled      an importance-weighted sample of the teacher: unbiased for forward KL only

A teacher with other tokens (`SharedSignal`) gives

    shared_tail    the tokens that both have, and on each side one class for all others
    shared_renorm  the tokens that both have, both sides renormalised over them: a vocabulary of its own

Sums over kept tokens without either remedy (raw top-k) are not offered: forward they drive the tail to zero, reverse
they push mass out of the kept tokens whatever the teacher says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from limbeck.objectives.base import Objective, Rows
from limbeck.objectives.sums import row_leaves
from limbeck.objectives.temperature import Temperature
from limbeck.types import DenseSignal, LimbeckError, SampledSignal, SharedSignal, Signal, Support, TopKSignal

Spread = Callable[[Tensor], Tensor]
Columns = dict[str, Tensor]


def resolve_support(
    signal: Signal | None, support: Support | None, objective: Objective, temperature: Temperature
) -> Support:
    """The support of a signal, and whether the objective and the temperature go with it.

    Raises:
        LimbeckError: where the signal cannot give the support, or the objective is not defined on it.
    """
    possible: dict[type, tuple[Support, ...]] = {
        DenseSignal: ("full",),
        TopKSignal: ("topk_tail", "topk_renorm"),
        SampledSignal: ("sampled",),
        SharedSignal: ("shared_tail", "shared_renorm"),
    }
    choices = ("full",) if signal is None else possible[type(signal)]
    chosen = choices[0] if support is None else support
    if chosen not in choices:
        raise LimbeckError(
            f"support {chosen!r} of a {type(signal).__name__}: it gives {' or '.join(choices)}; "
            "make a top-k signal of hidden states with topk_signal"
        )
    # One class beside kept tokens is the same to an objective, whichever tokens are kept; and tokens without one are a
    # vocabulary like any other.
    asked = {"shared_tail": "topk_tail", "shared_renorm": "full"}.get(chosen, chosen)
    for _, part in row_leaves(objective):
        if asked not in part.supports:
            shared = "shared_renorm (in a recipe teacher.across.outside=renormalised)"
            raise LimbeckError(
                f"objective {part.name!r} is not defined on support {chosen!r}: "
                f"it needs {shared if chosen == 'shared_tail' else ', '.join(sorted(part.supports))}"
            )
    if chosen == "topk_renorm" and temperature.largest > 1:
        warnings.warn(
            f"topk_renorm at temperature {temperature.largest:g}: the mass outside the top k grows with it and is not "
            "distilled; use topk_tail",
            stacklevel=3,
        )
    return chosen


def signal_columns(
    signal: TopKSignal | SampledSignal, support: Support, teacher_tau_N1: Tensor, vocab_size: int
) -> Columns:
    """Columns of a sparse signal, one row per token, checked."""
    tokens, kept = signal.ids_NK.shape
    if teacher_tau_N1.shape[0] != tokens:
        raise LimbeckError(
            f"{teacher_tau_N1.shape[0]} student tokens but a signal of {tokens}: both need the same positions"
        )
    if signal.logp_NK.shape != (tokens, kept) or signal.log_z_NG.shape != (tokens, len(signal.temperatures)):
        raise LimbeckError(
            f"signal with ids {(tokens, kept)}, logp {tuple(signal.logp_NK.shape)}, "
            f"log_z {tuple(signal.log_z_NG.shape)}: expected (N, K), (N, K) and (N, {len(signal.temperatures)})"
        )
    if isinstance(signal, SampledSignal):
        for name in ("count_NK", "log_proposal_NK"):
            if getattr(signal, name).shape != (tokens, kept):
                shape = tuple(getattr(signal, name).shape)
                raise LimbeckError(f"sampled signal with {name} of shape {shape}: expected {(tokens, kept)}")
    if signal.ids_NK.numel() and not 0 <= int(signal.ids_NK.min()) <= int(signal.ids_NK.max()) < vocab_size:
        raise LimbeckError(f"the signal has ids beyond the student's {vocab_size} tokens: both need one vocabulary")
    dtype, device = teacher_tau_N1.dtype, teacher_tau_N1.device
    columns = {"ids": signal.ids_NK.to(device), "logp": signal.logp_NK.to(device=device, dtype=dtype)}
    if support == "topk_renorm":
        return columns
    log_z_N1 = log_z_of(signal, teacher_tau_N1)
    if isinstance(signal, SampledSignal):
        drawn_NK = signal.count_NK.to(device=device, dtype=dtype)
        log_weight_NK = (
            columns["logp"] / teacher_tau_N1 - log_z_N1 - signal.log_proposal_NK.to(device=device, dtype=dtype)
        )
        share_NK = drawn_NK / drawn_NK.sum(-1, keepdim=True)
        columns["estimate"] = torch.where(drawn_NK > 0, share_NK * log_weight_NK.exp(), 0.0)
    return columns | {"log_z": log_z_N1}


def shared_columns(signal: SharedSignal, student_size: int, teacher_size: int) -> Columns:
    """The student's ids of shared tokens, and the place of each of its ids among them; the same for all tokens.

    Raises:
        LimbeckError: ids that the student does not have, or more of them than the teacher has tokens.
    """
    ids_S = signal.student_ids_S.to(signal.hidden_ND.device)
    if not 0 < len(ids_S) <= min(student_size, teacher_size) or not 0 <= int(ids_S.min()) <= int(ids_S.max()) < (
        student_size
    ):
        raise LimbeckError(
            f"{len(ids_S)} shared tokens of a student with {student_size} and a teacher with {teacher_size}: expected "
            "ids of the student, at most as many as either has"
        )
    place_V = torch.zeros(student_size, dtype=torch.int64, device=ids_S.device)
    place_V[ids_S] = torch.arange(len(ids_S), device=ids_S.device)
    return {"shared_ids": ids_S, "shared_place": place_V}


def log_z_of(signal: TopKSignal | SampledSignal, teacher_tau_N1: Tensor) -> Tensor:
    """log sum_v p_v^(1/tau) of each token, from the grid of the cache; zero at temperature 1 by definition.

    Raises:
        LimbeckError: for a temperature the cache does not hold.
    """
    log_z_NG = signal.log_z_NG.to(teacher_tau_N1)
    found_N1 = torch.full_like(teacher_tau_N1, torch.nan)
    found_N1 = torch.where(teacher_tau_N1 == 1, 0.0, found_N1)
    for column, tau in enumerate(signal.temperatures):
        held_N1 = (teacher_tau_N1 / tau - 1).abs() < 1e-5
        found_N1 = torch.where(held_N1, log_z_NG[:, column : column + 1], found_N1)
    if bool(found_N1.isnan().any()):
        off = float(teacher_tau_N1[found_N1.isnan()][0])
        held = ", ".join(f"{tau:g}" for tau in signal.temperatures) or "1 alone"
        raise LimbeckError(
            f"temperature {off:g} is not in the cache, which holds {held}: capture it with that temperature, "
            "or use support topk_renorm"
        )
    return found_N1


def restrict(support: Support, rows: Rows, columns: Columns) -> tuple[Rows, Spread]:
    """The rows of an objective on a support, and the way of its gradient back to the whole vocabulary."""
    if support == "full":
        return rows, lambda grad_NV: grad_NV
    if support == "sampled":
        return _sampled(rows, columns), lambda grad_NV: grad_NV
    if support in ("shared_tail", "shared_renorm"):
        return _shared(rows, columns, tail=support == "shared_tail")
    ids_NK, logp_NK = columns["ids"], columns["logp"]
    whole_NV = rows.student_logits_NK
    kept_NK = whole_NV.gather(-1, ids_NK)
    if support == "topk_renorm" or ids_NK.shape[-1] == whole_NV.shape[-1]:
        inner = replace(rows, student_logits_NK=kept_NK, teacher_logits_NK=logp_NK)
        return inner, lambda grad_NK: torch.zeros_like(whole_NV).scatter_add(-1, ids_NK, grad_NK)
    return _with_tail(rows, ids_NK, logp_NK, columns["log_z"])


def _with_tail(rows: Rows, ids_NK: Tensor, logp_NK: Tensor, log_z_N1: Tensor) -> tuple[Rows, Spread]:
    """The kept tokens and one class for the rest: its logit is tau times the log-sum-exp of the rest over tau."""
    whole_NV, kept = rows.student_logits_NK, ids_NK.shape[-1]
    rest_NV = whole_NV.scatter(-1, ids_NK, -torch.inf) / rows.student_tau_N1
    log_rest_N1 = rest_NV.logsumexp(-1, keepdim=True)
    student_NK = torch.cat([whole_NV.gather(-1, ids_NK), rows.student_tau_N1 * log_rest_N1], dim=-1)
    tempered_NK = logp_NK / rows.teacher_tau_N1 - log_z_N1
    # What rounding leaves of the tail of a confident teacher is noise of either sign: never less than its own size.
    noise = kept * torch.finfo(tempered_NK.dtype).eps
    tail_N1 = (1 - tempered_NK.exp().sum(-1, keepdim=True)).clamp_min(noise).log()
    teacher_NK = rows.teacher_tau_N1 * torch.cat([tempered_NK, tail_N1], dim=-1)

    def spread(grad_NK: Tensor) -> Tensor:
        share_NV = torch.where(torch.isfinite(rest_NV), (rest_NV - log_rest_N1).exp(), 0.0)
        rest_grad_NV = grad_NK[:, kept:] * share_NV
        return rest_grad_NV.scatter_add(-1, ids_NK, grad_NK[:, :kept])

    return replace(rows, student_logits_NK=student_NK, teacher_logits_NK=teacher_NK), spread


def _shared(rows: Rows, columns: Columns, *, tail: bool) -> tuple[Rows, Spread]:
    """The tokens that both have and, with `tail`, a class for the others where both sides have others.

    Where only one side has, the others are out of its reach or it of theirs: what is left is renormalised.
    """
    whole_NV, every_NV, ids_S = rows.student_logits_NK, rows.teacher_logits_NK, columns["shared_ids"]
    shared, size = len(ids_S), whole_NV.shape[-1]
    if shared == size:
        # All of the student's tokens, in their order.
        return replace(rows, teacher_logits_NK=every_NV[:, :shared]), lambda grad_NV: grad_NV
    label_N = None if rows.label_N is None else _placed(rows.label_N, columns["shared_place"])
    kept_NS, theirs_NS = whole_NV.index_select(-1, ids_S), every_NV[:, :shared]
    rows = replace(rows, student_logits_NK=kept_NS, teacher_logits_NK=theirs_NS, label_N=label_N)
    if not tail or shared == every_NV.shape[-1]:
        return rows, lambda grad_NS: torch.zeros_like(whole_NV).index_copy(-1, ids_S, grad_NS)
    rest_NV = whole_NV.index_fill(-1, ids_S, -torch.inf) * rows.student_inv_tau_N1
    log_rest_N1 = rest_NV.logsumexp(-1, keepdim=True)
    their_rest_N1 = (every_NV[:, shared:] * rows.teacher_inv_tau_N1).logsumexp(-1, keepdim=True)
    student_NK = torch.cat([kept_NS, rows.student_tau_N1 * log_rest_N1], dim=-1)
    teacher_NK = torch.cat([theirs_NS, rows.teacher_tau_N1 * their_rest_N1], dim=-1)

    def spread(grad_NK: Tensor) -> Tensor:
        rest_grad_NV = grad_NK[:, shared:] * (rest_NV - log_rest_N1).exp()
        return rest_grad_NV.index_copy(-1, ids_S, grad_NK[:, :shared])

    return replace(rows, student_logits_NK=student_NK, teacher_logits_NK=teacher_NK), spread


def _placed(label_N: Tensor, place_V: Tensor) -> Tensor:
    """Labels as places among the shared tokens; those that do not count stay as they are."""
    return torch.where(label_N < 0, label_N, place_V[label_N.clamp_min(0)])


def _sampled(rows: Rows, columns: Columns) -> Rows:
    nothing_NV = torch.zeros_like(rows.student_logits_NK)
    log_p_NK = columns["logp"] / rows.teacher_tau_N1 - columns["log_z"]
    estimate_NV = nothing_NV.scatter_add(-1, columns["ids"], columns["estimate"])
    log_p_NK = torch.where(columns["estimate"] > 0, log_p_NK, 0.0)
    return replace(rows, estimate=(estimate_NV, nothing_NV.scatter_add(-1, columns["ids"], log_p_NK)))
