"""Codecs against the lines they replace: what comes back is the unpacked signal, to the bits that were kept."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from limbeck.objectives import OBJECTIVES, SparseForm, build_objective, fused_distillation_loss
from limbeck.teachers.store.base import Codec, Frame, bytes_per_token
from limbeck.teachers.store.bits import pack, packed_bytes, unpack, width_of
from limbeck.teachers.store.codecs import CODECS, codec_tree, read_codec
from limbeck.teachers.store.dense import Hidden, Svd
from limbeck.teachers.store.quantize import quantize, restore
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.types import DenseSignal, Head, LimbeckError, SampledSignal, Signal, TopKSignal

VOCAB, WIDTH, TOKENS = 1000, 24, 60
FRAME = Frame(vocab_size=VOCAB, width=WIDTH, temperatures=(1.0, 3.0))


def teacher_signal(seed: int = 0, *, sharp: float = 1.0, bias: bool = False) -> DenseSignal:
    generator = torch.Generator().manual_seed(seed)
    head = Head(
        weight_VD=torch.randn(VOCAB + 24, WIDTH, generator=generator),
        bias_V=torch.randn(VOCAB + 24, generator=generator) if bias else None,
        vocab_size=VOCAB,
    )
    # Not the same size in every direction, as hidden states are not.
    sizes_D = torch.linspace(1.5, 0.01, WIDTH)
    return DenseSignal(hidden_ND=sharp * sizes_D * torch.randn(TOKENS, WIDTH, generator=generator), head=head)


def kept(codec: Codec, dense: DenseSignal) -> Signal:
    """The unpacked signal of the kind that the codec keeps."""
    if isinstance(codec, TopK):
        return SparseForm(support="topk_tail", k=codec.k, temperatures=FRAME.temperatures).of(dense, seed=3)
    if isinstance(codec, Sampled):
        return SparseForm(support="sampled", k=codec.draws, temperatures=FRAME.temperatures).of(dense, seed=3)
    return dense


def round_trip(codec: Codec, dense: DenseSignal) -> Signal:
    shared = codec.shared(dense.head, dense.hidden_ND)
    columns = codec.encode(kept(codec, dense), FRAME, shared)
    assert {name: (column.dtype.name, column.shape[1:]) for name, column in columns.items()} == codec.layout(FRAME)
    head = None
    if "weight" in shared:
        head = Head(weight_VD=shared["weight"], bias_V=shared.get("bias"), vocab_size=VOCAB)
    return codec.decode(columns, FRAME, head)


def gradient(signal: Signal, objective: str, *, tau: float = 1.0, far: float = 0.5) -> torch.Tensor:
    """Gradient in the hidden states of a student at some distance from the teacher."""
    from limbeck.objectives import Temperature

    dense = teacher_signal()
    generator = torch.Generator().manual_seed(9)
    head = Head(weight_VD=dense.head.weight_VD[:VOCAB], vocab_size=VOCAB)
    student_ND = dense.hidden_ND + far * torch.randn(TOKENS, WIDTH, generator=generator)
    student_ND.requires_grad_()
    loss = fused_distillation_loss(
        student_ND,
        head,
        signal,
        build_objective(objective),
        temperature=Temperature(loss=tau),
        label_N=torch.zeros(TOKENS, dtype=torch.int64),
        compile="off",
    ).loss
    (grad,) = torch.autograd.grad(loss, student_ND)
    return grad.double().flatten()


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(one @ two / (one.norm() * two.norm()))


@pytest.mark.parametrize(("numbers", "bits"), [(1, 1), (3, 5), (7, 9), (64, 16), (64, 17), (5, 25), (8, 8)])
def test_bits_are_those_of_one_long_number(numbers, bits):
    values_NK = np.random.default_rng(bits).integers(0, 1 << bits, (11, numbers))
    packed_NB = pack(values_NK, bits)
    assert packed_NB.shape == (11, packed_bytes(numbers, bits))
    for row, values in zip(packed_NB, values_NK, strict=True):
        naive = sum(int(value) << (j * bits) for j, value in enumerate(values))
        assert row.tobytes() == naive.to_bytes(packed_bytes(numbers, bits), "little")
    assert (unpack(packed_NB, numbers, bits) == values_NK).all()


@pytest.mark.parametrize(
    ("count", "bits"), [(1, 1), (2, 1), (3, 2), (49152, 16), (65536, 16), (65537, 17), (151936, 18)]
)
def test_an_id_takes_the_logarithm_of_the_vocabulary(count, bits):
    assert width_of(count) == bits


@pytest.mark.parametrize("bits", [4, 8, 9, 12, 16])
def test_log_probabilities_come_back_to_half_a_step(bits):
    logp_NK = -np.sort(np.random.default_rng(0).gamma(2.0, 3.0, (50, 64)).astype(np.float32), axis=1)
    levels_NK, top_N1, span_N1 = quantize(logp_NK, bits)
    assert levels_NK.min() == 0 and levels_NK.max() < 1 << bits
    found_NK = restore(levels_NK, top_N1, span_N1, bits)
    assert (found_NK[:, 0] == logp_NK[:, 0]).all()
    step_N1 = 1.5 * span_N1.astype(np.float32) / ((1 << bits) - 1)
    assert (np.abs(found_NK - logp_NK) <= 0.51 * step_N1 + 1e-5).all()
    assert (np.diff(found_NK, axis=1) <= 1e-6).all()


def test_equal_log_probabilities_have_no_span():
    levels_NK, top_N1, span_N1 = quantize(np.full((2, 4), -1.5, np.float32), 8)
    assert (restore(levels_NK, top_N1, span_N1, 8) == -1.5).all()


def test_top_k_as_it_is_comes_back_bit_for_bit():
    codec, dense = TopK(k=20, bits=32), teacher_signal()
    found, expected = round_trip(codec, dense), kept(codec, dense)
    assert isinstance(found, TopKSignal) and isinstance(expected, TopKSignal)
    assert torch.equal(found.ids_NK, expected.ids_NK) and torch.equal(found.logp_NK, expected.logp_NK)
    assert torch.equal(found.log_z_NG[:, 1], expected.log_z_NG[:, 1]) and not found.log_z_NG[:, 0].any()


@pytest.mark.parametrize("sharp", [0.3, 1.0, 3.0])
def test_packed_top_k_keeps_ids_and_mass(sharp):
    codec, dense = TopK(k=64), teacher_signal(sharp=sharp)
    found, expected = round_trip(codec, dense), kept(codec, dense)
    assert isinstance(found, TopKSignal) and isinstance(expected, TopKSignal)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    tails = [1 - signal.logp_NK.double().exp().sum(-1) for signal in (found, expected)]
    assert torch.allclose(tails[0], tails[1], rtol=1e-2, atol=2e-6)


@pytest.mark.parametrize("objective", ["fkl", "rkl", "js", "skl", "srkl", "tv"])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_gradients_of_packed_top_k_are_those_of_unpacked(objective, tau):
    codec, dense = TopK(k=64), teacher_signal()
    packed, unpacked = (gradient(s, objective, tau=tau) for s in (round_trip(codec, dense), kept(codec, dense)))
    assert cosine(packed, unpacked) >= 0.9999
    coarse = gradient(round_trip(TopK(k=64, bits=4), dense), objective, tau=tau)
    assert cosine(coarse, unpacked) < cosine(packed, unpacked)


def test_top_k_of_64_takes_at_most_220_bytes():
    assert bytes_per_token(TopK(k=64), Frame(vocab_size=49152, width=576, temperatures=(1.0,))) <= 220
    assert bytes_per_token(TopK(k=64), Frame(vocab_size=128256, width=4096, temperatures=(2.0,))) <= 220


@pytest.mark.parametrize("bits", [9, 32])
def test_samples_come_back_with_their_counts(bits):
    codec, dense = Sampled(draws=12, bits=bits), teacher_signal(sharp=3.0)
    found, expected = round_trip(codec, dense), kept(codec, dense)
    assert isinstance(found, SampledSignal) and isinstance(expected, SampledSignal)
    assert torch.equal(found.ids_NK, expected.ids_NK) and torch.equal(found.count_NK, expected.count_NK)
    assert (found.count_NK > 1).any() and bool((found.count_NK.sum(-1) == 12).all())
    # At temperature 1 the estimate is the counts alone.
    assert torch.allclose(gradient(found, "fkl"), gradient(expected, "fkl"), rtol=1e-4, atol=1e-7)
    assert cosine(gradient(found, "fkl", tau=3.0), gradient(expected, "fkl", tau=3.0)) > 0.9999


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_hidden_states_come_back_in_the_precision_they_are_kept_in(dtype, error):
    dense = teacher_signal(bias=True)
    found = round_trip(Hidden(dtype=dtype), dense)
    assert isinstance(found, DenseSignal) and found.hidden_ND.dtype == torch.float32
    assert torch.equal(found.hidden_ND, dense.hidden_ND.to(getattr(torch, dtype)).float())
    assert (found.hidden_ND - dense.hidden_ND).abs().max() <= error * dense.hidden_ND.abs().max()
    assert found.head.bias_V is not None and len(found.head.bias_V) == VOCAB


def logits(signal: Signal) -> torch.Tensor:
    assert isinstance(signal, DenseSignal)
    logits_NV = signal.hidden_ND.double() @ signal.head.weight_VD[:VOCAB].double().T
    return logits_NV - logits_NV.mean(-1, keepdim=True)


def test_truncated_svd_is_the_best_of_its_rank_and_exact_at_full_rank():
    dense = teacher_signal()
    whole = logits(dense)
    errors = [
        float((logits(round_trip(Svd(rank=rank, dtype="float32"), dense)) - whole).norm()) for rank in (6, 12, 24)
    ]
    # The naive line: the singular value decomposition of the logits themselves.
    values = torch.linalg.svdvals(whole)
    best = [float(values[rank:].norm()) for rank in (6, 12, 24)]
    assert errors[0] == pytest.approx(best[0], rel=1e-3) and errors[1] == pytest.approx(best[1], rel=1e-2)
    assert errors[2] < 1e-4 * float(whole.norm())


@pytest.mark.parametrize(
    ("codec", "part"),
    [
        (TopK(k=VOCAB + 1), "1000 tokens"),
        (TopK(bits=3), "4 to 16"),
        (TopK(bits=20), "or 32"),
        (Sampled(draws=0), "at least one"),
        (Hidden(dtype="int8"), "float32"),  # type: ignore[arg-type]
        (Svd(rank=WIDTH + 1), "24 numbers"),
    ],
)
def test_options_that_make_no_sense_are_refused(codec, part):
    with pytest.raises(LimbeckError, match=part) as error:
        codec.check(FRAME)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(CODECS))
def test_every_codec_is_written_and_read_as_plain_values(name):
    codec = CODECS.build(name)
    assert read_codec(codec_tree(codec)) == codec
    codec.check(Frame(vocab_size=VOCAB, width=200, temperatures=(1.0,)))
    assert CODECS.summary(name)


@pytest.mark.parametrize("codec", [TopK(k=8), Sampled(draws=4), Hidden(), Svd(rank=8)])
def test_a_teacher_that_is_not_finite_is_refused(codec):
    dense = teacher_signal()
    shared = codec.shared(dense.head, dense.hidden_ND)
    dense.hidden_ND[3, 2] = float("nan")
    with pytest.raises(LimbeckError, match="not finite"):
        kept_nan = kept(codec, dense) if not isinstance(codec, Sampled) else _nan_sample(dense)
        codec.encode(kept_nan, FRAME, shared)


def _nan_sample(dense: DenseSignal) -> Signal:
    signal = kept(Sampled(draws=4), teacher_signal())
    assert isinstance(signal, SampledSignal)
    signal.logp_NK[0, 0] = float("nan")
    return signal


def test_objectives_that_take_top_k_take_it_from_a_store():
    signal = round_trip(TopK(k=64), teacher_signal())
    names = [name for name in OBJECTIVES if "topk_tail" in getattr(build_objective(name), "supports", ())]
    assert len(names) > 5
    for name in names[:8]:
        assert gradient(signal, name).isfinite().all(), name


def test_the_page_gives_the_sizes():
    page = (Path(__file__).resolve().parents[3] / "docs" / "store.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\{name: .*?\})` \| (\d+) \|", page, re.MULTILINE)
    frame = Frame(vocab_size=49152, width=576, temperatures=(1.0,))
    assert {read_codec(yaml.safe_load(codec)).kind for codec, _ in rows} == {"topk", "sampled", "dense"}
    assert [bytes_per_token(read_codec(yaml.safe_load(codec)), frame) for codec, _ in rows] == [int(n) for _, n in rows]
