"""The chat templates of published models, as TRL ships them: what each makes of the same short conversation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from limbeck.prompts.templates import encode_prompts, encode_responses, end_token_ids
from limbeck.types import LimbeckError, Prompt
from tests.prompts.conftest import MakeTokenizer

ASKED = Prompt(id="p", text=" What is 2 + 2?\n", completion="\nIt is 4. ")
CONTROL_TOKEN = re.compile(r"<\|[A-Za-z_]+\|>|<[a-z_]+\|>|<\|[a-z_]+>|<[a-z]+_of_turn>|<\uff5c[^>\uff5c]*\uff5c>")

# family: the end of the prompt, the answer, and the tokens that end one, the tokenizer's own </s> apart
EXTENDING = {
    "qwen2_5": ("<|im_start|>assistant\n", "It is 4.<|im_end|>", ["<|im_end|>"]),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "It is 4.<|eot_id|>", ["<|eot_id|>"]),
    "gemma3": ("<start_of_turn>model\n", "It is 4.<end_of_turn>", ["<end_of_turn>"]),
    "phi3": ("<|end|>\n<|assistant|>\n", "It is 4.<|end|>", ["<|end|>"]),
    "cohere2": ("<|START_RESPONSE|>", "It is 4.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", ["<|END_OF_TURN_TOKEN|>"]),
}
THINKING = {
    "qwen3": "changes the answer",
    "deepseek_r1_distill": "does not begin its own",
    "gptoss": "changes the answer",
}
ENDS = {
    "qwen3": ["<|im_end|>"],
    "deepseek_r1_distill": ["<\uff5cend\u2581of\u2581sentence\uff5c>"],
    "gptoss": ["<|return|>"],
}


def published(name: str, make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("trl")
    path = Path(str(spec.origin)).parent / "chat_templates" / f"{name}.jinja" if spec else None
    if path is None or not path.is_file():
        pytest.skip(f"this TRL ships no template {name}")
    source = path.read_text("utf-8")
    tokenizer = make_tokenizer(source)
    tokenizer.add_tokens(sorted(set(CONTROL_TOKEN.findall(source))), special_tokens=True)
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids)))


@pytest.mark.parametrize("name", EXTENDING)
def test_prompt_answer_and_end(name: str, make_tokenizer: MakeTokenizer) -> None:
    opening, answer, ends = EXTENDING[name]
    tokenizer = published(name, make_tokenizer)
    response = encode_responses([ASKED], tokenizer)[0]
    assert text_of(tokenizer, response.prompt_ids).endswith(opening)
    assert text_of(tokenizer, response.response_ids) == answer
    assert tokenizer.convert_ids_to_tokens(list(end_token_ids(tokenizer, "chat"))) == ["</s>", *ends]


@pytest.mark.parametrize("name", THINKING)
def test_thinking_templates_ask_and_end_but_do_not_tell(name: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = published(name, make_tokenizer)
    assert "What is 2 + 2?" in text_of(tokenizer, encode_prompts([ASKED], tokenizer)[0].ids)
    assert tokenizer.convert_ids_to_tokens(list(end_token_ids(tokenizer, "chat"))) == ["</s>", *ENDS[name]]
    with pytest.raises(LimbeckError, match=THINKING[name]):
        encode_responses([ASKED], tokenizer)


def test_qwen3_tells_once_thinking_is_off(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = published("qwen3", make_tokenizer)
    (response,) = encode_responses([ASKED], tokenizer, chat_options={"enable_thinking": False})
    assert text_of(tokenizer, response.response_ids) == "It is 4.<|im_end|>"


def test_templates_of_vision_models_are_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = published("smolvlm", make_tokenizer)
    with pytest.raises(LimbeckError, match=r"prompt p \(.* drops or changes the user's text 'What is 2 \+ 2\?'"):
        encode_prompts([ASKED], tokenizer)
    with pytest.raises(LimbeckError, match="drops an assistant's text"):
        end_token_ids(tokenizer, "chat")
