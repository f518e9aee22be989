"""Hidden states of two random models at a few tokens, and the definitions of fidelity in float64, spelled out."""

import torch

from limbeck.evaluation.token_metrics.tokens import FidelityChunk
from limbeck.types import DenseSignal, Head

TOP_K = 5


def head(V, D, *, pad=0, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return Head(weight_VD=torch.randn(V + pad, D).to(dtype), vocab_size=V, **options)


def chunk(lengths=(3, 0, 5), V=29, student_D=7, teacher_D=11, student_pad=0, teacher_pad=0, **options):
    N = sum(lengths)
    torch.manual_seed(7)
    return FidelityChunk(
        student_hidden_ND=torch.randn(N, student_D),
        student_head=head(V, student_D, pad=student_pad, seed=1, **options),
        teacher=DenseSignal(hidden_ND=torch.randn(N, teacher_D), head=head(V, teacher_D, pad=teacher_pad, seed=2)),
        label_ids_N=torch.randint(0, V, (N,)),
        ids=tuple(f"p{i}" for i in range(len(lengths))),
        lengths=tuple(lengths),
    )


def logits(hidden, head):
    out = hidden.double() @ head.weight_VD[: head.vocab_size].double().T
    if head.bias_V is not None:
        out = out + head.bias_V[: head.vocab_size].double()
    out = out * head.scale
    return out if head.softcap is None else head.softcap * torch.tanh(out / head.softcap)


def direct(chunk):
    """The definitions, spelled out."""
    s, t = logits(chunk.student_hidden_ND, chunk.student_head), logits(chunk.teacher.hidden_ND, chunk.teacher.head)
    q, p = s.softmax(-1), t.softmax(-1)
    picked = torch.arange(len(q)), chunk.label_ids_N
    tv = (p - q).abs().sum(-1) / 2
    half = (p + q) / 2
    top_s, top_t = (side.sort(dim=-1, descending=True, stable=True).indices[:, :TOP_K] for side in (s, t))
    entropy_s, entropy_t = -(q * q.log()).sum(-1), -(p * p.log()).sum(-1)
    return {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jensen_shannon": ((p * (p / half).log()).sum(-1) + (q * (q / half).log()).sum(-1)) / 2,
        "total_variation": tv,
        "acceptance": torch.minimum(p, q).sum(-1),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double(),
        "topk_agreement": (top_t[:, :, None] == top_s[:, None]).any(2).double().mean(1),
        "student_entropy": entropy_s,
        "teacher_entropy": entropy_t,
        "entropy_gap": entropy_s - entropy_t,
        "entropy_gap_size": (entropy_s - entropy_t).abs(),
        "student_nll": -q[picked].log(),
        "teacher_nll": -p[picked].log(),
    }
