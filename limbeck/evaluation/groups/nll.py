"""The group `nll`: negative log-likelihood of answers under the student, in its own tokens. No teacher is needed.

Whose answers (`evaluate.groups.nll.whose`): the held-out responses of the run, or the data's references; an evaluation
on its own has only the latter. Of a conversation the tokens count that `prompts.loss_on` names. Nats per token are of
the student's own tokens: models with different tokenizers are compared by the bits per byte in the detail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from pydantic.dataclasses import dataclass

from limbeck.evaluation.context import EvaluationContext
from limbeck.evaluation.group import GroupInPieces, GroupResult, Need
from limbeck.evaluation.pieces import Piece, longest_first
from limbeck.fields import STRICT
from limbeck.prompts.references import require_references
from limbeck.types import Response, ScoredRow


@dataclass(config=STRICT, kw_only=True)
class NllGroup(GroupInPieces):
    """Negative log-likelihood of the held-out answers under the student, in its own tokens."""

    whose: Literal["responses", "references"] = "responses"
    """Whose answers the student's likelihood is measured on: the held-out responses of the run, or the data's."""

    references_remedy = "set evaluate.groups.nll.whose=responses"

    @classmethod
    def on_responses(cls, condition: str, options: Mapping[str, object]) -> bool:
        del condition
        return options.get("whose", "responses") == "responses"

    def needs(self) -> frozenset[Need]:
        return frozenset({"prompts", "references"} if self.whose == "references" else ())

    def measure(self, evaluation: EvaluationContext) -> GroupResult:
        whose = "references" if evaluation.standalone else self.whose
        responses = _responses(evaluation, whose)
        tokenizer = evaluation.tokenizer("student")
        sums: dict[str, list[float]] = {}
        size = 0
        with evaluation.meter("likelihood", sum(r.tokens for r in responses), "tokens") as meter:
            batches = longest_first(responses, evaluation.scoring_batch_size)
            for rows, piece in zip(batches, evaluation.pieces(self, whose, len(batches)), strict=True):
                for row, nll in zip(rows, piece.tensors["nll"].tolist(), strict=True):
                    response = responses[row]
                    total = sums.setdefault(response.prompt_id, [0.0, 0.0])
                    total[0] += nll
                    total[1] += response.tokens
                    size += len(str(tokenizer.decode(list(response.label_ids), skip_special_tokens=True)).encode())
                    meter.advance(response.tokens)
        rows = [
            ScoredRow(id=name, weight=count, values={"nll": total / count}) for name, (total, count) in sums.items()
        ]
        nats = sum(total for total, _ in sums.values())
        detail = {
            "answers": whose,
            "tokens": int(sum(count for _, count in sums.values())),
            "bytes": size,
            "bits_per_byte": nats / math.log(2) / size if size else None,
        }
        return GroupResult(tables={"": rows}, detail=detail)

    def pieces(self, evaluation: EvaluationContext, of: str, numbers: Iterable[int]) -> Iterator[Piece]:
        import torch

        responses = _responses(evaluation, of)
        batches, measure = longest_first(responses, evaluation.scoring_batch_size), likelihood_of(evaluation)
        for number in numbers:
            found = measure(responses, batches[number])
            yield Piece(tensors={"nll": torch.tensor(found, dtype=torch.float64)})


def _responses(evaluation: EvaluationContext, whose: str) -> Sequence[Response]:
    if whose == "responses":
        return list(evaluation.heldout_responses().values())
    settings = evaluation.settings
    held = evaluation.prompts[: settings.prompts]
    require_references(held, "give data with answers, or leave nll out of evaluate.groups")
    fitting = {asked.id for asked in evaluation.encode("student", held, max_new_tokens=settings.max_new_tokens)}
    return evaluation.encode_references("student", [prompt for prompt in held if prompt.id in fitting])


def surprise(evaluation: EvaluationContext, responses: Sequence[Response]) -> Iterator[tuple[Response, float]]:
    """Each response with the sum of -log q over its tokens."""
    measure = likelihood_of(evaluation)
    for rows in longest_first(responses, evaluation.scoring_batch_size):
        yield from ((responses[row], nll) for row, nll in zip(rows, measure(responses, rows), strict=True))


def likelihood_of(evaluation: EvaluationContext) -> Callable[[Sequence[Response], Sequence[int]], list[float]]:
    """What gives the sum of -log q over the tokens of each of some responses, in one forward pass of the student."""
    import torch

    from limbeck.models.forward import hidden_states
    from limbeck.models.heads import head_of
    from limbeck.models.vocabulary import real_vocab_size
    from limbeck.objectives import model_logit_tiles
    from limbeck.rollouts.collate import collate

    student = evaluation.alone("student")
    model, head = student.model, head_of(student.model, real_vocab_size(student.tokenizer))

    def measure(responses: Sequence[Response], rows: Sequence[int]) -> list[float]:
        batch = collate(responses, rows, pad_id=0).to(evaluation.device)
        with torch.inference_mode():
            hidden_ND = hidden_states(model, batch)
            nll_N = torch.empty(len(batch.labels_N), dtype=torch.float64)
            for tokens, logits_NV in model_logit_tiles(hidden_ND, head):
                label_N = batch.labels_N[tokens]
                nll_N[tokens] = -logits_NV.double().log_softmax(-1).gather(1, label_N[:, None])[:, 0].cpu()
        return [float(part.sum()) for part in nll_N.split([responses[row].tokens for row in rows])]

    return measure
