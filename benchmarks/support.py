"""The error of a top-k signal against the number of tokens kept, with and without the student's own likeliest tokens.

    limbeck run gkd output_dir=runs/gkd            any run with a student
    python -m benchmarks.support --run runs/gkd    writes docs/results/support.md

On the teacher's held-out answers (off-policy) and on the student's own to the same prompts (on-policy), for each
objective at temperature 1: the gradient with respect to all of the student's logits from a sparse signal beside that
from the teacher's whole distribution. All tokens together: the length of the difference over the length of the
whole gradient, one minus the cosine between the two, and the relative error of the loss. "teacher's": so many of the
teacher's likeliest tokens. "half the student's": half of them the teacher's, half the student's likeliest, so that both
signals have the same size; a token on both lists makes room for the teacher's next one. All others are one class with
their exact mass (`topk_tail`); CSD is defined on the kept tokens alone (`topk_renorm`).
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.store import logarithmic
from limbeck.compare.charts import Curve, Point, lay_out, settings_scale
from limbeck.compare.svg import svg_figure
from limbeck.models.forward import hidden_states
from limbeck.models.heads import head_of, project
from limbeck.models.loading import load_model
from limbeck.models.vocabulary import real_vocab_size
from limbeck.objectives import build_objective
from limbeck.objectives.base import Objective, Rows
from limbeck.objectives.sparse import topk_signal
from limbeck.objectives.support import restrict, signal_columns
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import write_text
from limbeck.sampling.local import LocalSampler
from limbeck.types import Response, Sampling, Support, TokenPrompt

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "FKL": {"name": "fkl"},
    "RKL": {"name": "rkl"},
    "JS": {"name": "js"},
    "SKL": {"name": "skl"},
    "SRKL": {"name": "srkl"},
    "CSD(t,s)": {"name": "csd", "first": "teacher", "second": "student"},
}
SIZES = (16, 32, 64, 128, 256, 512, 1024)
TEACHERS, BOTH = "teacher's", "half the student's"
POLICIES = ("off-policy", "on-policy")
# Logits of so many tokens exist at a time.
BLOCK = 128


@dataclass
class Sums:
    """Sums over the tokens of one objective on one signal beside the whole distribution.

    Attributes:
        apart, whole, sparse, product: squared lengths of the difference and of the two gradients, and their product.
        kept, loss: of the values.
    """

    apart: float = 0.0
    whole: float = 0.0
    sparse: float = 0.0
    product: float = 0.0
    kept: float = 0.0
    loss: float = 0.0

    @property
    def gradient_error(self) -> float:
        return math.sqrt(max(self.apart, 0.0) / self.whole)

    @property
    def turned(self) -> float:
        """One minus the cosine."""
        return max(0.0, 1 - self.product / math.sqrt(self.whole * self.sparse))

    @property
    def loss_error(self) -> float:
        return abs(self.kept - self.loss) / abs(self.loss)


# By objective, policy, whose tokens and their number.
Key = tuple[str, str, str, int]


@dataclass
class Measured:
    """All sums, and what they are of."""

    sums: dict[Key, Sums] = field(default_factory=lambda: defaultdict(Sums))
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    masses: dict[tuple[str, str, int], float] = field(default_factory=lambda: defaultdict(float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "support.md")
    parser.add_argument("--responses", type=int, default=32, help="how many held-out ones, at most")
    parser.add_argument("--new-tokens", type=int, default=64, help="of an answer, at most")
    arguments = parser.parse_args()
    measured = measure(arguments.run, arguments.responses, arguments.new_tokens)
    picture = arguments.page.with_suffix(".svg")
    write_text(picture, draw(measured))
    write_text(arguments.page, page(measured, picture.name, arguments.run))
    print(arguments.page)


def measure(run: Path, responses: int, new_tokens: int) -> Measured:
    """Every objective on every signal of a run's held-out answers and of its student's."""
    recipe = load_recipe(run / "recipe.resolved.yaml")
    student, teacher = (load_model(str(name)) for name in (run / "student", recipe.teacher.model))
    vocab_size = real_vocab_size(student.tokenizer)
    every = read_responses(run / "responses" / f"{recipe.base_author}.jsonl")
    theirs = [r for r in every if r.split == "heldout" and r.response_ids][:responses]
    sampler = LocalSampler(
        model=student.model,
        eos_token_ids=tuple({r.response_ids[-1] for r in every if r.stop == "eos"}),
        pad_token_id=0,
        vocab_size=vocab_size,
        author="student",
    )
    prompts = [TokenPrompt(id=r.prompt_id, ids=r.prompt_ids) for r in theirs]
    own = sampler.respond(prompts, Sampling(max_new_tokens=new_tokens, temperature=1.0, seed=0))
    measured = Measured()
    for policy, texts in zip(POLICIES, (theirs, own), strict=True):
        for response in texts:
            student_NV, teacher_NV = (logits_of(one.model, response, vocab_size) for one in (student, teacher))
            add(measured, policy, student_NV, teacher_NV)
    return measured


@torch.no_grad()
def logits_of(model: torch.nn.Module, response: Response, vocab_size: int) -> Tensor:
    """A model's logits (N, V) for the tokens of a response."""
    hidden_ND = hidden_states(model, collate([response], [0], pad_id=0))
    return project(head_of(model, vocab_size, verify=False), hidden_ND).float()


@torch.no_grad()
def add(measured: Measured, policy: str, student_NV: Tensor, teacher_NV: Tensor) -> None:
    """Add the tokens of one text."""
    measured.tokens[policy] += len(student_NV)
    for start in range(0, len(student_NV), BLOCK):
        student, teacher = student_NV[start : start + BLOCK], teacher_NV[start : start + BLOCK]
        q_NV = student.softmax(-1)
        whole = {name: Whole.of(one, rows_of(student, teacher), q_NV) for name, one in objectives()}
        for who, kept, signal in signals(student, teacher):
            measured.masses[policy, who, kept] += float(q_NV.gather(-1, signal.ids_NK).sum())
            for support in ("topk_tail", "topk_renorm"):
                one_N1, size = torch.ones_like(student[:, :1]), student.shape[-1]
                columns = signal_columns(signal, support, one_N1, size)
                seen, _ = restrict(support, rows_of(student, teacher), columns)
                for name, one in objectives():
                    if support_of(one) == support:
                        compare(measured.sums[name, policy, who, kept], one, seen, signal.ids_NK, whole[name])


def rows_of(student_NV: Tensor, teacher_NV: Tensor) -> Rows:
    one_N1 = torch.ones_like(student_NV[:, :1])
    return Rows(
        student_logits_NK=student_NV, teacher_logits_NK=teacher_NV, student_tau_N1=one_N1, teacher_tau_N1=one_N1
    )


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Values, gradient and probabilities over the whole vocabulary, with the sums over it that are subtracted from."""

    value_N: Tensor
    grad_NV: Tensor
    q_NV: Tensor
    grad_grad_N: Tensor
    grad_q_N: Tensor
    q_q_N: Tensor

    @classmethod
    def of(cls, objective: Objective, rows: Rows, q_NV: Tensor) -> Whole:
        value_N, grad_NV = objective.value_and_grad(rows)
        exact_NV, wide_NV = grad_NV.double(), q_NV.double()
        return cls(
            value_N=value_N,
            grad_NV=grad_NV,
            q_NV=q_NV,
            grad_grad_N=exact_NV.square().sum(-1),
            grad_q_N=(exact_NV * wide_NV).sum(-1),
            q_q_N=wide_NV.square().sum(-1),
        )


def compare(sums: Sums, objective: Objective, seen: Rows, ids_NK: Tensor, whole: Whole) -> None:
    """Add one signal. Outside of the kept tokens its gradient is that of their class, shared out by q: c times q there,
    so that no row of the vocabulary's length is made for it."""
    value_N, grad_NK = objective.value_and_grad(seen)
    kept = ids_NK.shape[-1]
    own_NK, exact_NK, q_NK = (
        t.double() for t in (grad_NK[:, :kept], whole.grad_NV.gather(-1, ids_NK), whole.q_NV.gather(-1, ids_NK))
    )
    rest_N = (1 - q_NK.sum(-1)).clamp_min(1e-12)
    c_N = grad_NK[:, kept:].double().sum(-1) / rest_N
    # Sums over all other tokens.
    grad_grad_N = (whole.grad_grad_N - exact_NK.square().sum(-1)).clamp_min(0.0)
    grad_q_N = whole.grad_q_N - (exact_NK * q_NK).sum(-1)
    q_q_N = (whole.q_q_N - q_NK.square().sum(-1)).clamp_min(0.0)
    sums.apart += float((own_NK - exact_NK).square().sum() + (c_N**2 * q_q_N - 2 * c_N * grad_q_N + grad_grad_N).sum())
    sums.whole += float(whole.grad_grad_N.sum())
    sums.sparse += float(own_NK.square().sum() + (c_N**2 * q_q_N).sum())
    sums.product += float((own_NK * exact_NK).sum() + (c_N * grad_q_N).sum())
    sums.kept += float(value_N.double().sum())
    sums.loss += float(whole.value_N.double().sum())


def objectives() -> Iterator[tuple[str, Objective]]:
    for name, options in OBJECTIVES.items():
        objective = build_objective(**options)
        assert isinstance(objective, Objective)
        yield name, objective


def signals(student_NV: Tensor, teacher_NV: Tensor) -> Iterator[tuple[str, int, Any]]:
    """Whose tokens, how many, and the signal; of no more tokens than there are."""
    for kept in SIZES:
        if kept > teacher_NV.shape[-1]:
            return
        yield TEACHERS, kept, topk_signal(teacher_NV, kept)
        own_NS = student_NV.topk(kept // 2, dim=-1).indices
        yield BOTH, kept, topk_signal(teacher_NV, kept - kept // 2, chosen_NS=own_NS)


def support_of(objective: Objective) -> Support:
    return "topk_tail" if "topk_tail" in objective.supports else "topk_renorm"


def page(measured: Measured, picture: str, run: Path) -> str:
    tokens = " and ".join(f"{measured.tokens[policy]:,} tokens {policy}" for policy in POLICIES)
    said = (__doc__ or "").split("\n\n")[-1].strip()
    sizes = sorted({key[3] for key in measured.sums})
    parts = [
        f"# The tokens of a top-k signal\n\n`python -m benchmarks.support --run {run}`: {tokens}.\n\n{said}\n",
        f"![error of the gradient against the tokens kept]({picture})\n",
        "Relative error of the gradient:\n",
        *table(measured, sizes, lambda sums: f"{sums.gradient_error:.1%}"),
        "\nOne minus the cosine between the gradients:\n",
        *table(measured, sizes, lambda sums: f"{sums.turned:.1e}"),
        "\nRelative error of the loss:\n",
        *table(measured, sizes, lambda sums: f"{sums.loss_error:.2%}"),
        "\nThe student's mass on the kept tokens:\n",
        f"| | whose | {' | '.join(map(str, sizes))} |\n|---|---|{'---:|' * len(sizes)}",
    ]
    for policy in POLICIES:
        for who in (TEACHERS, BOTH):
            shares = (measured.masses[policy, who, size] / measured.tokens[policy] for size in sizes)
            parts.append(f"| {policy} | {who} | {' | '.join(f'{share:.2%}' for share in shares)} |")
    return "\n".join(parts) + "\n"


def table(measured: Measured, sizes: Sequence[int], cell: Any) -> list[str]:
    lines = [f"| objective | | whose | {' | '.join(map(str, sizes))} |", f"|---|---|---|{'---:|' * len(sizes)}"]
    for name in OBJECTIVES:
        for policy in POLICIES:
            for who in (TEACHERS, BOTH):
                cells = (cell(measured.sums[name, policy, who, size]) for size in sizes)
                lines.append(f"| {name} | {policy} | {who} | {' | '.join(cells)} |")
    return lines


def draw(measured: Measured) -> str:
    """One chart for each objective: error of the gradient over the tokens kept."""
    sizes = sorted({key[3] for key in measured.sums})
    errors = [sums.gradient_error for sums in measured.sums.values()]
    plates = []
    for name in OBJECTIVES:
        curves = [
            Curve(
                name=f"{policy}, {who.replace('the ', '')}",
                tone=tone,
                dotted=True,
                points=[
                    Point(x=size, y=measured.sums[name, policy, who, size].gradient_error, title=str(size))
                    for size in sizes
                ],
            )
            for tone, (policy, who) in enumerate((policy, who) for policy in POLICIES for who in (TEACHERS, BOTH))
        ]
        plates.append(
            lay_out(
                name=name,
                title=name,
                unit="",
                x_label="tokens kept of each position",
                curves=curves,
                x=settings_scale(sizes),
                y=logarithmic(errors, steps=(1,)),
                y_label="relative error of the gradient",
            )
        )
    said = (
        "what the gradient loses, by the number of tokens kept: the teacher's likeliest, or half of them the student's"
    )
    return svg_figure("The tokens of a top-k signal", said, plates, columns=3)


if __name__ == "__main__":
    main()
