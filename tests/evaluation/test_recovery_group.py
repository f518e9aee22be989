"""What quantisation cost and training brought back, and llama.cpp's quantiser beside it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck import run as play
from limbeck.evaluation import quantised
from limbeck.evaluation.quantised import by_llama_cpp
from limbeck.models.loading import load_model
from limbeck.models.quantization import FORMATS, dequantise, quantise, snap, weighted_grid
from limbeck.models.quantization.importance import importance_of
from limbeck.rollouts.collate import collate
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair
from tests.training.play import tiny_responses

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev"
)
GROUPS = {"fidelity": {}, "recovery": {"baselines": ["llama_cpp", "imatrix"]}}


def tree(pair: TinyPair, run: Path, **student: Any) -> dict[str, Any]:
    made = pair.tree(run, train={"max_steps": 40}, objective={"temperature": 1.0})
    made["student"] = {"init": "teacher", "quantize": {"format": "q4_0"}, **student}
    made["evaluate"] = {"groups": GROUPS, "max_new_tokens": 4}
    return made


@needs_llama_cpp
def test_shares_sizes_and_baselines(tmp_path: Path) -> None:
    pair = TinyPair.write(tmp_path)
    play(tree(pair, tmp_path / "run"))
    scores = json.loads((tmp_path / "run/scores.json").read_text("utf-8"))
    before, after = ({name: score["mean"] for name, score in scores[part].items()} for part in ("before", "after"))
    kl = "forward_kl"
    assert after["recovered"] == pytest.approx(1 - after[kl] / before[kl], rel=1e-6) and after["recovered"] > 0.1
    # Without an importance matrix llama.cpp rounds q4_0 to nearest, as the student began.
    assert after[f"{kl}@llama_cpp"] == pytest.approx(before[kl], rel=1e-5)
    assert after["recovered@llama_cpp"] == pytest.approx(after["recovered"], rel=1e-4)
    assert after[f"{kl}@imatrix"] != pytest.approx(before[kl], rel=1e-3)
    assert after["recovered@imatrix"] == pytest.approx(1 - after[kl] / after[f"{kl}@imatrix"], rel=1e-6)
    weights = load_model(tmp_path / "run/student").model
    vectors = sum(p.numel() for p in weights.parameters() if p.ndim == 1)
    embedding = weights.get_input_embeddings().weight.numel()  # type: ignore[union-attr, operator]
    matrices = sum(p.numel() for p in weights.parameters()) - vectors - embedding
    assert after["shipped_size@file"] == pytest.approx((4 * vectors + embedding * 34 / 32 + matrices * 18 / 32) / 1e6)
    assert "Share recovered" in (tmp_path / "run/report.html").read_text("utf-8")


@needs_llama_cpp
def test_importance_decides_where_errors_go() -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=draws)
    known = FORMATS.build("q4_0")
    plain = by_llama_cpp("q4_0", weight)
    assert torch.equal(plain, quantise(known, weight))
    importance = torch.ones(64)
    importance[:8] = 100.0
    weighed = by_llama_cpp("q4_0", weight, importance)
    errors = [(dequantise(known, blocks) - weight).square() @ importance for blocks in (plain, weighed)]
    assert errors[1].sum() < 0.8 * errors[0].sum()
    # Ours is a search of the same kind, and never behind theirs by more than their further weighting explains.
    ours = snap(known, weight, weighted_grid(known, weight, importance))
    assert ((ours - weight).square() @ importance).sum() < 1.02 * errors[1].sum()


def test_the_importance_is_the_mean_square_of_the_inputs(tmp_path: Path) -> None:
    model: Any = load_model(TinyPair.write(tmp_path).teacher).model
    responses = tiny_responses(5)
    # Padding counts for nothing.
    batch = collate(dict(enumerate(responses)), range(len(responses)), pad_id=0)
    found = importance_of(model, [batch], device=torch.device("cpu"))
    # What enters the first block's projections is the norm of the embeddings; nothing follows the last token of each.
    ids = torch.tensor([i for r in responses for i in (*r.prompt_ids, *r.response_ids)[:-1]])
    entering = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj.weight"], entering.square().mean(0))
    assert len(found) == 7 * 3


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = TinyPair.write(tmp_path)
    run = tmp_path / "run"
    for changes, said in (
        ({"quantize": None}, "set student={init: teacher, quantize: {format: q4_0}}"),
        ({"quantize": {"format": "int4_g32"}}, "asks llama.cpp for int4_g32, which GGUF files do not hold"),
    ):
        with pytest.raises(LimbeckError, match="recovery") as error:
            play(tree(pair, run, **changes))
        assert said in str(error.value) and not run.exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quantised.quantiser.cache_clear()
    with pytest.raises(LimbeckError, match=r"pip install xllamacpp, or set evaluate.groups.recovery.baselines=\[\]"):
        play(tree(pair, run))
    quantised.quantiser.cache_clear()
    assert not run.exists()
