"""Single steps of the real loop, and what is needed to say the same by plain autograd, one response at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.rollouts.sources import SourceContext, StatelessSource, StepCounter
from limbeck.training.loss import LossPlan
from limbeck.training.weighting import TokenWeighting
from limbeck.types import Author, Response
from tests.training.play import VOCAB, metrics, play, settings, tiny_model, tiny_teacher

Gradients = Mapping[str, Tensor]


class Scripted(StatelessSource):
    """The given steps, over and over: an epoch is all of them."""

    def __init__(self, *steps: Sequence[Response]):
        self.steps = steps
        self.prompts = frozenset(r.prompt_id for step in steps for r in step)

    def __call__(self, source_context: SourceContext) -> Scripted:
        return self

    @property
    def steps_per_epoch(self) -> int:
        return len(self.steps)

    def step(self, clock: StepCounter) -> dict[int, Response]:
        return dict(enumerate(self.steps[clock.step % len(self.steps)]))

    def preview(self, count: int, total: int) -> list[dict[int, Response]]:
        return [self.step(StepCounter(step=step, total=total)) for step in range(min(count, len(self.steps)))]


def written(author: Author, count: int, *, seed: int, longest: int = 9) -> list[Response]:
    """Responses of very different lengths to the prompts "0", "1", ..., which do not depend on the author."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(low, high)))

    prompts = [tuple(random.Random(i).randrange(3, VOCAB) for _ in range(1 + i % 5)) for i in range(count)]
    return [
        Response(prompt_id=str(i), author=author, prompt_ids=p, response_ids=ids(1, longest), stop="length")
        for i, p in enumerate(prompts)
    ]


def pairs(count: int, *, seed: int = 0) -> list[Response]:
    """Teacher's and student's response to each prompt, side by side."""
    theirs, own = written("teacher", count, seed=seed), written("student", count, seed=seed + 1)
    return [response for pair in zip(theirs, own, strict=True) for response in pair]


def recorded(student: nn.Module) -> list[dict[str, Tensor]]:
    """The gradients as they stand after each backward, while the loop runs."""
    passes: list[dict[str, Tensor]] = []

    def hook(name: str) -> Callable[[Tensor], None]:
        def keep(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if not passes or name in passes[-1]:
                passes.append({})
            passes[-1][name] = parameter.grad.clone()

        return keep

    for name, parameter in student.named_parameters():
        parameter.register_post_accumulate_grad_hook(hook(name))
    return passes


def one_step(
    folder: Path,
    responses: Sequence[Response],
    loss_plan: LossPlan,
    *,
    weighting: TokenWeighting | None = None,
    temperature: float = 1.0,
    cut: int = 8,
) -> tuple[dict[str, Any], Gradients]:
    """What is logged of a step of the loop, cut into micro-batches of `cut` rows, and its gradients."""
    folder.mkdir(exist_ok=True)
    student = tiny_model(1)
    passes = recorded(student)
    micros = -(-len(responses) // cut)
    chosen = settings(
        max_steps=1, per_device_train_batch_size=cut, gradient_accumulation_steps=micros, max_grad_norm=0.0
    )
    play(
        student,
        folder,
        chosen,
        author=Scripted(responses),
        loss_plan=loss_plan,
        weighting=weighting,
        temperature=temperature,
    )
    (line,) = metrics(folder)
    return line, passes[micros - 1]


class Both:
    """Log-probabilities of student and teacher after each token of one response, (T, V), the student's with gradient.

    Each response is a forward of its own, without padding.
    """

    def __init__(self, student: nn.Module, response: Response):
        ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
        asked = slice(len(response.prompt_ids) - 1, -1)
        self.response = response
        self.log_q_TV = student(input_ids=ids).logits[0, asked, :VOCAB].log_softmax(-1)
        with torch.no_grad():
            self.log_p_TV = tiny_teacher().model(input_ids=ids).logits[0, asked, :VOCAB].log_softmax(-1)
        self.label_T1 = torch.tensor(response.response_ids)[:, None]

    @property
    def log_q_T(self) -> Tensor:
        return self.log_q_TV.gather(-1, self.label_T1)[:, 0]

    @property
    def log_p_T(self) -> Tensor:
        return self.log_p_TV.gather(-1, self.label_T1)[:, 0]

    @property
    def gap(self) -> float:
        """P - Q of the teacher's response, Q - P of the student's; each the geometric mean of its tokens."""
        gap = (self.log_p_T.mean().exp() - self.log_q_T.mean().exp()).item()
        return -gap if self.response.author == "student" else gap

    def skl_T(self, alpha: float) -> Tensor:
        """KL(p || a p + (1 - a) q)."""
        mixed_TV = alpha * self.log_p_TV.exp() + (1 - alpha) * self.log_q_TV.exp()
        return (self.log_p_TV.exp() * (self.log_p_TV - mixed_TV.log())).sum(-1)

    def srkl_T(self, alpha: float, *, detach: bool = False) -> Tensor:
        """KL(q || (1 - a) p + a q)."""
        inner_TV = self.log_q_TV.detach() if detach else self.log_q_TV
        mixed_TV = (1 - alpha) * self.log_p_TV.exp() + alpha * inner_TV.exp()
        return (self.log_q_TV.exp() * (self.log_q_TV - mixed_TV.log())).sum(-1)

    def rkl_T(self) -> Tensor:
        """KL(q || p)."""
        return (self.log_q_TV.exp() * (self.log_q_TV - self.log_p_TV)).sum(-1)


def read(responses: Sequence[Response]) -> tuple[nn.Module, list[Both]]:
    """The student as it is before training, and what both models say of some responses."""
    student = tiny_model(1)
    return student, [Both(student, response) for response in responses]


def gradients(student: nn.Module, loss: Tensor) -> Gradients:
    """By plain autograd."""
    names, parameters = zip(*student.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def norm(grads: Gradients) -> float:
    """The norm over all parameters."""
    return float(torch.stack([grad.norm() for grad in grads.values()]).norm())


def gap(one: Gradients, other: Gradients) -> float:
    """How far two gradients are apart, as a share of their size."""
    assert one.keys() == other.keys()
    return norm({name: one[name] - other[name] for name in one}) / norm(other)


def stale(response: Response, seed: int, *, mixture: bool = False) -> Response:
    """The same response with log-probabilities that it was drawn with, which are none of the current student."""
    draw = random.Random(seed)
    logp = tuple(-4.0 - 2 * draw.random() for _ in response.response_ids)
    return (
        replace(response, sampled_logp=logp, logp=tuple(-1.0 for _ in logp))
        if mixture
        else replace(response, logp=logp)
    )
