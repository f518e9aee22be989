"""Values and gradients of torch, TRL and Liger where they define the same thing as we do."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from limbeck.objectives import build_objective, fused_distillation_loss, token_values
from limbeck.objectives.temperature import Temperature
from tests.objectives.cases import make_logits
from tests.objectives.pairs import Pair

STUDENT, TEACHER, LABEL = (t[:, :] if t.dim() == 2 else t for t in make_logits(n=12, v=301))


def both(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], rtol: float, atol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("name", ["fkl", "rkl", "ce"])
def test_torch(name, tau):
    s = STUDENT.clone().requires_grad_()
    log_q, log_p = (s / tau).log_softmax(-1), (TEACHER / tau).log_softmax(-1)
    if name == "ce":
        theirs = torch.nn.functional.cross_entropy(s, LABEL, reduction="sum")
    else:
        pair = (log_q, log_p) if name == "fkl" else (log_p, log_q)
        theirs = torch.nn.functional.kl_div(*pair, reduction="sum", log_target=True)
    temperature = Temperature(loss=tau, scale="none")
    ours = token_values(build_objective(name), s, TEACHER, temperature=temperature, label_N=LABEL).sum()
    assert_same(both(ours, [s]), both(theirs, [s]), 1e-9, 1e-12)


@pytest.fixture(scope="module")
def gkd():
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("tau", [1.0, 0.9, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_gkd(gkd, beta, tau):
    objective = {0.0: build_objective("fkl"), 1.0: build_objective("rkl")}.get(beta) or build_objective("js", beta=beta)
    label = LABEL.clone()
    label[::3] = -100
    s = STUDENT.clone().requires_grad_()
    theirs = gkd(s[None], TEACHER[None], labels=label[None], beta=beta, temperature=tau)
    kept = label != -100
    temperature = Temperature(loss=tau, scale="none")
    ours = token_values(objective, s[kept], TEACHER[kept], temperature=temperature).mean()
    assert_same(both(ours, [s]), both(theirs, [s]), 1e-7, 1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_trl_tiled_kernel(beta, softcap):
    pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    pair = Pair(dtype=torch.float32, n=70, v=151, bias=True, scale=0.8, softcap=softcap)
    teacher = pair.signal.head
    objective = {0.0: build_objective("fkl"), 1.0: build_objective("rkl")}.get(beta) or build_objective("js", beta=beta)
    assert pair.bias is not None
    value_N, _ = ChunkedDivergenceFunction.apply(
        pair.hidden, pair.weight[:151], pair.bias[:151], pair.signal.hidden_ND, teacher.weight_VD[:151], None,
        beta, 1.5, 0.8, softcap,
    )  # fmt: skip
    theirs = (value_N * pair.weight_N).sum()
    ours = pair.fused(objective, Temperature(loss=1.5, scale="none"))
    torch.testing.assert_close(ours.value_N, value_N.detach(), rtol=1e-4, atol=1e-5)
    assert_same(both(ours.loss, pair.parameters), both(theirs, pair.parameters), 1e-3, 1e-5)


@pytest.mark.parametrize("beta", [0.2, 0.5])
@pytest.mark.filterwarnings("ignore")
def test_liger_chunked_js(beta):
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    pair = Pair(dtype=torch.float32, n=64, v=151)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=2.0, compiled=False, chunk_size=32
    )
    label = pair.label_N.clamp_min(0)
    teacher = pair.signal.head.weight_VD[:151]
    theirs = loss(pair.hidden, pair.weight[:151], pair.signal.hidden_ND, teacher, label)
    ours = fused_distillation_loss(
        pair.hidden,
        pair.head,
        pair.signal,
        build_objective("js", beta=beta),
        temperature=Temperature(loss=2.0, scale="none"),
    )
    assert_same(both(ours.loss, pair.parameters), both(theirs, pair.parameters), 1e-4, 1e-6)
