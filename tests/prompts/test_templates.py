"""Token-exactness: ids are the tokenizer's own, answers begin where prompts end, and trouble is said aloud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from limbeck.prompts.templates import (
    encode_prompts,
    encode_responses,
    end_token_ids,
    resolve_template,
)
from limbeck.types import LimbeckError, Message, Prompt
from tests.prompts.chat_templates import (
    CHATML,
    CHATML_SYSTEM,
    GEMMA,
    LLAMA2,
    NO_END,
    THINK_WHEN_ASKING,
    THINK_WHEN_TELLING,
)
from tests.prompts.conftest import CONTROL, MakeTokenizer

QUESTION = "What is the capital of France?"
ANSWER = "The capital is Paris."
ASKED = Prompt(id="p", text=QUESTION, completion=ANSWER, split="heldout")

# family: template, eos token, the prompt as text, the answer as text up to its end token.
GOLDEN = {
    "chatml": (
        CHATML,
        "<|im_end|>",
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"{ANSWER}<|im_end|>",
    ),
    "chatml_system": (
        CHATML_SYSTEM,
        "<|im_end|>",
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        f"{ANSWER}<|im_end|>",
    ),
    "llama2": (LLAMA2, "</s>", f"<s>[INST] {QUESTION} [/INST]", f" {ANSWER} </s>"),
    "gemma": (
        GEMMA,
        "</s>",
        f"<s><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        f"{ANSWER}<end_of_turn>",
    ),
}


def own_ids(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, ask: bool) -> list[int]:
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=ask, tokenize=True, return_dict=False)
    assert isinstance(ids, list)
    return [int(token) for token in ids]  # type: ignore[arg-type]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids))
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("family", GOLDEN)
def test_prompt_and_answer_are_the_golden_text(family: str, make_tokenizer: MakeTokenizer) -> None:
    template, eos, prompt_text, answer_text = GOLDEN[family]
    tokenizer = make_tokenizer(template, eos=eos)
    prompt = encode_prompts([ASKED], tokenizer, "chat")[0]
    response = encode_responses([ASKED], tokenizer, "chat")[0]

    assert text_of(tokenizer, prompt.ids) == prompt_text
    assert text_of(tokenizer, response.response_ids) == answer_text
    assert response.prompt_ids == prompt.ids
    assert (response.stop, response.author, response.sampling) == ("eos", "data", None)
    assert (prompt.id, prompt.split, response.prompt_id, response.split) == ("p", "heldout", "p", "heldout")


@pytest.mark.parametrize("family", GOLDEN)
def test_ids_are_those_of_the_tokenizer(family: str, make_tokenizer: MakeTokenizer) -> None:
    template, eos, _, answer_text = GOLDEN[family]
    tokenizer = make_tokenizer(template, eos=eos)
    turns = [{"role": "user", "content": QUESTION}]
    asked = own_ids(tokenizer, turns, ask=True)
    told = own_ids(tokenizer, [*turns, {"role": "assistant", "content": ANSWER}], ask=False)
    response = encode_responses([ASKED], tokenizer, "chat")[0]

    assert list(response.prompt_ids) == asked
    whole = [*response.prompt_ids, *response.response_ids]
    assert whole == told[: len(whole)]
    assert text_of(tokenizer, told[len(whole) :]).strip() == ""
    end = answer_text.rsplit(" ", 1)[-1].removeprefix("Paris.")
    assert response.response_ids[-1] == tokenizer.convert_tokens_to_ids(end)


ROLE_SETS = {"chatml": True, "chatml_system": True, "llama2": False, "gemma": False}
TEXT = st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip()) and "<" not in text
)


@pytest.mark.parametrize("family", GOLDEN)
@given(texts=st.lists(TEXT, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2 == 1), system=st.none() | TEXT)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_conversation_equals_apply_chat_template(
    family: str, make_tokenizer: MakeTokenizer, texts: list[str], system: str | None
) -> None:
    template, eos, _, _ = GOLDEN[family]
    tokenizer = make_tokenizer(template, eos=eos)
    roles = ["user", "assistant"] * len(texts)
    turns = [Message(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
    if system is not None and ROLE_SETS[family]:
        turns.insert(0, Message(role="system", content=system))
    expected = own_ids(tokenizer, [{"role": turn.role, "content": turn.content} for turn in turns], ask=True)
    assert list(encode_prompts([Prompt(id="p", messages=tuple(turns))], tokenizer, "chat")[0].ids) == expected


def test_a_batch_equals_its_rows(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    prompts = [Prompt(id=str(n), text="a " * n + QUESTION, completion=ANSWER * (n + 1)) for n in range(9)]
    assert encode_prompts(prompts, tokenizer) == [encode_prompts([prompt], tokenizer)[0] for prompt in prompts]
    assert encode_responses(prompts, tokenizer) == [encode_responses([prompt], tokenizer)[0] for prompt in prompts]
    assert encode_prompts([], tokenizer) == []


def test_white_space_around_an_answer_is_dropped_not_merged(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    loose = Prompt(id="p", text=QUESTION, completion=f"\n\n  {ANSWER}\n")
    assert encode_responses([loose], tokenizer)[0].response_ids == encode_responses([ASKED], tokenizer)[0].response_ids


def test_long_answers_are_cut_and_say_so(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    whole = encode_responses([ASKED], tokenizer)[0].response_ids
    (cut,) = encode_responses([ASKED], tokenizer, max_new_tokens=3)
    assert (cut.response_ids, cut.stop) == (whole[:3], "length")
    (kept,) = encode_responses([ASKED], tokenizer, max_new_tokens=len(whole))
    assert (kept.response_ids, kept.stop) == (whole, "eos")


def test_a_thought_opened_by_the_question_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(THINK_WHEN_ASKING, eos="<|im_end|>")
    assert text_of(tokenizer, encode_prompts([ASKED], tokenizer)[0].ids).endswith("<think>\n")
    with pytest.raises(LimbeckError, match=r"does not begin its own conversation .*<think>.*chat_options"):
        encode_responses([ASKED], tokenizer)


def test_a_thought_written_into_the_answer_is_refused_unless_turned_off(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(THINK_WHEN_TELLING, eos="<|im_end|>")
    with pytest.raises(LimbeckError, match=r"changes the answer .*think.*chat_options"):
        encode_responses([ASKED], tokenizer)
    (response,) = encode_responses([ASKED], tokenizer, chat_options={"enable_thinking": False})
    assert text_of(tokenizer, response.response_ids) == f"{ANSWER}<|im_end|>"
    assert text_of(tokenizer, response.prompt_ids).endswith("</think>\n\n")


def test_a_template_without_an_end_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(LimbeckError, match="no special token"):
        encode_responses([ASKED], make_tokenizer(NO_END))


def test_an_answer_that_merges_with_the_prompt_is_refused(make_tokenizer: MakeTokenizer) -> None:
    glued = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant'").replace(
        "message['role'] + '\n'", "message['role']"
    )
    tokenizer = make_tokenizer(glued, eos="<|im_end|>")
    answer = Prompt(id="p", text=QUESTION, completion="s of the model")
    tokenizer.add_tokens(["tants"])
    with pytest.raises(LimbeckError, match="merges the end of the prompt"):
        encode_responses([answer], tokenizer)


def test_a_refusal_of_the_template_is_passed_on(make_tokenizer: MakeTokenizer) -> None:
    turns = (Message(role="system", content="Be brief."), Message(role="user", content=QUESTION))
    with pytest.raises(LimbeckError, match=r"prompt p \(.*refuses the turns system, user \(System role not support"):
        encode_prompts([Prompt(id="p", messages=turns)], make_tokenizer(GEMMA))


def test_no_completion_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(
        LimbeckError,
        match=r"prompt p \('What is the capital of France\?'\) has no completion; .*responses\.source=teacher",
    ):
        encode_responses([Prompt(id="p", text=QUESTION)], make_tokenizer(CHATML))


def test_control_tokens_in_text_are_refused_or_parsed_as_the_tokenizer_does(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    spelled = "How do I use <filename> in a shell?"
    prompt = Prompt(id="p", text=spelled, completion=ANSWER)
    with pytest.raises(LimbeckError, match=r"prompt p \('How do I use <filename> .*parse"):
        encode_prompts([prompt], tokenizer)
    (parsed,) = encode_prompts([prompt], tokenizer, control_tokens="parse")
    expected = own_ids(tokenizer, [{"role": "user", "content": spelled}], ask=True)
    assert list(parsed.ids) == expected
    assert tokenizer.convert_tokens_to_ids("<filename>") in parsed.ids


def test_control_tokens_in_an_answer_matter_only_to_answers(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    prompt = Prompt(id="p", text=QUESTION, completion="It ends<|im_end|> here.")
    assert encode_prompts([prompt], tokenizer)[0].ids
    with pytest.raises(LimbeckError, match=r"control token <\|im_end\|>"):
        encode_responses([prompt], tokenizer)
    (parsed,) = encode_responses([prompt], tokenizer, control_tokens="parse")
    assert text_of(tokenizer, parsed.response_ids) == "It ends<|im_end|> here.<|im_end|>"


def test_end_tokens_hold_both_ends(make_tokenizer: MakeTokenizer) -> None:
    gemma = make_tokenizer(GEMMA)
    end_of_sequence, end_of_turn = CONTROL.index("</s>"), CONTROL.index("<end_of_turn>")
    assert end_token_ids(gemma, "chat") == (end_of_sequence, end_of_turn)
    assert end_token_ids(gemma, "alpaca") == (end_of_sequence,)


INSTRUCTION = Prompt(
    id="p", text=f"{QUESTION}\n\nAnswer in French.", instruction=(QUESTION, "Answer in French."), completion=ANSWER
)
TURN = Prompt(id="m", messages=(Message(role="user", content=QUESTION),), completion=ANSWER)


def test_auto_is_resolved_by_tokenizer_and_prompts(make_tokenizer: MakeTokenizer) -> None:
    chat, base = make_tokenizer(CHATML), make_tokenizer()
    assert resolve_template("auto", chat, [ASKED, INSTRUCTION]) == "chat"
    assert resolve_template("auto", base, [INSTRUCTION, TURN]) == "alpaca"
    assert resolve_template("auto", base, [INSTRUCTION, ASKED]) == "plain"
    for name in ("chat", "plain", "alpaca"):
        assert resolve_template(name, chat, [ASKED]) == name
    with pytest.raises(LimbeckError, match="tiny has no chat template"):
        resolve_template("chat", base, [ASKED])
    with pytest.raises(LimbeckError, match="template is 'chatml', expected auto, chat, plain or alpaca"):
        resolve_template("chatml", chat, [ASKED])


def test_alpaca_wording_is_the_one_of_minillm(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    with_input = text_of(tokenizer, encode_prompts([INSTRUCTION], tokenizer, "alpaca")[0].ids)
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{QUESTION}\n\n### Input:\nAnswer in French.\n\n### Response:\n"
    )
    for prompt in (ASKED, TURN):
        assert text_of(tokenizer, encode_prompts([prompt], tokenizer, "alpaca")[0].ids) == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{QUESTION}\n\n### Response:\n"
        )


def test_plain_is_the_text_as_it_stands(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    raw = Prompt(id="p", text="  def f():\n", completion="    return 1\n")
    response = encode_responses([raw], tokenizer, "plain")[0]
    assert text_of(tokenizer, response.prompt_ids) == "  def f():\n"
    assert text_of(tokenizer, response.response_ids) == "    return 1\n</s>"
    assert list(response.prompt_ids) == tokenizer("  def f():\n")["input_ids"]


def test_conversations_without_a_chat_template_are_refused(make_tokenizer: MakeTokenizer) -> None:
    turns = (Message(role="system", content="Be brief."), Message(role="user", content=QUESTION))
    for template in ("plain", "alpaca"):
        with pytest.raises(LimbeckError, match=r"prompt p \(.* has the turns system, user"):
            encode_prompts([Prompt(id="p", messages=turns)], make_tokenizer(), template)


def test_a_tokenizer_that_ends_every_text_is_refused(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    with pytest.raises(LimbeckError, match="ends every text with </s>"):
        encode_prompts([ASKED], tokenizer, "plain")


def test_the_tokenizers_own_beginning_is_kept_outside_chat(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    response = encode_responses([ASKED], tokenizer, "plain")[0]
    assert response.prompt_ids[0] == 0
    assert 0 not in response.response_ids


def test_a_chat_template_that_begins_the_text_is_not_begun_twice(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(GEMMA)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ids = encode_prompts([ASKED], tokenizer)[0].ids
    assert ids[0] == 0 and ids.count(0) == 1


def test_chat_options_need_a_chat_template(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(LimbeckError, match="chat_options are for the chat template"):
        encode_prompts([ASKED], make_tokenizer(), "plain", chat_options={"enable_thinking": False})


def test_unknown_control_policy_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(LimbeckError, match="control_tokens is 'keep', expected error or parse"):
        encode_prompts([ASKED], make_tokenizer(), control_tokens="keep")  # type: ignore[arg-type]


@pytest.mark.real
def test_smollm2_ids_are_its_own(smollm2_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    response = encode_responses([ASKED], tokenizer)[0]
    turns = [{"role": "user", "content": QUESTION}]
    assert list(response.prompt_ids) == own_ids(tokenizer, turns, ask=True)
    assert text_of(tokenizer, response.prompt_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert response.response_ids == GOLDEN_SMOLLM2_ANSWER
    assert response.response_ids[-1] == tokenizer.eos_token_id
    assert end_token_ids(tokenizer, "chat") == (tokenizer.eos_token_id,)


# Read off SmolLM2's tokenizer: The, capital, is, Paris, ., <|im_end|>.
GOLDEN_SMOLLM2_ANSWER = (504, 3575, 314, 7042, 30, 2)
