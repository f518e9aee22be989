"""`responses.source=text` through whole runs: documents apart, counted, held out by a hash, the same after a kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.pipeline.context import RunContext
from limbeck.pipeline.document_lots import Corpus, _write_lot, write_lots
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.prompts import documents
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.table import open_responses
from limbeck.runtime.rundir import RunDirectory
from limbeck.runtime.shared_work import EVERYTHING, Everything
from tests.limbeck_command import CommandServer, KillAt
from tests.pipeline.test_bad_input import refused
from tests.tiny_pair import TinyPair

TEXTS = [f"Rain number {i} falls on iron maps, salt and moss. " * (1 + i % 4) for i in range(40)]


def corpus(folder: Path, texts: list[Any] = TEXTS, name: str = "text.jsonl", field: str = "text") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({field: text, "meta": 1}) + "\n" for text in texts), "utf-8")
    return str(path)


def tree_of(tiny: TinyPair, output: Path, source: str, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "prompts": {"source": source},
        "responses": {"source": "text", "max_new_tokens": 20},
        "evaluate": {"groups": {"fidelity": {}, "perplexity": {}}},
        "train": {"logging_steps": 1, "max_steps": 6},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return tiny.tree(output, **base)


def played(tree: dict[str, Any], *stages: str) -> RunDirectory:
    kept = [stage for stage in STAGES if not stages or stage.name in stages]
    return run_pipeline(load_recipe(tree), stages=kept)


def losses(run: RunDirectory) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text("utf-8").splitlines()]


def nats_by_document(model: Any, tokenizer: Any, texts: list[str], longest: int) -> tuple[float, int]:
    """The naive line: a forward pass for each piece of each document, and the surprise at its tokens."""
    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for start in range(1, len(ids), longest):
            piece = torch.tensor([ids[start - 1 : start + longest]])
            with torch.inference_mode():
                logp_TV = model(piece).logits[0, :-1].double().log_softmax(-1)
            total -= float(logp_TV.gather(1, piece[0, 1:, None]).sum())
            count += piece.shape[1] - 1
    return total, count


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_and_the_perplexity_are_those_of_documents_alone(
    tiny: TinyPair, tmp_path: Path, packing: bool
) -> None:
    heldout = [f"Salt and moss {i}. " * 5 for i in range(6)]
    held = corpus(tmp_path, heldout, "heldout.jsonl")
    sections: dict[str, Any] = {
        "prompts": {"heldout": held},
        "student": {"init": "teacher", "layers": None},
        "objective": {"name": "ce", "temperature": 1.0},
        # One step of all pieces.
        "train": {"max_steps": 1, "per_device_train_batch_size": 100, "max_tokens_per_batch": 100, "packing": packing},
    }
    run = played(tree_of(tiny, tmp_path / "run", corpus(tmp_path, TEXTS[:20]), **sections))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.teacher), AutoTokenizer.from_pretrained(tiny.teacher)
    total, count = nats_by_document(model, tokenizer, TEXTS[:20], 20)
    table = open_responses(run.responses / "data.jsonl")
    assert sum(r.tokens for r in table if r.split == "train") == count
    assert sum(r.split == "train" for r in table) == 100
    record = run.manifest("respond")
    assert record is not None and (record["train"], record["heldout"], record["blank"]) == (20, 6, 0)
    assert losses(run)[0] == pytest.approx(total / count, rel=1e-5)
    total, count = nats_by_document(model, tokenizer, heldout, 20)
    before = json.loads((run.root / "scores.json").read_text("utf-8"))["before"]
    naive = torch.tensor(total / count, dtype=torch.float64).exp().item()
    assert before["perplexity"]["mean"] == pytest.approx(naive, rel=1e-5)
    assert before["teacher_perplexity"]["mean"] == pytest.approx(naive, rel=1e-5)
    nats = before["bits_per_byte"]["mean"] * torch.tensor(2.0).log().item()
    first = sum(len(tokenizer.decode(tokenizer(text)["input_ids"][:1])) for text in heldout)
    assert nats * (sum(map(len, heldout)) - first) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("teacher", [{"cache_limit_gib": 2e-5}, {"cache": False}], ids=["windows", "asked"])
def test_a_signal_in_windows_and_one_that_is_asked_for_give_the_same_losses(
    tiny: TinyPair, tmp_path: Path, teacher: dict[str, Any]
) -> None:
    objective = {"name": "sum", "parts": [{"name": "fkl", "weight": 0.5}, {"name": "ce", "weight": 0.5}]}
    source = corpus(tmp_path)
    shared = {"objective": objective, "evaluate": {"groups": {"fidelity": {}}}}
    stages = ("prompts", "respond", "teach", "train")
    stored = played(tree_of(tiny, tmp_path / "stored", source, **shared), *stages)
    other = played(tree_of(tiny, tmp_path / "other", source, teacher=teacher, **shared), *stages)
    assert losses(other) == pytest.approx(losses(stored), rel=1e-5)


def splits(run: RunDirectory) -> dict[str, set[str]]:
    table = open_responses(run.responses / "data.jsonl")
    return {split: {r.prompt_id for r in table if r.split == split} for split in ("train", "heldout")}


def test_held_out_documents_are_whole_and_the_fewest_numbers(tiny: TinyPair, tmp_path: Path) -> None:
    source = corpus(tmp_path)
    some = played(tree_of(tiny, tmp_path / "some", source), "prompts", "respond")
    few = played(tree_of(tiny, tmp_path / "few", source, prompts={"eval_limit": 3}), "prompts", "respond")
    for run in (some, few):
        assert not splits(run)["train"] & splits(run)["heldout"]
    assert splits(few)["heldout"] < splits(some)["heldout"] and len(splits(few)["heldout"]) == 3
    assert {*splits(few)["train"], *splits(few)["heldout"]} == {*splits(some)["train"], *splits(some)["heldout"]}


def test_no_more_is_read_than_asked_for_and_what_is_blank_is_counted(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LOT", 7)
    texts = [" ", *TEXTS[:10], "", *TEXTS[10:]]
    sections = {"responses": {"source": {"name": "text", "max_tokens": 900}, "max_new_tokens": 20}}
    run = played(tree_of(tiny, tmp_path / "run", corpus(tmp_path, texts), **sections), "prompts", "respond")
    record = run.manifest("respond")
    assert record is not None and record["blank"] == 2 and record["rows"] < 42
    table = list(open_responses(run.responses / "data.jsonl"))
    tokens = [r.tokens for r in table]
    whole = played(tree_of(tiny, tmp_path / "whole", corpus(tmp_path, texts)), "prompts", "respond")
    every = list(open_responses(whole.responses / "data.jsonl"))
    # The first documents, the last of them whole: it is the one in which the limit is reached.
    assert [r.response_ids for r in table] == [r.response_ids for r in every[: len(table)]]
    assert every[len(table)].prompt_id != table[-1].prompt_id
    last = sum(r.tokens for r in table if r.prompt_id == table[-1].prompt_id)
    assert sum(tokens) - last < 900 <= sum(tokens) == record["tokens"]


def test_lots_that_another_rank_finishes_late_change_nothing(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of tokens ends the text where it would with one process, though more lots were written meanwhile."""
    monkeypatch.setattr(documents, "LOT", 3)
    source = corpus(tmp_path)
    found = []
    for late in (False, True):
        sections = {"responses": {"source": {"name": "text", "max_tokens": 400}, "max_new_tokens": 20}}
        corpus_of = Corpus(RunContext(load_recipe(tree_of(tiny, tmp_path / f"run{late}", source, **sections))))
        lots = list(documents.lots_of(documents.documents_of(corpus_of.training)))

        class Late(Everything):
            def take(self, unit: int) -> bool:
                return unit != 1

            def finish(self, unit: int) -> None:
                if unit == 4:
                    _write_lot(corpus_of, 1, lots[1], EVERYTHING)  # noqa: B023

        found.append(write_lots(corpus_of, Late() if late else EVERYTHING))
        assert corpus_of.record(4).exists() is late
    assert found == [2, 2]


def test_killed_it_goes_on_with_the_lots_that_it_lacks(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    source = corpus(tmp_path, [f"Bees {i}." for i in range(1200)])
    whole, run = tmp_path / "whole", tmp_path / "run"
    for place in (whole, run):
        tiny.recipe(place, **{k: v for k, v in tree_of(tiny, place, source).items() if isinstance(v, dict)})
    assert limbeck.run("respond", whole.with_suffix(".yaml")).code == 0
    killed = limbeck.run("respond", run.with_suffix(".yaml"), killed=KillAt(run, "responses/batches/000001.json"))
    assert killed.code == -signal.SIGKILL
    first = run / "responses/batches/000000.arrow"
    before = first.stat().st_ino
    killed = limbeck.run("respond", run.with_suffix(".yaml"), killed=KillAt(run, "responses/data.jsonl"))
    assert killed.code == -signal.SIGKILL
    finished = limbeck.run("respond", run.with_suffix(".yaml"))
    assert finished.code == 0 and "documents of" in finished.stderr, finished.stderr
    assert first.stat().st_ino == before
    for name in ("responses/data.arrow", "responses/data.jsonl", "responses/batches/000001.arrow"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("texts", "overrides", "words"),
    [
        ([*TEXTS, 7], (), ("line 41: expected text in 'text', got int",)),
        (TEXTS, ("responses.source={name: text, text_field: body}",), ("line 1", "meta, text", "'body'", "text_field")),
        (TEXTS, ("prompts.source=builtin",), ("prompts.source=builtin holds prompts",)),
        (TEXTS, ("responses.max_new_tokens=128",), ("window of the pair 128", "lower it to 127")),
        (TEXTS, ("prompts.limit=5",), ("prompts.limit", "responses.source.max_tokens")),
        (TEXTS, ("evaluate.groups=[fidelity, rouge]",), ("rouge", "evaluate.groups=[fidelity, perplexity]")),
        (TEXTS, ("teacher.sees=column",), ("plain text", "teacher.sees=prompt")),
        (TEXTS, ("preference={}",), ("plain text", "preference=null")),
        (TEXTS, ("train.per_device_train_batch_size=500",), ("pieces of up to 20 tokens", "takes 500")),
        (["One."] * 8, ("prompts.eval_fraction=0.0001",), ("8 documents", "leave none held out")),
        ([" ", ""], (), ("gives 0 pieces",)),
        (TEXTS, ("responses.source=teacher", "evaluate.groups=[fidelity]"), ("fields meta, text", "prompts.fields")),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_one_line(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path, texts: list[Any], overrides: tuple[str, ...], words: Any
) -> None:
    tree = tree_of(tiny, tmp_path / "run", corpus(tmp_path, texts))
    recipe = tiny.recipe(tmp_path / "run", **{k: v for k, v in tree.items() if isinstance(v, dict)})
    refused(limbeck.run("respond", recipe, *overrides), *words)


def test_a_document_in_both_sources_is_refused(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    held = corpus(tmp_path, ["Of its own.", TEXTS[3].replace(" ", "  ")], "heldout.jsonl")
    tree = tree_of(tiny, tmp_path / "run", corpus(tmp_path), prompts={"heldout": held})
    recipe = tiny.recipe(tmp_path / "run", **{k: v for k, v in tree.items() if isinstance(v, dict)})
    refused(limbeck.run("respond", recipe), "heldout.jsonl, line 2", "text.jsonl, line 4", "prompts.heldout")


def test_perplexity_of_any_run_on_text_of_its_own(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    """A recipe on prompts, and two models without a run; without text the group is refused."""
    text = corpus(tmp_path, TEXTS[:6])
    group = {"perplexity": {"source": text, "max_length": 20, "limit": 5}}
    run = tmp_path / "run"
    recipe = tiny.recipe(run, train={"max_steps": 2}, evaluate={"groups": group})
    finished = limbeck.run("run", recipe)
    assert finished.code == 0, finished.stderr
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run / "student"),
        AutoTokenizer.from_pretrained(tiny.teacher),
    )
    total, count = nats_by_document(model, tokenizer, TEXTS[:5], 20)
    naive = torch.tensor(total / count, dtype=torch.float64).exp().item()
    assert scores["after"]["perplexity"]["mean"] == pytest.approx(naive, rel=1e-5)
    assert scores["after"]["perplexity"]["n"] == 5
    alone = limbeck.run(
        "evaluate", run / "student", "--teacher", tiny.teacher, "--prompts", tiny.prompts,
        f"output_dir={tmp_path}/alone", "evaluate.groups=[perplexity]",
        *(f"evaluate.groups.perplexity.{key}={value}" for key, value in group["perplexity"].items()),
    )  # fmt: skip
    assert alone.code == 0, alone.stderr
    again = json.loads((tmp_path / "alone" / "scores.json").read_text("utf-8"))
    assert again["after"]["perplexity"] == scores["after"]["perplexity"]
    assert again["after"]["teacher_perplexity"] == scores["after"]["teacher_perplexity"]
    refused(
        limbeck.run("run", recipe, "evaluate.groups.perplexity.source=null", f"output_dir={tmp_path}/none"),
        "source=FILE",
    )
