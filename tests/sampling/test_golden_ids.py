"""The ids that are trained on are the ids that were sampled, whatever the chat template does to a conversation.

The whole way: prompts from a file, both models write, the loop trains; watched are the two doors, what samplers hand
over and what teachers are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from limbeck.pipeline.cached_teacher import CachedTeacher
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import QuietConsole
from limbeck.sampling.local import LocalSampler
from limbeck.types import Response, TokenBatch
from tests.prompts.chat_templates import CHATML, CHATML_SYSTEM, GEMMA, LLAMA2
from tests.prompts.conftest import CONTROL, CORPUS
from tests.tiny_pair import questions, write_prompts

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"


@dataclass(frozen=True)
class Family:
    """A chat template, the ends of an answer, and how a question looks; `adds_bos` is a tokenizer that always does."""

    template: str
    eos: str
    ends: tuple[str, ...]
    asked: str
    adds_bos: bool = False


CHATML_ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "chatml": Family(CHATML, "<|im_end|>", ("<|im_end|>",), CHATML_ASKED),
    "chatml with a system message": Family(CHATML_SYSTEM, "<|im_end|>", ("<|im_end|>",), SYSTEM + CHATML_ASKED),
    "llama 2": Family(LLAMA2, "</s>", ("</s>",), "<s>[INST] {} [/INST]", adds_bos=True),
    "gemma": Family(
        GEMMA,
        "</s>",
        ("</s>", "<end_of_turn>"),
        "<s><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        adds_bos=True,
    ),
}


def write_tokenizer(folder: Path, family: Family) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *questions()], trainer)
    if family.adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=family.eos, pad_token="<filename>", model_max_length=160
    )
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, family: Family) -> PreTrainedTokenizerFast:
    """A model that ends about half of its answers before their limit."""
    tokenizer = write_tokenizer(folder, family)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=tokenizer.get_vocab()[family.eos],
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.get_vocab()[family.ends[-1]]] *= 3.0
    model.save_pretrained(folder)
    return tokenizer


@dataclass
class Doors:
    """What samplers handed over and what teachers were shown."""

    sampled: list[Response] = field(default_factory=list)
    shown: list[TokenBatch] = field(default_factory=list)


@pytest.fixture
def doors(monkeypatch: pytest.MonkeyPatch) -> Doors:
    seen = Doors()
    write, judge, read = LocalSampler.respond_in_batches, CachedTeacher.signal, CachedTeacher.read_stored

    def watched(self: LocalSampler, *arguments: Any, **options: Any) -> Iterator[Any]:
        for answered in write(self, *arguments, **options):
            seen.sampled += answered.responses
            yield answered

    def shown(self: CachedTeacher, batch: TokenBatch) -> Any:
        seen.shown.append(batch)
        return judge(self, batch)

    def looked_up(self: CachedTeacher, batch: TokenBatch) -> Any:
        found = read(self, batch)
        # What is not on disk is shown to the teacher.
        seen.shown += [] if found is None else [batch]
        return found

    monkeypatch.setattr(CachedTeacher, "read_stored", looked_up)
    monkeypatch.setattr(LocalSampler, "respond_in_batches", watched)
    monkeypatch.setattr(CachedTeacher, "signal", shown)
    return seen


def rows_of(batch: TokenBatch) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """Prompt, response and whether the student wrote it, read out of the tensors alone."""
    labels = batch.labels_N.tolist()
    for i, own in enumerate(batch.by_student_B.tolist()):
        read = batch.attention_mask_BT[i].bool()
        ids, scored = batch.input_ids_BT[i][read].tolist(), batch.loss_mask_BT[i]
        assert not (scored & ~read).any() and read[: len(ids)].all()
        first, count = int(scored.nonzero()[0]), int(scored.sum())
        assert scored[first : first + count].all()
        response, labels = labels[:count], labels[count:]
        # The inputs are the same ids one place earlier, and nothing stands after them.
        assert ids[first + 1 :] == response[:-1]
        yield tuple(ids[: first + 1]), tuple(response), own
    assert not labels


@pytest.mark.parametrize("author", ["pairs", "student"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_on_is_what_was_sampled(tmp_path: Path, doors: Doors, name: str, author: str):
    family = FAMILIES[name]
    tokenizer = write_model(tmp_path / "teacher", family)
    tree = {
        "output_dir": str(tmp_path / "run"),
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"init": "depth_prune", "keep": [0, 2]},
        "prompts": {"source": str(write_prompts(tmp_path / "prompts.jsonl")), "eval_fraction": 0.25},
        "responses": {"source": author, "max_new_tokens": 10, "batch_size": 5},
        "objective": {"name": "fkl"},
        "train": {"max_steps": 6, "per_device_train_batch_size": 4, "compile": "off"},
    }
    run_pipeline(load_recipe(tree), stages=STAGES, until="train", console=QuietConsole())

    ends = {tokenizer.get_vocab()[end] for end in family.ends}
    asked: dict[Any, str] = {}
    for text in questions():
        turns = [{"role": "user", "content": text}]
        ids: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        asked[tuple(ids)] = family.asked.format(text)
    sampled = {(r.prompt_ids, r.response_ids, r.author == "student"): r for r in doors.sampled}
    trained = [row for batch in doors.shown for row in rows_of(batch)]
    assert {own for _, _, own in trained} == ({False, True} if author == "pairs" else {True})
    stops = set()
    for prompt_ids, response_ids, own in trained:
        assert tokenizer.decode(list(prompt_ids)) == asked[prompt_ids]
        response = sampled[prompt_ids, response_ids, own]
        stops.add(response.stop)
        # An end where one was generated, nowhere else, and none where the limit cut the answer.
        assert [token in ends for token in response_ids[:-1]] == [False] * (len(response_ids) - 1)
        assert (response_ids[-1] in ends) == (response.stop == "eos")
        assert response.stop == "eos" or len(response_ids) == 10
        assert prompt_ids.count(0) == family.adds_bos
    assert stops == {"eos", "length"}
    assert len(trained) >= 6 * 2
