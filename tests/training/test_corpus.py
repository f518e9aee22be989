"""The language-modelling loss on a second corpus: its order, its gradient, and what is counted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from limbeck.objectives import build_objective
from limbeck.training.corpus import Corpus
from limbeck.training.loss import LossPlan
from limbeck.types import Interrupted
from tests.training.naive import Scripted, gap, gradients, read, recorded, written
from tests.training.play import (
    VOCAB,
    identical,
    metrics,
    play,
    settings,
    stop_after,
    tiny_corpus,
    tiny_lora,
    tiny_model,
    weights,
)


def numbered(size: int, seed: int = 0) -> Corpus:
    """Blocks that tell their numbers."""
    return Corpus(blocks_NL=torch.arange(size)[:, None].expand(size, 3), weight=1.0, rows=1, seed=seed)


def order(corpus: Corpus, steps: int, count: int) -> list[int]:
    return [r.prompt_ids[0] for step in range(steps) for r in corpus.at(step, count).values()]


def test_every_block_comes_once_in_a_turn_and_each_turn_has_its_own_order():
    found = order(numbered(7), 9, 4)
    turns = [found[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(turn) == list(range(7)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 5
    assert order(numbered(7, seed=1), 9, 4) != found
    # A step may be larger than the corpus.
    assert Counter(order(numbered(3), 2, 6)) == {0: 4, 1: 4, 2: 4}


def test_the_blocks_of_a_step_do_not_depend_on_how_they_are_shared():
    corpus = tiny_corpus(rows=4)
    whole = [ids for b, _ in corpus.batches(3, accumulation=1, rank=0, ranks=1, pad_id=0) for ids in b.input_ids_BT]
    parts = [
        [b for b, _ in tiny_corpus(rows=1).batches(3, accumulation=2, rank=rank, ranks=2, pad_id=0)] for rank in (0, 1)
    ]
    shared = [parts[rank][i].input_ids_BT[0] for i in (0, 1) for rank in (0, 1)]
    assert torch.equal(torch.stack(whole), torch.stack(shared))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_has_the_gradient_of_the_objective_and_of_cross_entropy_on_the_text(tmp_path, parts):
    responses, student = written("teacher", 8, seed=1), tiny_model(1)
    corpus, passes = tiny_corpus(rows=4 // parts), recorded(student)
    chosen = settings(
        max_steps=1, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, max_grad_norm=0.0
    )
    loss_plan = LossPlan(objective=build_objective("rkl"))
    play(student, tmp_path, chosen, author=Scripted(responses), loss_plan=loss_plan, corpus=corpus, temperature=1.0)
    (line,), fresh = metrics(tmp_path), tiny_model(1)
    ids = torch.stack([torch.tensor((*r.prompt_ids, *r.response_ids)) for r in tiny_corpus(rows=4).at(0, 4).values()])
    text = cross_entropy(fresh(input_ids=ids).logits[:, :-1, :VOCAB].flatten(0, 1), ids[:, 1:].flatten())
    fresh_student, rows = read(responses)
    objective = torch.cat([row.rkl_T() for row in rows]).mean()
    of_text = gradients(fresh, text)
    expected = {n: grad + corpus.weight * of_text[n] for n, grad in gradients(fresh_student, objective).items()}
    assert gap(passes[2 * parts - 1], expected) < 1e-4
    assert line["loss/lm"] == pytest.approx(text.item(), rel=1e-5)
    assert line["loss"] == pytest.approx(objective.item(), rel=1e-5), "the objective's loss alone"
    assert line["lm_tokens"] == 4 * 11 and line["tokens"] == sum(len(r.response_ids) for r in responses)


def test_without_text_nothing_changes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    plain, with_text = tiny_model(1), tiny_model(1)
    play(plain, tmp_path / "a", settings())
    play(with_text, tmp_path / "b", settings(), corpus=tiny_corpus())
    assert not identical(weights(plain), weights(with_text))
    assert not {"loss/lm", "lm_tokens"} & metrics(tmp_path / "a")[0].keys()


@pytest.mark.parametrize("make", [tiny_model, lambda seed: tiny_lora(seed, dropout=0.5)])
def test_stopped_it_goes_on_as_if_it_had_not_been(tmp_path, make):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    chosen = settings(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    straight = play(make(1), tmp_path / "a", chosen, corpus=tiny_corpus())
    with pytest.raises(Interrupted):
        play(make(1), tmp_path / "b", chosen, corpus=tiny_corpus(), should_stop=stop_after(2))
    continued = play(make(1), tmp_path / "b", chosen, corpus=tiny_corpus())
    assert identical(weights(straight), weights(continued))
    losses = [[line["loss/lm"] for line in metrics(tmp_path / name)] for name in ("a", "b")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 5
