"""A teacher whose tokens are not the student's: it reads its own tokens of the same prompt and the same answer.

Its hidden states come back at the student's positions, so that all that stores or reads them works as for any teacher.
Where a token of the student's is one of the teacher's too, the state is the one from which the teacher predicts it; the
other positions hold zeros and are left out of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from limbeck.teachers.alignment.groups import Group, Kind
from limbeck.teachers.alignment.reading import Aligner, Alignment
from limbeck.teachers.base import Teacher
from limbeck.teachers.seeing import PromptIds, SeeingTeacher
from limbeck.types import DenseSignal, Head, LimbeckError, SharedSignal, Signal, SignalSource, StoredSource, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor

# Answers whose alignments are kept: those of a step are asked for by the teacher and again by the loss.
_KEPT = 4096
# Rows of logits that exist at a time.
_LOGIT_ROWS = 64


@dataclass(kw_only=True)
class Readings:
    """The answers of batches as the teacher reads them.

    Attributes:
        make_aligner: makes the aligner when it is first needed.
        prompt_ids: the teacher's ids of prompts, by the ids of the prompts.
        window: the most tokens that the teacher reads; what is beyond is not aligned.
    """

    make_aligner: Callable[[], Aligner]
    prompt_ids: PromptIds
    window: Callable[[], int | None]
    _known: dict[tuple[int, ...], Alignment] = field(default_factory=dict)

    @cached_property
    def aligner(self) -> Aligner:
        return self.make_aligner()

    def of(self, batch: TokenBatch) -> list[tuple[tuple[int, ...], Alignment]]:
        """The teacher's prompt and the alignment of the answer of each row.

        Raises:
            LimbeckError: an answer of several turns.
        """
        counts = batch.loss_mask_BT.sum(1).tolist()
        lengths = batch.attention_mask_BT.sum(1).tolist()
        found = []
        prompts = self.prompt_ids(batch.prompts)
        rows = zip(batch.loss_mask_BT, counts, lengths, batch.labels_N.split(counts), prompts, strict=True)
        for loss_T, count, length, label_X, prompt in rows:
            if count and int(loss_T.nonzero()[0]) + count != length:
                raise LimbeckError(
                    "an answer of several turns cannot be read in the teacher's tokens; set prompts.loss_on=last"
                )
            found.append((prompt, self._aligned(tuple(label_X.tolist()))))
        return found

    def _aligned(self, ids: tuple[int, ...]) -> Alignment:
        if ids not in self._known:
            if len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[ids] = self.aligner.align(ids)
        return self._known[ids]

    def within(self, prompt: Sequence[int], alignment: Alignment, kind: Kind) -> list[Group]:
        """The groups of a kind, as far as the teacher's window goes."""
        window = self.window()
        most = len(alignment.teacher_ids) if window is None else window - len(prompt)
        groups = [group for group in alignment.groups if group.kind == kind]
        return [group for group in groups if group.teacher[1] - 1 <= most]

    def aligned_N(self, batch: TokenBatch) -> Tensor:
        """Where the loss can compare the two models, bool, one for each position of the loss."""
        import torch

        aligned: list[bool] = []
        for (prompt, alignment), count in zip(self.of(batch), batch.loss_mask_BT.sum(1).tolist(), strict=True):
            exact = {group.student[0] for group in self.within(prompt, alignment, "exact")}
            aligned += [i in exact for i in range(count)]
        return torch.tensor(aligned, dtype=torch.bool)

    def group_N(self, batch: TokenBatch) -> Tensor:
        """The merged group of each position of the loss, numbered through the batch; -1 for none."""
        import torch

        found: list[int] = []
        number = 0
        for (prompt, alignment), count in zip(self.of(batch), batch.loss_mask_BT.sum(1).tolist(), strict=True):
            row = [-1] * count
            for group in self.within(prompt, alignment, "merged"):
                row[slice(*group.student)] = [number] * (group.student[1] - group.student[0])
                number += 1
            found += row
        return torch.tensor(found, dtype=torch.int64)


@dataclass(kw_only=True)
class AcrossTeacher(SeeingTeacher):
    """A teacher with tokens of its own, whose hidden states come at the student's positions."""

    readings: Readings

    @classmethod
    def across(cls, inner: Teacher, readings: Readings, view: str | None = None) -> AcrossTeacher:
        """The teacher behind other tokens.

        Args:
            view: what it sees of a prompt, as fingerprints hold it; None where that is the student's prompt.
        """
        return cls(
            model=inner.model,
            device=inner.device,
            inner=inner,
            prompt_ids=readings.prompt_ids,
            view=view or "",
            readings=readings,
        )

    @property
    def fingerprint(self) -> str:
        return super().fingerprint if self.view else self.inner.fingerprint

    def signal(self, batch: TokenBatch) -> DenseSignal:
        """Its hidden states at the positions that are aligned; zeros at the others."""
        return self.read(batch, merged=False)[0]

    def read_stored(self, batch: TokenBatch) -> None:
        # A store has the tokens that it was captured from.
        return None

    def read(self, batch: TokenBatch, *, merged: bool) -> tuple[DenseSignal, Tensor]:
        """Its hidden states as `signal`, and the log-probability of each merged group, in one pass.

        Args:
            merged: read the merged groups too; without it there are none.
        """
        theirs, place_K, group_K = self._in_its_tokens(batch, merged=merged)
        signal = self.inner.signal(theirs)
        assert isinstance(signal, DenseSignal), "all that a teacher can provide: see limbeck.pipeline.provisions"
        device = signal.hidden_ND.device
        place_K, group_K = place_K.to(device), group_K.to(device)
        hidden_ND = signal.hidden_ND.new_zeros(len(batch.labels_N), signal.hidden_ND.shape[1])
        exact_K = place_K >= 0
        hidden_ND[place_K[exact_K]] = signal.hidden_ND[exact_K]
        inside_K = group_K >= 0
        groups = int(group_K.max()) + 1 if bool(inside_K.any()) else 0
        logp_X = _label_logp(signal.hidden_ND[inside_K], signal.head, theirs.labels_N.to(device)[inside_K])
        logp_G = logp_X.new_zeros(groups).index_add(0, group_K[inside_K], logp_X)
        return DenseSignal(hidden_ND=hidden_ND, head=signal.head), logp_G

    def _in_its_tokens(self, batch: TokenBatch, *, merged: bool) -> tuple[TokenBatch, Tensor, Tensor]:
        """A batch in the teacher's tokens, with a loss where it is read.

        A row of which nothing is compared keeps the place of its first token, since every row has one.

        Returns:
            The batch; for each position of its loss the student's position that it is compared at, and the merged group
            that it is part of; -1 for none.
        """
        import torch

        rows, losses, labels, places, groups = [], [], [], [], []
        start = number = 0
        for (prompt, alignment), count in zip(self.readings.of(batch), batch.loss_mask_BT.sum(1).tolist(), strict=True):
            read: dict[int, tuple[int, int]] = {}
            for group in self.readings.within(prompt, alignment, "exact"):
                read[group.teacher[0]] = (start + group.student[0], -1)
            for group in self.readings.within(prompt, alignment, "merged") if merged else ():
                read |= dict.fromkeys(range(*group.teacher), (-1, number))
                number += 1
            tokens = sorted(read) or [0]
            # Nothing behind the last token that is compared is read.
            ids = (*prompt, *alignment.teacher_ids[: tokens[-1]])
            loss_T = torch.zeros(len(ids), dtype=torch.bool)
            loss_T[[len(prompt) - 1 + token for token in tokens]] = True
            rows.append(torch.tensor(ids))
            losses.append(loss_T)
            labels += [alignment.teacher_ids[token] if alignment.teacher_ids else 0 for token in tokens]
            places += [read.get(token, (start, -1))[0] for token in tokens]
            groups += [read.get(token, (start, -1))[1] for token in tokens]
            start += count
        padded_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        ends_B1 = torch.tensor([[len(row)] for row in rows])
        theirs = replace(
            batch,
            input_ids_BT=padded_BT,
            attention_mask_BT=(torch.arange(padded_BT.shape[1]) < ends_B1).long(),
            loss_mask_BT=torch.nn.utils.rnn.pad_sequence(losses, batch_first=True, padding_value=False),
            labels_N=torch.tensor(labels, dtype=torch.int64),
            drawn_logp_N=torch.full((len(labels),), torch.nan),
        )
        return theirs, torch.tensor(places, dtype=torch.int64), torch.tensor(groups, dtype=torch.int64)


def _label_logp(hidden_ND: Tensor, head: Head, label_N: Tensor) -> Tensor:
    """Log-probabilities of labels at temperature 1, some rows of logits at a time."""
    import torch

    from limbeck.models.heads import project

    found = [hidden_ND.new_zeros(0, dtype=torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32)]
    for hidden, label in zip(hidden_ND.split(_LOGIT_ROWS), label_N.split(_LOGIT_ROWS), strict=True):
        logits_NV = project(head, hidden).to(found[0].dtype)
        found.append(logits_NV.log_softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1))
    return torch.cat(found)


@dataclass(kw_only=True)
class SharedSource:
    """The signal of a teacher with other tokens: its states at the student's positions, with what the two share.

    Attributes:
        inner: gives the states, computed or stored; the teacher itself where merged groups are compared too.
        chain: compare merged groups by the chain rule.
    """

    inner: SignalSource
    readings: Readings
    chain: bool = False
    _heads: list[tuple[Head, Head]] = field(default_factory=list)

    def signal(self, batch: TokenBatch) -> SharedSignal:
        """The signal at every position of the loss, and which of them are aligned."""
        group_N = logp_G = None
        if self.chain:
            assert isinstance(self.inner, AcrossTeacher), "no other source reads merged groups"
            signal, logp_G = self.inner.read(batch, merged=True)
            group_N = self.readings.group_N(batch).to(logp_G.device)
        else:
            signal = self.inner.signal(batch)
        return replace(self._shared(batch, signal), group_N=group_N, group_logp_G=logp_G)

    def read_stored(self, batch: TokenBatch) -> SharedSignal | None:
        stored = None if self.chain or not isinstance(self.inner, StoredSource) else self.inner.read_stored(batch)
        return None if stored is None else self._shared(batch, stored)

    def _shared(self, batch: TokenBatch, signal: Signal) -> SharedSignal:
        import torch

        assert isinstance(signal, DenseSignal), "all that a teacher can provide: see limbeck.pipeline.provisions"
        device = signal.hidden_ND.device
        return SharedSignal(
            hidden_ND=signal.hidden_ND,
            head=self._head(signal),
            student_ids_S=torch.tensor(self.readings.aligner.shared.student, device=device),
            aligned_N=self.readings.aligned_N(batch).to(device),
        )

    def _head(self, signal: DenseSignal) -> Head:
        """The teacher's head with the shared tokens first; made once for each head."""
        if not self._heads or self._heads[0][0] is not signal.head:
            order = head_order(self.readings.aligner.shared.teacher, signal.head.vocab_size)
            self._heads[:] = [(signal.head, in_order(signal.head, order))]
        return self._heads[0][1]


def head_order(shared: Sequence[int], vocab_size: int) -> Tensor:
    """The teacher's ids: those of shared tokens first, then all others."""
    import torch

    first = torch.tensor(shared, dtype=torch.int64)
    others = torch.ones(vocab_size, dtype=torch.bool)
    others[first] = False
    return torch.cat([first, others.nonzero().flatten()])


def in_order(head: Head, order_V: Tensor) -> Head:
    """A head with its rows in another order; the same one where it is theirs."""
    order_V = order_V.to(head.weight_VD.device)
    if len(order_V) == head.vocab_size and bool((order_V == order_V.sort().values).all()):
        return head
    return replace(
        head,
        weight_VD=head.weight_VD[order_V],
        bias_V=None if head.bias_V is None else head.bias_V[order_V],
        vocab_size=len(order_V),
    )
