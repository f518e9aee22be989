"""The group `recovery`: how much of what quantisation lost did training bring back?

The student before training is its teacher with every weight rounded to its grid (plain names). Beside it stand
what llama.cpp's own quantiser makes of the same weights in the same formats, without and with an importance matrix from
the training responses (conditions `llama_cpp` and `imatrix`). All are measured against the teacher on the held-out
responses. What the other groups of the recipe measure of a student before training they measure of these stand-ins too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext
from limbeck.evaluation.group import EvaluationGroup, GroupResult, Need
from limbeck.evaluation.scores.files import read_rows
from limbeck.evaluation.scores.metrics import Metric, StandIn
from limbeck.fields import STRICT, Count
from limbeck.types import Json, ScoredRow

if TYPE_CHECKING:
    from torch import nn

    from limbeck.models.quantization.files import QuantizedWeights


@dataclass(config=STRICT, kw_only=True)
class RecoveryGroup(EvaluationGroup):
    """How much of the divergence that quantisation caused training brought back, and the size of the file."""

    baselines: tuple[StandIn, ...] = ()
    """Quantised without training by llama.cpp (package xllamacpp), and measured by the other groups too: llama_cpp
    alike in all columns, imatrix weighed by an importance matrix."""
    calibration: Count = 64
    """Training responses of the importance matrix."""

    parts = ("after",)
    metrics: ClassVar[Mapping[str, Metric]] = {
        "recovered": Metric(
            label="Share recovered",
            unit="",
            better="higher",
            meaning="of the forward KL that quantisation caused, the share that training brought back; 1 is all of it",
            teacher_value=1.0,
        ),
        "shipped_size": Metric(
            label="Size as shipped",
            unit="MB",
            better="lower",
            meaning="blocks of the quantised weights, and float32 for what is not quantised",
            teacher="teacher_shipped_size",
        ),
        "teacher_shipped_size": Metric(
            label="Teacher: size as shipped", unit="MB", better="context", meaning="the same of the teacher in float32"
        ),
    }

    @classmethod
    def on_responses(cls, condition: str, options: Mapping[str, object]) -> bool:
        del options
        return not condition

    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "tokens"})

    def stand_ins(self) -> tuple[StandIn, ...]:
        return self.baselines

    def inputs(self, evaluation: EvaluationContext) -> Json:
        # A run that was evaluated when nothing but their divergence was measured is evaluated again.
        return {"baselines_by": "all groups"} if self.baselines else {}

    def check(self, evaluation: EvaluationContext) -> None:
        if self.baselines:
            from limbeck.evaluation.quantised import quantiser

            quantiser()

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        if evaluation.part in self.baselines:
            rows = fidelity_rows(evaluation, evaluation.student.model)
            return GroupResult(
                tables={"": closed_share(evaluation, rows, _healed_rows(evaluation.folder), "recovered")}
            )
        quantized = evaluation.quantized_weights()
        assert quantized is not None, "a recipe without student.quantize is refused"
        sizes = _sizes(evaluation.student.model, quantized)
        healed = fidelity_rows(evaluation, evaluation.student.model)
        # One model in memory at a time: the student before training is built of the teacher's weights anew.
        evaluation.release_student()
        evaluation.release_teacher()
        before = evaluation.before()
        rounded = fidelity_rows(before, before.student.model)
        before.release_student()
        tables: dict[str, Sequence[ScoredRow]] = {"": closed_share(evaluation, rounded, healed, "recovered")}
        tables["file"] = [ScoredRow(id="model", weight=1.0, values=sizes)]
        return GroupResult(tables=tables, detail={"formats": dict(Counter(quantized.formats.values())), **sizes})

    def make_stand_in(self, evaluation: EvaluationContext, model: nn.Module) -> None:
        """Quantise the weights with llama.cpp."""
        from limbeck.evaluation.quantised import round_by_llama_cpp
        from limbeck.models.quantization.importance import importance_of
        from limbeck.rollouts.collate import collate

        quantized, importance = evaluation.quantized_weights(), None
        assert quantized is not None, "a recipe without student.quantize is refused"
        if evaluation.part == "imatrix":
            responses = evaluation.training_responses()[: self.calibration]
            batches = (collate({0: response}, (0,), pad_id=0) for response in responses)
            importance = importance_of(model, batches, device=evaluation.device)
        round_by_llama_cpp(model, quantized.formats, importance)


def fidelity_rows(evaluation: EvaluationContext, model: nn.Module) -> list[ScoredRow]:
    """Fidelity of a model on the held-out responses, a row per prompt."""
    from limbeck.evaluation.fidelity import chunks_of, measure
    from limbeck.models.heads import head_of
    from limbeck.models.vocabulary import real_vocab_size

    responses = evaluation.heldout_responses()
    chunks = chunks_of(
        model,
        head_of(model, real_vocab_size(evaluation.tokenizer("teacher"))),
        dict(enumerate(responses.values())),
        evaluation.scoring_teacher(stored=True),
        batch_size=evaluation.scoring_batch_size,
        device=evaluation.device,
    )
    return measure(chunks, top_k=2).rows


def _healed_rows(folder: Path) -> list[ScoredRow]:
    """The forward KL of the trained student, which was measured before any stand-in, a row per prompt."""
    rows = []
    for row in read_rows(folder / "after.recovery.jsonl"):
        closed, gap = row.sums["recovered"]
        rows.append(replace(row, values={"forward_kl": (gap - closed) / row.weight}, sums={}))
    return rows


def closed_share(
    evaluation: EvaluationContext, before: Sequence[ScoredRow], after: Sequence[ScoredRow], metric: str
) -> list[ScoredRow]:
    """What was closed of each prompt's forward KL, and that KL, over its tokens: their ratio is the share.

    Where there was none to close there is no share, which is said.

    Args:
        metric: name of the share.
    """
    rows = []
    for there, left in zip(before, after, strict=True):
        assert there.id == left.id, "both read the same responses"
        gap, rest = (row.weight * row.values["forward_kl"] for row in (there, left))
        rows.append(ScoredRow(id=there.id, weight=there.weight, values={}, sums={metric: (gap - rest, gap)}))
    if not any(row.sums[metric][1] for row in rows):
        evaluation.console.warn(
            f"the student was no way from the teacher before training, so that {metric} is left out: of nothing no "
            "share can come back"
        )
    return rows


def _sizes(model: nn.Module, quantized: QuantizedWeights) -> dict[str, float]:
    """Millions of bytes of the student's file, and of the teacher's, which has as many parameters, in float32."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shipped = quantized.bytes + 4 * (parameters - quantized.weights)
    return {"shipped_size": shipped / 1e6, "teacher_shipped_size": 4 * parameters / 1e6}
