"""The Python door: names, loading, a whole run."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import limbeck
from limbeck.recipe.load import to_yaml
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair

PLAIN = {"name": "mine", "teacher": {"model": "t"}, "student": {"init": "depth_prune", "layers": 2}}


def test_every_public_name_is_there_and_is_what_its_home_says():
    assert dir(limbeck) == sorted(limbeck.__all__)
    for name in limbeck.__all__:
        thing = getattr(limbeck, name)
        home = limbeck._HOMES[name]
        assert thing is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'distill'"):
        limbeck.distill  # noqa: B018


def test_load_takes_a_name_a_file_a_mapping_and_a_run_directory(tmp_path, monkeypatch):
    assert limbeck.load("quickstart", "train.max_steps=3").train.max_steps == 3
    loaded = limbeck.load(PLAIN, "train.seed=4")
    assert loaded.train.seed == 4
    file = tmp_path / "x.yaml"
    file.write_text(to_yaml(loaded), "utf-8")
    assert limbeck.load(file) == loaded
    monkeypatch.chdir(tmp_path)
    # Names that YAML would read as something else, or cut short.
    for name in ("run", "123", "1e5", "a #b", "a: b", "[x]", "null"):
        folder = Path(name)
        folder.mkdir()
        (folder / "recipe.resolved.yaml").write_text(to_yaml(loaded), "utf-8")
        assert limbeck.load(name).directory == folder
        assert limbeck.load(folder).train.seed == 4


def test_load_says_what_it_did_not_find(tmp_path):
    with pytest.raises(LimbeckError, match="neither a file nor a shipped recipe"):
        limbeck.load(tmp_path / "absent")


def test_a_run_in_a_few_lines(tmp_path):
    pair = TinyPair.write(tmp_path)
    run = limbeck.run(pair.tree(tmp_path / "run"), "train.max_steps=2")
    assert run.student.is_dir() and run.report.is_file()
    assert {"before", "after"} <= set(run.scores)
    again = limbeck.run(tmp_path / "run")
    assert again.scores == run.scores


def test_the_objectives_are_plain_functions_for_anybodys_loop():
    import torch

    draw = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(5, 8, generator=draw).requires_grad_()
    head = limbeck.Head(weight_VD=torch.randn(11, 8, generator=draw).requires_grad_(), vocab_size=11)
    teacher = limbeck.DenseSignal(
        hidden_ND=torch.randn(5, 4, generator=draw),
        head=limbeck.Head(weight_VD=torch.randn(11, 4, generator=draw), vocab_size=11),
    )
    objective = limbeck.build_objective("fkl")
    out = limbeck.fused_distillation_loss(
        hidden_ND, head, teacher, objective, temperature=limbeck.Temperature(loss=2.0)
    )
    out.loss.backward()
    assert hidden_ND.grad is not None and head.weight_VD.grad is not None
    assert out.loss.item() == pytest.approx(out.value_N.mean().item(), rel=1e-5)
