"""Random student and teacher pairs as hidden states and heads, with the naive lines beside the fused call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.objectives import FusedLoss, Temperature, fused_distillation_loss, token_values
from limbeck.objectives.sums import AnyObjective
from limbeck.types import DenseSignal, Head


class Pair:
    """Hidden states and heads of a student and a wider teacher; both heads have padding rows, not as many."""

    def __init__(self, dtype=torch.float64, n=45, v=37, d=16, bias=False, scale=1.0, softcap=None, seed=0) -> None:
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.n, self.v, self.scale, self.softcap = n, v, scale, softcap
        self.hidden = draw(n, d).requires_grad_()
        self.weight = (draw(v + 2, d) / 2).requires_grad_()
        self.bias = draw(v + 2).requires_grad_() if bias else None
        teacher_weight, teacher_hidden = draw(v + 5, d + 3) / 2, draw(n, d + 3)
        self.signal = DenseSignal(hidden_ND=teacher_hidden, head=Head(weight_VD=teacher_weight, vocab_size=v))
        self.weight_N = torch.rand(n, generator=g, dtype=torch.float64).to(dtype)
        self.label_N = torch.randint(v, (n,), generator=g)
        self.label_N[::7] = -100

    @property
    def head(self) -> Head:
        return Head(weight_VD=self.weight, bias_V=self.bias, scale=self.scale, softcap=self.softcap, vocab_size=self.v)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.hidden, self.weight, self.bias) if p is not None]

    def student_logits(self) -> Tensor:
        logits_NV = self.hidden @ self.weight[: self.v].T
        if self.bias is not None:
            logits_NV = logits_NV + self.bias[: self.v]
        logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def teacher_logits(self) -> Tensor:
        return self.signal.hidden_ND @ self.signal.head.weight_VD[: self.v].T

    def naive(self, objective: AnyObjective, temperature: Temperature | float = 1.0, **options: Any) -> Tensor:
        """Value of each token by the lines the fused loss replaces."""
        return token_values(
            objective,
            self.student_logits(),
            self.teacher_logits(),
            temperature=temperature,
            label_N=self.label_N,
            **options,
        )

    def fused(self, objective: AnyObjective, temperature: Temperature | float = 1.0, **options: Any) -> FusedLoss:
        given = {"signal": self.signal, "weight_N": self.weight_N, "label_N": self.label_N, "compile": "off"} | options
        temperature = temperature if isinstance(temperature, Temperature) else Temperature(loss=temperature)
        return fused_distillation_loss(
            self.hidden, self.head, given.pop("signal"), objective, temperature=temperature, **given
        )

    def check(self, fused: FusedLoss, value_N: Tensor, rtol: float = 1e-9, atol: float = 1e-11) -> None:
        """Value, loss and every gradient against naive values of each token."""
        loss = (value_N * self.weight_N).sum()
        expected = torch.autograd.grad(3 * loss, self.parameters)
        got = torch.autograd.grad(3 * fused.loss, self.parameters)
        torch.testing.assert_close(fused.value_N, value_N.detach(), rtol=rtol, atol=atol)
        torch.testing.assert_close(fused.loss.detach(), loss.detach(), rtol=rtol, atol=atol)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=rtol, atol=atol)
