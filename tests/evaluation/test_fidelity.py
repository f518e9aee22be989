"""Fidelity from hidden states against plain float64 softmaxes over the whole vocabulary."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.evaluation.fidelity import FIDELITY, FidelityChunk, measure, token_values
from limbeck.evaluation.metrics import METRICS
from limbeck.flow import DenseSignal, Head, LimbeckError


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
    return {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "total_variation": tv,
        "acceptance": torch.minimum(p, q).sum(-1),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double(),
        "student_entropy": -(q * q.log()).sum(-1),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "student_nll": -q[picked].log(),
        "teacher_nll": -p[picked].log(),
    }


VARIANTS = [
    {},
    {"V": 1, "lengths": (2,)},
    {"V": 301, "lengths": (4, 4, 1)},
    {"student_pad": 3, "teacher_pad": 16},
    {"scale": 0.25},
    {"softcap": 5.0},
    {"bias_V": torch.linspace(-1, 1, 29), "scale": 2.0, "softcap": 8.0},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equal_to_the_definitions(options):
    made = chunk(**options)
    expected = direct(made)
    values = token_values(made)
    assert values.dtype == torch.float64
    for name, value in zip(FIDELITY, values, strict=True):
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_rows_are_means_over_the_tokens_of_each_example():
    made = chunk()
    rows = measure([made])
    assert [(row.id, row.weight) for row in rows] == [("p0", 3.0), ("p2", 5.0)]
    expected = direct(made)
    for row, part in zip(rows, (slice(0, 3), slice(3, 8)), strict=True):
        assert set(row.values) == set(FIDELITY) <= set(METRICS)
        for name in FIDELITY:
            assert row.values[name] == pytest.approx(float(expected[name][part].mean()), rel=2e-5, abs=2e-6), name


def test_an_example_may_go_on_in_the_next_chunk():
    whole = chunk(lengths=(8,))
    first, second = (
        replace(
            whole,
            student_hidden_ND=whole.student_hidden_ND[cut],
            teacher=replace(whole.teacher, hidden_ND=whole.teacher.hidden_ND[cut]),
            label_ids_N=whole.label_ids_N[cut],
            lengths=(length,),
        )
        for cut, length in ((slice(0, 3), 3), (slice(3, 8), 5))
    )
    (joined,), (expected,) = measure([first, second]), measure([whole])
    assert joined.weight == expected.weight == 8.0
    assert joined.values == pytest.approx(expected.values, rel=1e-5, abs=1e-6)


def test_the_teacher_against_itself_is_exactly_perfect():
    made = chunk(teacher_D=7)
    twin = replace(made, student_hidden_ND=made.teacher.hidden_ND, student_head=made.teacher.head)
    for row in measure([twin]):
        for name in FIDELITY:
            metric = METRICS[name]
            if metric.teacher_value is not None:
                assert row.values[name] == metric.teacher_value, name
            if metric.teacher is not None:
                assert row.values[name] == row.values[metric.teacher], name


def test_by_hand():
    """p = (3/4, 1/4), q = (1/4, 3/4)."""
    high = math.log(3.0)
    one = torch.ones(1, 1)
    made = FidelityChunk(
        student_hidden_ND=one,
        student_head=Head(weight_VD=torch.tensor([[0.0], [high]]), vocab_size=2),
        teacher=DenseSignal(hidden_ND=one, head=Head(weight_VD=torch.tensor([[high], [0.0]]), vocab_size=2)),
        label_ids_N=torch.tensor([0]),
        ids=("a",),
        lengths=(1,),
    )
    entropy = 2 * math.log(2.0) - 0.75 * high
    assert measure([made])[0].values == pytest.approx(
        {
            "forward_kl": 0.5 * high,
            "reverse_kl": 0.5 * high,
            "total_variation": 0.5,
            "acceptance": 0.5,
            "top1_agreement": 0.0,
            "student_entropy": entropy,
            "teacher_entropy": entropy,
            "student_nll": math.log(4.0),
            "teacher_nll": math.log(4.0 / 3.0),
        },
        rel=1e-6,
    )


def test_half_precision_weights_are_measured_in_float32():
    made = chunk(dtype=torch.bfloat16)
    made = replace(made, student_hidden_ND=made.student_hidden_ND.bfloat16())
    expected = direct(made)
    for name, value in zip(FIDELITY, token_values(made), strict=True):
        if name != "top1_agreement":
            torch.testing.assert_close(value, expected[name], rtol=5e-2, atol=5e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_sharp_distributions_stay_finite():
    made = chunk()
    made = replace(made, student_hidden_ND=made.student_hidden_ND * 1e3)
    assert torch.isfinite(token_values(made)).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_models_that_are_not_finite_are_named(broken):
    made = chunk()
    made.student_hidden_ND[4, 2] = broken
    with pytest.raises(LimbeckError, match=r"example 'p2'.*NaN or inf"):
        measure([made])


def test_other_vocabularies_and_shapes_are_refused():
    made = chunk()
    with pytest.raises(LimbeckError, match="28 token ids, the teacher 29"):
        measure([replace(made, student_head=replace(made.student_head, vocab_size=28))])
    with pytest.raises(LimbeckError, match="loss_mask_BT"):
        measure([replace(made, lengths=(3, 0, 4))])


class Largest(TorchDispatchMode):
    """The most elements any tensor had that came out of an operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_of_all_tokens_never_exist():
    N, V = 2048, 50_000
    made = chunk(lengths=(N,), V=V, student_D=4, teacher_D=4)
    with Largest() as largest:
        measure([made])
    assert largest.elements <= N * V / 4
