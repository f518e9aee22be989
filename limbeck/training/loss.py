"""The loss of a micro-batch as a module: student, objectives and a learned projection.

Wrappers (DDP, FSDP) see one forward from token ids to loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.models.forward import hidden_states
from limbeck.models.heads import head_of
from limbeck.objectives import FusedLoss, HiddenPair, Temperature, fused_distillation_loss
from limbeck.objectives.fused.aligned import aligned_distillation_loss, labels_alone
from limbeck.objectives.fused.body import measured_on
from limbeck.objectives.fused.projection import gather_parameter
from limbeck.objectives.sequence.difficulty import token_difficulty
from limbeck.objectives.sequence.distillm2 import label_logp
from limbeck.objectives.sequence.rules import SequenceRule, SequenceStats, TokenOptions
from limbeck.objectives.sums import AnyObjective, CrossEntropy, leaves, part_names, row_leaves
from limbeck.training.sharding import in_root, is_sharded, shard_parameter
from limbeck.types import DenseSignal, Head, SharedSignal, Signal, SignalSource, Support, TokenBatch, TopKSignal

WRITERS = ("teacher", "student")
# Supports of a teacher with other tokens.
SHARED = ("shared_tail", "shared_renorm")
Look = Literal["whitened", "difficulty"]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings that change over training, at one step: temperature, options of the objective, state of the rule.

    Attributes:
        reference: the mean gaps of an adaptive rule.
        whitening: mean and standard deviation, over the step, of the values that a rule whitens.
        look: compute no loss, but what is measured over the whole step first: the values that a rule whitens, or how
            far apart the two models are at each token.
    """

    temperature: Temperature = field(default_factory=Temperature)
    options: Mapping[str, float] = field(default_factory=dict)
    reference: tuple[float, float] | None = None
    whitening: tuple[float, float] | None = None
    look: Look | None = None


@dataclass(frozen=True, kw_only=True)
class LossPlan:
    """Objectives and rule, by author of the responses.

    Attributes:
        objective: for the teacher's responses (and the data's), and for the student's where `student_objective` is
            None.
        student_objective: for the student's own responses.
        rule: gives token options and weights from whole responses.
        authored: whether the student writes responses too, so that metrics are logged by author.
        sorted_weight: of the distance by rank between tokens that only one side has, where the two have other tokens.
    """

    objective: AnyObjective
    student_objective: AnyObjective | None = None
    rule: SequenceRule | None = None
    authored: bool = False
    support: Support = "full"
    sorted_weight: float = 0.0

    @property
    def objectives(self) -> tuple[AnyObjective, ...]:
        return (self.objective,) if self.student_objective is None else (self.objective, self.student_objective)

    def terms(self, by_student_N: Tensor) -> Iterator[tuple[AnyObjective, Tensor | None]]:
        """Each objective with its tokens (bool); None for all. Objectives without tokens are left out."""
        if self.student_objective is None:
            yield self.objective, None
            return
        for objective, keep_N in ((self.objective, ~by_student_N), (self.student_objective, by_student_N)):
            if bool(keep_N.any()):
                yield objective, keep_N

    def options_for(self, objective: AnyObjective, options: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The token options for one of the objectives: of two, each gets those that it has."""
        known = frozenset[str]().union(*(part.token_fields for _, part in row_leaves(objective)))
        return {
            name: o for name, o in options.items() if self.student_objective is None or name.split(".")[-1] in known
        }

    @property
    def needs_teacher(self) -> bool:
        """Whether anything but the labels is read, by an objective or a rule."""
        labels = frozenset({"labels"})
        return self.rule is not None or any(part.reads != labels for one in self.objectives for _, part in leaves(one))

    @property
    def gauge(self) -> str:
        """Name, in `stats`, of the mean that measures the student's fit: lower is better.

        The loss, but for objectives that push sampled tokens alone, whose value does not measure the fit: for these it
        is the forward KL that is measured beside them, or the teacher's responses' negative log-likelihood where none
        is, which is an estimate of it but for a constant.
        """
        beside = ("forward_kl", "nll") if self.pushes_samples else ()
        return next((name for name in beside if name in self.stats), "loss")

    @property
    def pushes_samples(self) -> bool:
        """Whether an objective is a policy gradient on sampled tokens, not a divergence of whole distributions."""
        pushing = {"opd", "policy_gradient"}
        return any(part.name in pushing for one in self.objectives for _, part in leaves(one))

    def measured(self, objective: AnyObjective) -> bool:
        """Whether entropies can be measured beside an objective."""
        return self.support != "sampled" and any("teacher" in part.reads for _, part in row_leaves(objective))

    def labelled(self, objective: AnyObjective) -> bool:
        """Whether log-probabilities of the labels are measured beside it."""
        return self.authored and self.support == "full" and self.measured(objective)

    @cached_property
    def stats(self) -> tuple[str, ...]:
        """Names of the means that are logged of each step."""
        names = ["loss"]
        for objective in self.objectives:
            parts = part_names(leaves(objective))
            if len(parts) > 1:
                names += [f"loss/{part}" for part in parts]
            if self.measured(objective):
                names += measured_on(self.support)
            if self.labelled(objective):
                names += [f"{side}/{writer}" for side in ("log_q", "log_p") for writer in WRITERS]
        if self.support in SHARED:
            names += ["aligned", "merged"]
        if self.sorted_weight and any(map(self.measured, self.objectives)):
            names.append("sorted_distance")
        if self.student_objective is not None:
            names += [f"loss/{writer}" for writer in WRITERS]
        if self.rule is not None:
            # An objective that reads no teacher has no divergence measured beside it.
            names += ["nll"] if self.pushes_samples and "forward_kl" not in names else []
            names += [f"{measure}/{writer}" for measure in self.rule.measures for writer in WRITERS]
        return tuple(dict.fromkeys(names))


class Sums:
    """Sums and counts of logged values, by name; they add up over micro-batches and ranks."""

    def __init__(self, names: tuple[str, ...], device: torch.device):
        self.place = {name: i for i, name in enumerate(names)}
        self.of_S2 = torch.zeros(len(names), 2, device=device)

    def add(self, name: str, values: Tensor, keep: Tensor | None = None) -> None:
        values = values.detach() if keep is None else values.detach()[keep]
        self.of_S2[self.place[name]] += torch.stack(
            [values.float().sum(), values.new_tensor(float(values.numel())).float()]
        )


class StudentLoss(nn.Module):
    """Student and objectives.

    Attributes:
        packed: whether the student reads the rows of a batch one after another, without padding.
        projection_ED: maps the student's last hidden states to the teacher's width for objectives on hidden states;
            learned with the student and left behind when it is saved. None where nothing needs it.
    """

    def __init__(
        self,
        student: nn.Module,
        loss_plan: LossPlan,
        *,
        vocab_size: int,
        projection_ED: Tensor | None,
        compile: Literal["auto", "on", "off"],
        packed: bool = False,
    ):
        super().__init__()
        self.packed = packed
        self.student = student
        self.loss_plan = loss_plan
        self.vocab_size = vocab_size
        self.compile_body: Literal["auto", "on", "off"] = compile
        self.projection_ED = None if projection_ED is None else nn.Parameter(projection_ED)
        if self.projection_ED is not None and is_sharded(student):
            self.projection_ED = shard_parameter(self.projection_ED, student)

    @property
    def stats(self) -> tuple[str, ...]:
        return self.loss_plan.stats

    def forward(
        self, batch: TokenBatch, signal: Signal | None, weight_N: Tensor, step_settings: StepSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of the per-token values; sums and counts of `stats` (S, 2) and a divergence (N,), detached.

        The divergence is the forward KL at temperature 1 where it is measured, else the value itself. With
        `step_settings.look` there is no loss, and what is looked at takes the place of the divergence.

        Args:
            signal: None leaves objective and teacher out: the cross-entropy of the labels, to check that the student's
                numbers are finite.
        """
        return in_root(self.student, self._losses, batch, signal, weight_N, step_settings)

    def _losses(
        self, batch: TokenBatch, signal: Signal | None, weight_N: Tensor, step_settings: StepSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden_ND = hidden_states(self.student, batch, packed=self.packed)
        head = head_of(self.student, self.vocab_size, verify=False)
        sums = Sums(self.stats, weight_N.device)
        if signal is None:
            alone = fused_distillation_loss(
                hidden_ND, head, None, CrossEntropy(), weight_N=weight_N, label_N=batch.labels_N, compile="off"
            )
            sums.add("loss", alone.value_N)
            return alone.loss, sums.of_S2, alone.value_N
        if step_settings.look == "difficulty":
            assert isinstance(signal, DenseSignal), "the recipe is checked for it"
            return hidden_ND.new_zeros(()), sums.of_S2, token_difficulty(hidden_ND, head, signal)
        by_student_N = batch.by_student_B[batch.sequence_N]
        token_options = self._options_of_rule(hidden_ND, head, batch, signal, step_settings, sums)
        if step_settings.look == "whitened":
            assert token_options.plain_N is not None, "asked of a rule that whitens"
            return hidden_ND.new_zeros(()), sums.of_S2, token_options.plain_N
        if token_options.weight_N is not None:
            weight_N = weight_N * token_options.weight_N.to(weight_N)
        loss, value_N = hidden_ND.new_zeros(()), weight_N.new_zeros(weight_N.shape)
        for objective, keep_N in self.loss_plan.terms(by_student_N):
            out = self._objective_loss(
                objective, keep_N, (hidden_ND, head, batch, signal, weight_N, step_settings), token_options
            )
            loss = loss + out.loss
            kept_N = slice(None) if keep_N is None else keep_N
            value_N[kept_N] = out.measures.get("forward_kl", out.value_N).to(value_N)
            kept = signal.rows(kept_N) if isinstance(signal, SharedSignal) else None
            self._count(out, objective, by_student_N[kept_N], sums, kept)
        return loss, sums.of_S2, value_N

    def _objective_loss(
        self,
        objective: AnyObjective,
        keep_N: Tensor | None,
        inputs: tuple[Tensor, Head, TokenBatch, Signal, Tensor, StepSettings],
        token_options: TokenOptions,
    ) -> FusedLoss:
        hidden_ND, head, batch, signal, weight_N, step_settings = inputs
        sequence_N, label_N = batch.sequence_N, batch.labels_N
        options = {name: torch.full_like(weight_N, value) for name, value in step_settings.options.items()} | dict(
            token_options.options
        )
        if keep_N is not None:
            assert isinstance(signal, DenseSignal | SharedSignal | TopKSignal), "a sample is of what is kept on disk"
            if isinstance(signal, SharedSignal | TopKSignal):
                signal = signal.rows(keep_N)
            else:
                signal = DenseSignal(hidden_ND=signal.hidden_ND[keep_N], head=signal.head)
            hidden_ND, weight_N, label_N = hidden_ND[keep_N], weight_N[keep_N], label_N[keep_N]
            sequence_N = sequence_N[keep_N]
            options = {name: option_N[keep_N] for name, option_N in options.items()}
        pairs = ()
        if self.projection_ED is not None and "hidden" in objective.reads:
            assert isinstance(signal, DenseSignal | SharedSignal), "the projection was made from one"
            projection_ED = gather_parameter(self.projection_ED)
            pairs = (HiddenPair(student_ND=hidden_ND, teacher_NE=signal.hidden_ND, projection_ED=projection_ED),)
        loss = fused_distillation_loss
        if isinstance(signal, SharedSignal):
            reads = self.loss_plan.measured(objective)
            loss = partial(aligned_distillation_loss, sorted_weight=self.loss_plan.sorted_weight if reads else 0.0)
        return loss(
            hidden_ND,
            head,
            signal,  # pyright: ignore[reportArgumentType]
            objective,
            temperature=step_settings.temperature,
            support=self.loss_plan.support if isinstance(signal, TopKSignal | SharedSignal) else None,
            weight_N=weight_N,
            label_N=label_N,
            sequence_N=sequence_N,
            hidden_pairs=pairs,
            token_options=self.loss_plan.options_for(objective, options),
            measure=self.loss_plan.measured(objective),
            measure_labels=self.loss_plan.labelled(objective),
            compile=self.compile_body,
        )

    def _options_of_rule(
        self, hidden_ND: Tensor, head: Head, batch: TokenBatch, signal: Signal, step_settings: StepSettings, sums: Sums
    ) -> TokenOptions:
        """Token options and weights that the rule gives for the responses of a batch."""
        if self.loss_plan.rule is None:
            return TokenOptions()
        log_q_N, log_p_N = label_logp(hidden_ND, head, signal, batch.labels_N)
        if "nll" in self.stats:
            sums.add("nll", -log_q_N, ~batch.by_student_B[batch.sequence_N])
        token_options = self.loss_plan.rule.apply(
            SequenceStats(
                log_q_N=log_q_N,
                log_p_N=log_p_N,
                drawn_logp_N=batch.drawn_logp_N,
                sequence_N=batch.sequence_N,
                by_student_B=batch.by_student_B,
                partners=batch.partners,
                reference=step_settings.reference,
                whitening=step_settings.whitening,
            )
        )
        for measure, value_B in token_options.measured_B.items():
            sums.add(f"{measure}/teacher", value_B, ~batch.by_student_B)
            sums.add(f"{measure}/student", value_B, batch.by_student_B)
        return token_options

    def _count(
        self, out: FusedLoss, objective: AnyObjective, by_student_N: Tensor, sums: Sums, shared: SharedSignal | None
    ) -> None:
        """Add the values of an objective; of a teacher with other tokens where the two are aligned."""
        labels = {} if shared is None else labels_alone(objective)
        aligned_N = None if shared is None else shared.aligned_N
        counted_N = None if shared is None or labels else shared.compared_N
        if shared is not None:
            sums.add("aligned", shared.aligned_N.float())
            if shared.group_N is not None:
                sums.add("merged", (shared.group_N >= 0).float())
        sums.add("loss", out.value_N, counted_N)
        if len(out.parts) > 1:
            for name, value_N in out.parts.items():
                sums.add(f"loss/{name}", value_N, None if name in labels else aligned_N)
        by_writer = {"teacher": ~by_student_N, "student": by_student_N}
        for name, value_N in out.measures.items():
            if name not in ("log_q", "log_p"):
                sums.add(name, value_N, aligned_N)
                continue
            for writer, keep_N in by_writer.items():
                sums.add(f"{name}/{writer}", value_N, keep_N)
        if self.loss_plan.student_objective is not None:
            for writer, keep_N in by_writer.items():
                sums.add(f"loss/{writer}", out.value_N, keep_N if counted_N is None else keep_N & counted_N)


def make_projection(
    student: nn.Module, teacher: SignalSource, batch: TokenBatch, *, vocab_size: int, seed: int
) -> Tensor | None:
    """A projection (teacher width, student width) for objectives on hidden states; None where the widths are one.

    It begins as a random matrix that keeps lengths on average, from the seed alone.

    Args:
        batch: any batch; the teacher's signal of it has the teacher's width.
    """
    signal = teacher.signal(batch)
    weight_VD = head_of(student, vocab_size, verify=False).weight_VD
    dense = isinstance(signal, DenseSignal | SharedSignal)
    if not dense or signal.hidden_ND.shape[1] == weight_VD.shape[1]:
        return None
    shape = (signal.hidden_ND.shape[1], weight_VD.shape[1])
    generator = torch.Generator().manual_seed(seed)
    projection_ED = torch.randn(shape, generator=generator) * shape[0] ** -0.5
    return projection_ED.to(weight_VD.device, weight_VD.dtype)
