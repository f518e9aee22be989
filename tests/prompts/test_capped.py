"""A cap on held-out prompts: which are held out, and what becomes of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stages.prompts import STAGE
from limbeck.prompts.capped import at_most_heldout
from limbeck.prompts.io import read_prompts
from limbeck.prompts.sources import PromptSet, load_prompts
from limbeck.recipe.load import load_recipe
from tests.tiny_pair import TinyPair


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question number {n}?"}) + "\n" for n in range(60)), "utf-8")
    return path


def ids(loaded: PromptSet, split: str = "heldout") -> set[str]:
    return {prompt.id for prompt in loaded.prompts if prompt.split == split}


def test_a_cap_is_a_smaller_share_and_the_others_are_trained_on(source: Path) -> None:
    whole = load_prompts(str(source), heldout_fraction=0.5)
    capped = {most: at_most_heldout(whole, most, split_seed=0, others="train") for most in (1, 5, 9, 1000)}
    assert [len(ids(loaded)) for loaded in capped.values()] == [1, 5, 9, len(ids(whole))]
    assert ids(capped[1]) < ids(capped[5]) < ids(capped[9]) < ids(whole)
    assert all([p.id for p in loaded.prompts] == [p.id for p in whole.prompts] for loaded in capped.values())
    shares = [load_prompts(str(source), heldout_fraction=share / 1000) for share in range(50, 200)]
    assert ids(capped[5]) in [ids(loaded) for loaded in shares]


def test_held_out_prompts_of_their_own_source_are_left_out_and_counted(source: Path) -> None:
    whole = load_prompts(str(source), heldout_fraction=1.0)
    capped = at_most_heldout(whole, 7, split_seed=0, others="left_out")
    assert len(capped.prompts) == len(ids(capped)) == 7 and capped.limited == 53


def test_the_key_reaches_the_run_directory(tmp_path: Path) -> None:
    pair = TinyPair.write(tmp_path / "pair")
    share = {"eval_fraction": 0.6}
    prompts = {}
    for name, keys in {"whole": {}, "capped": {"eval_limit": 3}}.items():
        context = RunContext(load_recipe(pair.tree(tmp_path / name, prompts=share | keys)))
        STAGE.run(context)
        prompts[name] = {prompt.id: prompt.split for prompt in read_prompts(context.run.prompts)}
    assert prompts["whole"].keys() == prompts["capped"].keys()
    assert list(prompts["capped"].values()).count("heldout") == 3 < list(prompts["whole"].values()).count("heldout")
