"""The flat twin plays the quickstart's algorithm: its settings are the recipe's and its losses the package's."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.models.heads import head_of
from limbeck.objectives import Temperature, build_objective
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.sources import offline
from limbeck.student.blocks import depth_prune
from limbeck.teachers.local import LocalTeacher
from limbeck.training.loop import train
from limbeck.training.loss import LossPlan
from limbeck.training.metrics import LoopContext
from limbeck.types import Response

VOCABULARY = 97
KEEP = (0, 1, 3)
STEPS = 30


@pytest.fixture(scope="module")
def flat() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "distil_flat.py"
    spec = importlib.util.spec_from_file_location("distil_flat", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distil_flat"] = module
    spec.loader.exec_module(module)
    return module


def test_the_settings_are_those_of_the_recipe(flat: ModuleType) -> None:
    recipe = load_recipe("quickstart")
    train, responses = recipe.train, recipe.responses
    assert (train.per_device_train_batch_size, train.num_train_epochs) == (flat.BATCH, flat.EPOCHS)
    # The recipe searches its rate; the flat file takes what the search found.
    assert (train.learning_rate, train.warmup_steps) == ("auto", flat.WARMUP)
    assert train.lr_scheduler_type == "cosine" and train.gradient_accumulation_steps == 1
    assert recipe.objective.name == "fkl" and recipe.objective.temperature == flat.TEMPERATURE
    assert recipe.student.freeze_embeddings
    settings = {name: getattr(responses, name) for name in ("temperature", "top_p", "max_new_tokens")}
    assert {"do_sample": True, **settings} == flat.SAMPLING


def test_losses_of_flat_twin_and_package_agree(flat: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(27):
        ids = torch.randint(1, VOCABULARY, (6 + i % 11,), generator=generator).tolist()
        rows.append((ids[:4], ids[4:]))
    theirs = list(flat.train(flat.cut(teacher, KEEP), teacher, rows, steps=STEPS))

    responses = [
        Response(prompt_id=str(i), author="teacher", prompt_ids=tuple(p), response_ids=tuple(r), stop="length")
        for i, (p, r) in enumerate(rows)
    ]
    metrics = tmp_path / "metrics.jsonl"
    student = depth_prune(copy.deepcopy(teacher), KEEP)
    for embedding in (student.get_input_embeddings(), student.get_output_embeddings()):
        assert embedding is not None
        embedding.requires_grad_(False)
    train(
        student,
        offline(responses),
        LocalTeacher(teacher, head_of(teacher, VOCABULARY)),
        LossPlan(objective=build_objective("fkl")),
        temperature=Temperature(loss=flat.TEMPERATURE),
        settings=load_recipe(
            "quickstart",
            [f"train.max_steps={STEPS}", "train.compile=off", f"train.learning_rate={flat.LEARNING_RATE}"],
        ).train,
        vocab_size=VOCABULARY,
        pad_id=0,
        context=LoopContext(
            learning_rate=tmp_path / "learning_rate.json", checkpoints=tmp_path / "checkpoints", metrics=metrics
        ),
    )
    import json

    ours = [json.loads(line)["loss"] for line in metrics.read_text("utf-8").splitlines()]
    assert len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert theirs[-1] != pytest.approx(theirs[0], rel=1e-2), (
        "the weights must have moved for the comparison to mean much"
    )
