"""Several teachers as one: each scores the responses of its own prompts, or all score all and their log-probabilities
are averaged.

Both are exact in hidden states, at every temperature. Logits are linear in hidden state and head, so that the heads
side by side, ``[W_1 | W_2]``, give any weighted sum of the members' logits: of a routed response the states of all
other members are zeros, of the mean of log-probabilities each member's states are multiplied by its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from limbeck.teachers.base import Provision, Teacher
from limbeck.teachers.likeliest import at_temperature_one, likeliest_of_mean, vocabulary_alone
from limbeck.teachers.parts import rows_of_batch
from limbeck.types import DenseSignal, Head, LimbeckError, Signal, TokenBatch, TopKSignal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class SeveralTeachers(Teacher):
    """Teachers with the same tokens, as one.

    Attributes:
        members: by name; the first one gives tokenizer and vocabulary.
        member_of: name of the member for a prompt, by its id; None where all score every response.
        weights_of: weight of each member, where all do.
        of_p: the mean is of their probabilities, else of their log-probabilities.
        sparse: they are put together by their likeliest tokens: where a member says no more, and for the mean of
            probabilities, which no hidden states have.
        temperatures: at which a mean of probabilities is known.
        combination: how they are combined, as fingerprints hold it.
    """

    members: Mapping[str, Teacher]
    member_of: Callable[[str], str] | None = None
    weights_of: Mapping[str, float] | None = None
    of_p: bool = False
    sparse: bool = False
    temperatures: tuple[float, ...] = (1.0,)
    combination: str
    _made: tuple[tuple[int, ...], Head, tuple[Head, ...]] | None = None

    @property
    def first(self) -> Teacher:
        """The member whose tokenizer makes the ids."""
        return next(iter(self.members.values()))

    @property
    def provides(self) -> frozenset[Provision]:
        """What all members provide; with a mean no answers, since none of them writes what the mean would.

        That sparse members can be put together exactly is checked by `limbeck.pipeline.several`.
        """
        given = [member.provides for member in self.members.values()]
        found: set[Provision] = set()
        each: tuple[Provision, ...] = () if self.member_of is None else ("weights", "writing")
        found |= {what for what in each if all(what in one for one in given)}
        if self.member_of is not None and "writing" not in found:
            if all(one & {"writing", "replies"} for one in given):
                found.add("replies")
            elif all(one & {"writing", "replies", "answers"} for one in given):
                found.add("answers")
        if self.sparse:
            found |= {"topk"} if all(one & {"hidden", "topk", "captured"} for one in given) else set()
        elif all("hidden" in one for one in given):
            found.add("hidden")
        elif all(one & {"hidden", "captured"} for one in given):
            found.add("captured")
        return frozenset(found)

    @property
    def vocabulary(self) -> Any:  # type: ignore[override]
        return self.first.vocabulary

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.first.tokenizer

    @property
    def skeleton(self) -> Any:  # type: ignore[override]
        return self.first.skeleton

    @property
    def window(self) -> int | None:
        """The most tokens that all of them can read."""
        limits = [member.window for member in self.members.values()]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def size(self) -> int | None:
        """Parameters of all members."""
        return _sum(member.size for member in self.members.values())

    @property
    def state_width(self) -> int:
        """Numbers of the members' states side by side, with one more of each whose head has a bias."""
        embeddings = [member.skeleton.get_output_embeddings() for member in self.members.values()]
        biased = sum(getattr(one, "bias", None) is not None for one in embeddings)
        return biased + sum(member.state_width for member in self.members.values())

    @cached_property
    def configuration_hash(self) -> str:
        return ""

    @property
    def bytes_on_disk(self) -> int | None:
        return _sum(member.bytes_on_disk for member in self.members.values())

    @property
    def fingerprint(self) -> str:
        from limbeck.runtime.records import fingerprint

        members = {name: member.fingerprint for name, member in self.members.items()}
        return fingerprint({"members": members, "combination": self.combination})

    @property
    def head(self) -> Head:
        """The heads side by side; of likeliest tokens the vocabulary alone."""
        if self.sparse:
            return vocabulary_alone(self.vocabulary.vocab_size, self.device)
        return self._side_by_side({name: member.head for name, member in self.members.items()})

    def check(self) -> None:
        for member in self.members.values():
            member.scorer.check()

    def locate(self, batches: Iterable[TokenBatch]) -> None:
        every = list(batches)
        for name, member in self.members.items():
            if "captured" in member.provides:
                member.locate(self._of_member(name, every))

    def signal(self, batch: TokenBatch) -> Signal:
        import torch

        if self.member_of is None:
            parts = {name: _dense(member.signal(batch)) for name, member in self.members.items()}
            if self.of_p:
                return self.mean_of_p(parts)
            return DenseSignal(hidden_ND=self._joined(parts), head=self._side_by_side(self._heads(parts)))
        if self.sparse:
            return self._routed(batch)
        rows_of = self._rows_of(batch)
        found = {name: _dense(self.members[name].signal(rows_of_batch(batch, rows))) for name, rows in rows_of.items()}
        heads, sequence_N = self._heads(found), batch.sequence_N
        joined = {name: self._joined({name: signal}) for name, signal in found.items()}
        first = next(iter(joined.values()))
        hidden_ND = first.new_zeros(len(batch.labels_N), first.shape[1])
        for name, rows in rows_of.items():
            own_N = torch.isin(sequence_N, torch.tensor(rows, device=sequence_N.device))
            hidden_ND[own_N.to(hidden_ND.device)] = joined[name]
        return DenseSignal(hidden_ND=hidden_ND, head=self._side_by_side(heads))

    def mean_of_p(self, parts: Mapping[str, DenseSignal]) -> TopKSignal:
        """The likeliest tokens of the mean of all members' probabilities."""
        weights = self.weights_of
        assert weights is not None, "of a mean"
        return likeliest_of_mean(
            [parts[name] for name in weights], list(weights.values()), self.support_k, self.temperatures
        )

    def _routed(self, batch: TokenBatch) -> TopKSignal:
        """The likeliest tokens of each row by its own member, at temperature 1."""
        import torch

        shape = (len(batch.labels_N), self.support_k)
        ids_NK = torch.zeros(shape, dtype=torch.int64, device=self.device)
        logp_NK = torch.zeros(shape, device=self.device)
        # A store may keep held-out rows in another form than the others, and gives one form at a time.
        asked = [
            (self.members[name], some)
            for name, rows in self._rows_of(batch).items()
            for some in ([[row] for row in rows] if "captured" in self.members[name].provides else [rows])
        ]
        for member, rows in asked:
            signal = member.signal(rows_of_batch(batch, rows))
            if isinstance(signal, DenseSignal):
                signal = likeliest_of_mean([signal], [1.0], self.support_k, (1.0,))
            assert isinstance(signal, TopKSignal), "see limbeck.pipeline.several"
            own_N = torch.isin(batch.sequence_N, torch.tensor(rows, device=batch.sequence_N.device)).to(self.device)
            ids_NK[own_N] = signal.ids_NK.to(self.device)
            logp_NK[own_N] = signal.logp_NK.to(self.device, logp_NK.dtype)
        return at_temperature_one(ids_NK, logp_NK)

    def reach(self) -> None:
        for member in self.members.values():
            member.reach()

    def fetch_ahead(self, batches: Iterable[TokenBatch], done: Callable[[int], None]) -> None:
        """Have each member prepare what it is asked for next; tokens are counted when they are put together."""
        every = list(batches)
        self.locate(every)
        for name, member in self.members.items():
            member.fetch_ahead(self._of_member(name, every), lambda tokens: None)

    def settled(self, batches: Iterable[TokenBatch] | None = None) -> None:
        every = None if batches is None else list(batches)
        for name, member in self.members.items():
            member.settled(None if every is None else self._of_member(name, every))

    def _of_member(self, name: str, batches: Iterable[TokenBatch]) -> Iterator[TokenBatch]:
        """The rows of some batches that a member scores."""
        for batch in batches:
            if rows := self._rows_of(batch).get(name):
                yield rows_of_batch(batch, rows)

    def _rows_of(self, batch: TokenBatch) -> dict[str, list[int]]:
        """The rows of a batch that each member scores; members without any are left out."""
        if self.member_of is None:
            return {name: list(range(len(batch.rows))) for name in self.members}
        names = [self.member_of(prompt) for prompt in batch.prompts]
        return {name: [row for row, own in enumerate(names) if own == name] for name in dict.fromkeys(names)}

    def _heads(self, parts: Mapping[str, DenseSignal]) -> dict[str, Head]:
        """The head of every member: of those that gave a signal, that of the signal."""
        return {name: parts[name].head if name in parts else member.head for name, member in self.members.items()}

    def _joined(self, parts: Mapping[str, DenseSignal]) -> Tensor:
        """The hidden states for the heads side by side; members that are not given say nothing."""
        import torch

        given = next(iter(parts.values())).hidden_ND
        columns = []
        for name, head in self._heads(parts).items():
            if name in parts:
                weight = 1.0 if self.weights_of is None else self.weights_of[name]
                columns.append(_scaled(parts[name].hidden_ND, head, weight))
            else:
                columns.append(given.new_zeros(len(given), _width(head)))
        return torch.cat(columns, dim=1)

    def _side_by_side(self, heads: Mapping[str, Head]) -> Head:
        """One head of the members' heads, made anew only where one of them is another."""
        known = tuple(id(head.weight_VD) for head in heads.values())
        if self._made is None or self._made[0] != known:
            # The heads are held, so that no other one can have the id of one that is gone.
            self._made = (known, heads_side_by_side(heads), tuple(heads.values()))
        return self._made[1]

    def joined(self, hidden: Mapping[str, Tensor]) -> Tensor:
        """The states of all members for the same tokens as one, for `head`."""
        return self._joined(
            {name: DenseSignal(hidden_ND=hidden_ND, head=self.members[name].head) for name, hidden_ND in hidden.items()}
        )

    def release(self) -> None:
        self._made = None
        for member in self.members.values():
            member.release()


def heads_side_by_side(heads: Mapping[str, Head]) -> Head:
    """One head for the hidden states of several, scales in the states, biases as one more column of each.

    Raises:
        LimbeckError: a cap on the logits, which no sum of heads has.
    """
    import torch

    for name, head in heads.items():
        if head.softcap is not None and len(heads) > 1:
            raise LimbeckError(
                f"teachers.{name} caps its logits (Gemma 2), and logits of several teachers are added; take it alone, "
                "or another model"
            )
    first = next(iter(heads.values()))
    columns = []
    for head in heads.values():
        weight_VD = head.weight_VD.detach()[: first.vocab_size]
        columns.append(weight_VD)
        if head.bias_V is not None:
            columns.append(head.bias_V.detach()[: first.vocab_size, None])
    return Head(weight_VD=torch.cat(columns, dim=1), vocab_size=first.vocab_size)


def _sum(numbers: Iterable[int | None]) -> int | None:
    """The sum of numbers that are all known."""
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)


def _dense(signal: Signal) -> DenseSignal:
    assert isinstance(signal, DenseSignal), "all that members can provide: see limbeck.pipeline.several"
    return signal


def _width(head: Head) -> int:
    return head.weight_VD.shape[1] + (head.bias_V is not None)


def _scaled(hidden_ND: Tensor, head: Head, weight: float) -> Tensor:
    """Hidden states times the weight of their member and the scale of its head, with a column for its bias."""
    import torch

    scaled_ND = hidden_ND * (head.scale * weight)
    if head.bias_V is None:
        return scaled_ND
    return torch.cat([scaled_ND, scaled_ND.new_full((len(scaled_ND), 1), head.scale * weight)], dim=1)
