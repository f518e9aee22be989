"""ROUGE-L against the package's own scorer and by hand, and a quiet import."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from limbeck.evaluation.rouge import best_rouge_l, rouge_l, scorable
from limbeck.prompts.references import require_references
from limbeck.prompts.sources import load_prompts
from limbeck.types import LimbeckError, Prompt

CANDIDATES = ["The cat sat on the mat.", "", "Dogs are running quickly", "unrelated words here", "Ünïcode 42"]
REFERENCES = ["A cat was sitting on the mat", "Something", "The dog runs quick", "entirely other text", "unicode 42"]


def test_equal_to_the_packages_own_scorer():
    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    rows = rouge_l([str(i) for i in range(5)], CANDIDATES, REFERENCES)
    for row, candidate, reference in zip(rows, CANDIDATES, REFERENCES, strict=True):
        assert row.values["rouge_l"] == pytest.approx(own.score(reference, candidate)["rougeL"].fmeasure, abs=1e-12)
        assert row.weight == 1.0


def test_by_hand():
    rows = rouge_l(["same", "none", "half"], ["one two", "x y", "a b c d"], ["one two", "one two", "a b"])
    assert [row.values["rouge_l"] for row in rows] == pytest.approx([1.0, 0.0, 2 * 0.5 * 1 / 1.5])


def test_uneven_lists_and_unscorable_texts_are_refused():
    with pytest.raises(LimbeckError, match="as many of each"):
        rouge_l(["a"], ["x", "y"], ["x"])
    with pytest.raises(LimbeckError, match="leave rouge out"):
        rouge_l(["a"], ["你好"], ["世界"])


def test_it_says_nothing_and_touches_no_log_handler():
    code = (
        "import logging\n"
        "from limbeck.evaluation.rouge import rouge_l\n"
        "import sys; assert 'rouge_score' not in sys.modules and 'nltk' not in sys.modules\n"
        "before = list(logging.getLogger().handlers)\n"
        "rouge_l(['a'], ['running dogs'], ['the dog runs'])\n"
        "assert logging.getLogger().handlers == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


WORDS = st.sampled_from(["the", "cat", "cats", "ran", "running", "a", "mat", "42", "ünï", "...", "Dog"])
TEXTS = st.lists(WORDS, max_size=8).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_the_best_of_several_references_is_the_packages_own(pairs):
    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    candidates, references = [list(side) for side in zip(*pairs, strict=True)]
    if not scorable(text for texts in references for text in texts):
        with pytest.raises(LimbeckError, match="leave rouge out"):
            best_rouge_l(candidates, references)
        return
    found = best_rouge_l(candidates, references)
    for value, candidate, texts in zip(found, candidates, references, strict=True):
        assert value == pytest.approx(own.score_multi(texts, candidate)["rougeL"].fmeasure, abs=1e-9)
        assert value == pytest.approx(max(own.score(text, candidate)["rougeL"].fmeasure for text in texts), abs=1e-9)


def test_several_references_by_hand():
    # One of two words and all of one: 2/3; both: 1; the second reference says nothing that ROUGE-L sees.
    assert best_rouge_l(["a b", "a b", ""], [["b"], ["c", "b a", "a b"], ["a", "你好"]]) == pytest.approx([2 / 3, 1, 0])
    assert best_rouge_l([], []) == []


def test_a_candidate_without_references_is_refused():
    with pytest.raises(LimbeckError, match="got 2 candidates and references for 1"):
        best_rouge_l(["a", "b"], [["a"], []])
    with pytest.raises(LimbeckError, match="one or more references for each"):
        best_rouge_l(["a", "b"], [["a"]])


@pytest.mark.parametrize(
    ("name", "rows", "prompts"), [("dolly_eval", 500, 499), ("self_inst", 242, 242), ("vicuna", 80, 80)]
)
def test_the_papers_sets_have_a_reference_for_every_prompt(name, rows, prompts, shared_data, tmp_path):
    loaded = load_prompts(str(shared_data / "minillm_eval" / f"{name}.jsonl"), heldout_fraction=0.5)
    assert (loaded.rows, len(loaded.prompts)) == (rows, prompts)
    references = require_references(loaded.prompts, "unused")
    assert [len(texts) for texts in references.values()] == [1] * prompts
    # Answers of a neighbour: something in common, but not the reference itself.
    some = list(loaded.prompts[:12])
    neighbours = [prompt.completion or "" for prompt in loaded.prompts[1:13]]
    own = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    found = best_rouge_l(neighbours, [references[prompt.id] for prompt in some])
    assert found == pytest.approx(
        [own.score(references[p.id][0], n)["rougeL"].fmeasure for p, n in zip(some, neighbours, strict=True)], abs=1e-9
    )
    assert 0.0 < max(found) < 1.0

    # The same rows with a second answer each, as the sets with several references have them.
    lines = [
        {"instruction": p.instruction[0], "input": p.instruction[1], "output": [p.completion, neighbour]}
        for p, neighbour in zip(some, neighbours, strict=True)
        if p.instruction is not None
    ]
    path = tmp_path / "several.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    several = load_prompts(str(path), heldout_fraction=0.5)
    assert {p.id: p.completion for p in several.prompts} == {p.id: p.completion for p in some}
    both = require_references(several.prompts, "unused")
    best = best_rouge_l([both[p.id][1] for p in several.prompts], [both[p.id] for p in several.prompts])
    assert best == pytest.approx([1.0] * len(some))


def test_prompts_without_a_reference_are_named_with_their_place():
    prompts = [
        Prompt(id="a", text="Hi", completion="Hello"),
        Prompt(id="b", text="Ho", where="data.jsonl, line 7"),
        Prompt(id="c", text="Hu"),
    ]
    assert require_references(prompts[:1], "unused") == {"a": ("Hello",)}
    with pytest.raises(LimbeckError, match=r"^prompt b \(data\.jsonl, line 7: 'Ho'\).*one of 2 among 3.*: do this$"):
        require_references(prompts, "do this")
