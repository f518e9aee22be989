"""How far apart the gradients of forward and reverse KL are for a pair: whether a bench could tell them apart at all.

    python -m benchmarks.gradient_angle --run runs/lab-kd                  the student as it was trained
    python -m benchmarks.gradient_angle --run runs/lab-kd --student runs/lab-student/student      as it began

On the held-out responses of a run, at each temperature of the loss: the cosine between the two gradients with respect
to all logits, the ratio of their sizes, and the share of forward KL's gradient (by absolute value) that lies off the
teacher's ten likeliest tokens. Beside them the pair's forward KL and the teacher's entropy at temperature 1. A cosine
near 1 says that the two objectives are nearly the same training on such a pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from limbeck.models.loading import load_model
from limbeck.objectives import build_objective, token_values
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.types import Response

DOMINANT = 10


@torch.inference_mode()
def logits_of(models: Sequence[torch.nn.Module], response: Response) -> Iterator[Tensor]:
    """Each model's logits (N, V) for the tokens of a response, over the ids that both have."""
    ids_1T = torch.tensor([response.prompt_ids + response.response_ids])
    found = [model(input_ids=ids_1T).logits[0, len(response.prompt_ids) - 1 : -1].float() for model in models]
    shared = min(logits.shape[1] for logits in found)
    yield from (logits[:, :shared].clone() for logits in found)


def gradient(name: str, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Of the sum over the tokens, with respect to the student's logits."""
    with torch.enable_grad():
        leaf_NV = student_NV.clone().requires_grad_()
        token_values(build_objective(name), leaf_NV, teacher_NV, temperature=temperature).sum().backward()
    assert leaf_NV.grad is not None
    return leaf_NV.grad


def measure(pairs: Sequence[tuple[Tensor, Tensor]], temperature: float) -> tuple[float, float, float]:
    """Cosine of the two gradients over all tokens, |forward| over |reverse|, and forward KL's share off the top ten."""
    product = forward = reverse = outside = whole = 0.0
    for student_NV, teacher_NV in pairs:
        f_NV = gradient("fkl", student_NV, teacher_NV, temperature)
        r_NV = gradient("rkl", student_NV, teacher_NV, temperature)
        product += float((f_NV * r_NV).sum())
        forward += float(f_NV.square().sum())
        reverse += float(r_NV.square().sum())
        top_NK = teacher_NV.topk(DOMINANT, dim=-1).indices
        whole += float(f_NV.abs().sum())
        outside += float(f_NV.abs().scatter(1, top_NK, 0.0).sum())
    return product / (forward * reverse) ** 0.5, (forward / reverse) ** 0.5, outside / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--student", help="a model; the run's own student if not given")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--responses", type=int, default=40, help="how many of the held-out ones, at most")
    options = parser.parse_args()
    recipe = load_recipe(options.run / "recipe.resolved.yaml")
    models = [
        load_model(name).model.eval() for name in (options.student or options.run / "student", recipe.teacher.model)
    ]
    path = options.run / "responses" / f"{recipe.base_author}.jsonl"
    heldout = [r for r in read_responses(path) if r.split == "heldout"][: options.responses]
    pairs = [tuple(logits_of(models, response)) for response in heldout]
    log_q = torch.cat([student.log_softmax(-1) for student, _ in pairs])
    log_p = torch.cat([teacher.log_softmax(-1) for _, teacher in pairs])
    entropy, kl = -(log_p.exp() * log_p).sum(-1).mean(), (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    print(f"{len(heldout)} responses, {len(log_p):,} tokens: forward KL {kl:.3f}, teacher's entropy {entropy:.2f} nats")
    print("| temperature | cosine | forward over reverse | off the teacher's top 10 |\n|---:|---:|---:|---:|")
    for temperature in options.temperatures:
        cosine, ratio, outside = measure(pairs, temperature)  # type: ignore[arg-type]
        print(f"| {temperature:g} | {cosine:.2f} | {ratio:.2f} | {outside:.0%} |")


if __name__ == "__main__":
    main()
