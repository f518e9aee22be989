"""Fidelity from hidden states against plain float64 softmaxes over the whole vocabulary."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.evaluation.fidelity import BY_POSITION, measure
from limbeck.evaluation.scores.files import summarise
from limbeck.evaluation.scores.metrics import METRICS
from limbeck.evaluation.token_metrics.tokens import FidelityChunk, fidelity_values
from limbeck.evaluation.token_metrics.values import CALIBRATION, FIDELITY
from limbeck.objectives.fused.body import compiler_available
from limbeck.types import DenseSignal, Head, LimbeckError
from tests.evaluation.fidelity_cases import TOP_K, chunk, direct, logits

VARIANTS = [
    {},
    {"V": 1, "lengths": (2,)},
    {"V": 301, "lengths": (4, 4, 1)},
    {"student_pad": 3, "teacher_pad": 16},
    {"scale": 0.25},
    {"softcap": 5.0},
    {"bias_V": torch.linspace(-1, 1, 29), "scale": 2.0, "softcap": 8.0},
]


def values_of(chunk, **options):
    k = min(TOP_K, chunk.student_head.vocab_size)
    found = fidelity_values(chunk, top_k=k, **options).values_MN
    assert found.dtype == torch.float64
    return dict(zip(FIDELITY, found, strict=True))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equal_to_the_definitions(options):
    made = chunk(**options)
    expected = direct(made)
    for name, value in values_of(made).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(not compiler_available("cpu"), reason="no C++ compiler or no Python headers")
def test_compiled_equals_the_definitions():
    """150 tokens are not whole blocks, 4,133 ids not whole groups."""
    made = chunk(lengths=(100, 50), V=4133)
    made = replace(made, student_hidden_ND=made.student_hidden_ND / 2)
    expected = direct(made)
    for name, value in values_of(made, compile="on").items():
        torch.testing.assert_close(value, expected[name], rtol=3e-5, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    twin = replace(made, student_hidden_ND=made.teacher.hidden_ND, student_head=made.teacher.head)
    assert_perfect(measure([twin], top_k=TOP_K, compile="on").rows)


def test_rows_are_means_over_the_tokens_of_each_example():
    made = chunk()
    rows = measure([made], top_k=TOP_K).rows
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
    (joined,), (expected,) = measure([first, second], top_k=2).rows, measure([whole], top_k=2).rows
    assert joined.weight == expected.weight == 8.0
    assert joined.values == pytest.approx(expected.values, rel=1e-5, abs=1e-6)
    for name in CALIBRATION:
        assert joined.sums[name] == pytest.approx(expected.sums[name], rel=1e-5, abs=1e-6)


def test_the_teacher_against_itself_is_exactly_perfect():
    made = chunk(teacher_D=7)
    twin = replace(made, student_hidden_ND=made.teacher.hidden_ND, student_head=made.teacher.head)
    assert_perfect(measure([twin], top_k=TOP_K).rows)


def assert_perfect(rows):
    scores = {name: score.mean for name, score in summarise(rows, resamples=2).items()}
    for values in [*(row.values for row in rows), scores]:
        for name, value in values.items():
            metric = METRICS[name]
            if metric.teacher_value is not None:
                assert value == metric.teacher_value, name
            if metric.teacher is not None:
                assert value == values[metric.teacher], name


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
    assert measure([made], top_k=2).rows[0].values == pytest.approx(
        {
            "forward_kl": 0.5 * high,
            "reverse_kl": 0.5 * high,
            "jensen_shannon": math.log(2.0) - entropy,
            "total_variation": 0.5,
            "acceptance": 0.5,
            "top1_agreement": 0.0,
            "topk_agreement": 1.0,
            "student_entropy": entropy,
            "teacher_entropy": entropy,
            "entropy_gap": 0.0,
            "entropy_gap_size": 0.0,
            "student_nll": math.log(4.0),
            "teacher_nll": math.log(4.0 / 3.0),
        },
        rel=1e-6,
        abs=1e-7,
    )


def test_half_precision_weights_are_measured_in_float32():
    made = chunk(dtype=torch.bfloat16)
    made = replace(made, student_hidden_ND=made.student_hidden_ND.bfloat16())
    expected = direct(made)
    for name, value in values_of(made).items():
        if name not in ("top1_agreement", "topk_agreement"):
            torch.testing.assert_close(value, expected[name], rtol=5e-2, atol=5e-2, msg=lambda m, n=name: f"{n}: {m}")


def test_sharp_distributions_stay_finite():
    made = chunk()
    made = replace(made, student_hidden_ND=made.student_hidden_ND * 1e3)
    assert torch.isfinite(fidelity_values(made, top_k=TOP_K).values_MN).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_models_that_are_not_finite_are_named(broken):
    made = chunk()
    made.student_hidden_ND[4, 2] = broken
    with pytest.raises(LimbeckError, match=r"example 'p2'.*NaN or inf"):
        measure([made], top_k=TOP_K)


def test_other_vocabularies_and_shapes_are_refused():
    made = chunk()
    with pytest.raises(LimbeckError, match="28 token ids, the teacher 29"):
        measure([replace(made, student_head=replace(made.student_head, vocab_size=28))], top_k=TOP_K)
    with pytest.raises(LimbeckError, match="loss_mask_BT"):
        measure([replace(made, lengths=(3, 0, 4))], top_k=TOP_K)
    with pytest.raises(LimbeckError, match=r"top_k is 30 and the vocabulary has 29"):
        measure([made], top_k=30)


def test_positions_go_in_powers_of_two():
    """An answer of 9 tokens in two chunks, after one of 3: positions 1, 2 to 3, 4 to 7, and 8 to 15."""
    first, second = chunk(lengths=(3, 5)), chunk(lengths=(4,))
    second = replace(second, ids=("p1",))
    detail = measure([first, second], top_k=TOP_K).detail
    values = [torch.cat([direct(c)[name] for c in (first, second)]) for name in BY_POSITION]
    position = torch.tensor([1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    for line, (low, high) in zip(detail["by_position"], ((1, 1), (2, 3), (4, 7), (8, 15)), strict=True):
        held = (position >= low) & (position <= high)
        assert (line["first"], line["last"], line["tokens"]) == (low, high, int(held.sum()))
        for name, value in zip(BY_POSITION, values, strict=True):
            assert line[name] == pytest.approx(float(value[held].mean()), rel=2e-5, abs=2e-6), name
    assert (detail["examples"], detail["tokens"]) == (2, 12)


def test_calibration_is_of_the_likeliest_token():
    """Against the definitions over all tokens: what is kept of examples adds up to them."""
    made = chunk(lengths=(40, 0, 60), V=5)
    made = replace(made, student_hidden_ND=made.student_hidden_ND / 3, teacher=made.teacher)
    s, t = logits(made.student_hidden_ND, made.student_head), logits(made.teacher.hidden_ND, made.teacher.head)
    q, p = s.softmax(-1), t.softmax(-1)
    (sure_q, said_q), (sure_p, said_p) = q.max(-1), p.max(-1)
    pairs = {
        "student_ece": (sure_q, (said_q == made.label_ids_N).double()),
        "teacher_ece": (sure_p, (said_p == made.label_ids_N).double()),
        "ece_to_teacher": (sure_q, p.gather(1, said_q[:, None])[:, 0]),
    }
    found = measure([made], top_k=2)
    scores = summarise(found.rows, resamples=10)
    for name, (confidence, outcome) in pairs.items():
        error = 0.0
        for b in range(15):
            held = (confidence > b / 15) & (confidence <= (b + 1) / 15)
            error += abs(float((outcome[held] - confidence[held]).sum())) / 100
        assert scores[name].mean == pytest.approx(error, abs=1e-6), name
        assert sum(point["tokens"] for point in found.detail["reliability"][name]) == 100


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
        measure([made], top_k=TOP_K)
    assert largest.elements <= N * V / 4
