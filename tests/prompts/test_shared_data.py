"""The real data sets of the field, read by their fields, and encoded with a real tokenizer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from limbeck.prompts.sources import load_prompts
from limbeck.prompts.templates import encode_prompts, encode_responses
from limbeck.types import LimbeckError
from tests.prompts.chat_templates import CHATML_SYSTEM
from tests.prompts.conftest import MakeTokenizer

# source: rows, prompts (duplicates and instances apart), reference answers
SETS = {
    "dolly15k/train-*.jsonl": (13429, 13303, 13303),
    "dolly15k/dev.jsonl": (1000, 997, 997),
    "minillm_eval": (822, 821, 821),
    "gpteacher/codegen_instruct.jsonl": (4535, 4535, 4535),
    "gsm8k/train.jsonl": (7473, 7473, 7473),
    "math/math500_test.jsonl": (500, 500, 500),
    "alpaca_eval/alpaca_eval_text_davinci_003.jsonl": (805, 805, 803),
    "evol_instruct/evol_inst_eval_ref.jsonl": (218, 217, 0),
    "humaneval/HumanEval.jsonl": (164, 164, 0),
    "self_instruct/seed_tasks.jsonl": (175, 175, 175),
    "self_instruct/user_oriented_instructions.jsonl": (252, 252, 252),
}


@pytest.mark.parametrize("source", SETS)
def test_counts(source: str, shared_data: Path) -> None:
    loaded = load_prompts(str(shared_data / source), heldout_fraction=0.1)
    assert (loaded.rows, len(loaded.prompts), loaded.with_completion) == SETS[source]
    assert {prompt.id for prompt in loaded.of("train")}.isdisjoint(prompt.id for prompt in loaded.of("heldout"))
    assert abs(len(loaded.of("heldout")) / len(loaded.prompts) - 0.1) < 0.05


def test_corpora_are_refused_unless_their_text_is_named(shared_data: Path) -> None:
    source = str(shared_data / "tinystories/tinystories_sample.jsonl")
    with pytest.raises(LimbeckError, match=r"line 1: got the fields text, .*prompts\.fields"):
        load_prompts(source, heldout_fraction=0.1)
    assert load_prompts(source, heldout_fraction=0.1, fields={"prompt": "text"}).rows == 2316


def test_dolly_fields_reach_the_prompt(shared_data: Path) -> None:
    loaded = load_prompts(str(shared_data / "dolly15k/train-00.jsonl"), heldout_fraction=0.1)
    prompt = next(p for p in loaded.prompts if p.text == "What is the meaning of RCA in software")
    assert prompt.instruction == (prompt.text, "")
    assert prompt.category == "brainstorming"
    assert (prompt.completion or "").startswith("RCA means Root Cause Analysis")


def test_angle_brackets_of_code_data_are_refused_for_a_tokenizer_that_reads_them(
    shared_data: Path, make_tokenizer: MakeTokenizer
) -> None:
    loaded = load_prompts(str(shared_data / "gpteacher/codegen_instruct.jsonl"), heldout_fraction=0.1)
    tokenizer = make_tokenizer(CHATML_SYSTEM, eos="<|im_end|>")
    with pytest.raises(LimbeckError, match="spells the control token <filename>"):
        encode_responses(loaded.prompts, tokenizer)


@pytest.mark.real
def test_dolly_is_token_exact_with_smollm2(shared_data: Path, smollm2_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    prompts = load_prompts(str(shared_data / "dolly15k/train-*.jsonl"), heldout_fraction=0.1).prompts
    started = time.process_time()
    encoded = encode_prompts(prompts, tokenizer)
    # The bound is the on an idle machine, in CPU time of all threads.
    assert time.process_time() - started < 15
    for prompt, row, response in zip(
        prompts[::67], encoded[::67], encode_responses(prompts[::67], tokenizer), strict=True
    ):
        turns = [{"role": "user", "content": prompt.text}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        turns.append({"role": "assistant", "content": (prompt.completion or "").strip()})
        told = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert list(row.ids) == asked == list(response.prompt_ids)
        assert [*response.prompt_ids, *response.response_ids] == told[: response.length]
        assert tokenizer.decode(told[response.length :]) == "\n"
