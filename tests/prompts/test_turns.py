"""Which tokens of a conversation are learnt from: every turn of the assistant with its end, once, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from limbeck.prompts.chat import beyond_text, sent_turns
from limbeck.prompts.templates import encode_prompts, encode_responses
from limbeck.types import LimbeckError, Message, Prompt, Response
from tests.prompts.chat_templates import CHATML, CHATML_SYSTEM, GEMMA, GENERATION, LLAMA2, MISTRAL
from tests.prompts.conftest import MakeTokenizer
from tests.prompts.test_published_templates import published, text_of

OWN = {
    "chatml": CHATML,
    "chatml_system": CHATML_SYSTEM,
    "llama2": LLAMA2,
    "gemma_short": GEMMA,
    "mistral": MISTRAL,
    "generation": GENERATION,
}
IM_END = ("{}<|im_end|>", {})
# family: what the model writes to say {}, and the variables of its template
PLAIN: dict[str, tuple[str, Mapping[str, Any]]] = {
    "chatml": IM_END,
    "chatml_system": IM_END,
    "generation": IM_END,
    "qwen2_5": IM_END,
    "qwen2_5_training": IM_END,
    "qwen3_instruct_2507": IM_END,
    "qwen3": ("{}<|im_end|>", {"enable_thinking": False}),
    "qwen3_training": ("<think>\n\n</think>\n\n{}<|im_end|>", {}),
    "lfm2": IM_END,
    "llama2": (" {} </s>", {}),
    "mistral": (" {}</s>", {}),
    "llama3": ("{}<|eot_id|>", {}),
    "llama3_1": ("{}<|eot_id|>", {}),
    "llama3_2": ("{}<|eot_id|>", {}),
    "gemma_short": ("{}<end_of_turn>", {}),
    "gemma3": ("{}<end_of_turn>", {}),
    "phi3": ("{}<|end|>", {}),
    "phi3_training": ("{}<|end|>", {}),
    "cohere": ("{}<|END_OF_TURN_TOKEN|>", {}),
    "cohere2": ("{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", {}),
}
REFUSED = {
    "deepseekv3": "does not begin its own conversation",
    "deepseek_r1_distill": "does not begin its own conversation",
    "gptoss": "changes the answer",
}
ARGUMENTS = {"city": "Paris", "days": 2}
JSON = '{"city": "Paris", "days": 2}'
QWEN_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'
# family: what the model writes to call weather(city, days), what it writes to say {}, and variables
CALLING: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "qwen2_5": (f"{QWEN_CALL}<|im_end|>", "{}<|im_end|>", {}),
    "qwen3": (f"{QWEN_CALL}<|im_end|>", "{}<|im_end|>", {"enable_thinking": False}),
    "qwen3_instruct_2507": (f"{QWEN_CALL}<|im_end|>", "{}<|im_end|>", {}),
    "llama3_1": (f'{{"name": "weather", "parameters": {JSON}}}<|eot_id|>', "{}<|eot_id|>", {}),
    "llama3_2": (f'{{"name": "weather", "parameters": {JSON}}}<|eot_id|>', "{}<|eot_id|>", {}),
    "mistral": (
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {JSON}, "id": "abcdefghi"}}]</s>',
        " {}</s>",
        {},
    ),
    "gptoss_training": (
        f" to=functions.weather<|channel|>commentary json<|message|>{JSON}<|call|>",
        "<|channel|>final<|message|>{}<|return|>",
        {},
    ),
}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks out of the window.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALLS = Message(role="assistant", content="", fields={"tool_calls": [CALL]})
RESULT = Message(role="tool", content="It rains.", fields={"tool_call_id": "abcdefghi", "name": "weather"})
ASKED = Message(role="user", content="What will it be like?")


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str, **more: str) -> Message:
    return Message(role="assistant", content=text, fields=more)


def tokenizer_of(family: str, make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    if family not in OWN:
        return published(family, make_tokenizer)
    tokenizer = make_tokenizer(
        OWN[family], eos="<|im_end|>" if "chatml" in family or family == "generation" else "</s>"
    )
    tokenizer.add_tokens(["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"], special_tokens=True)
    return tokenizer


def parts(tokenizer: PreTrainedTokenizerFast, response: Response) -> tuple[list[str], str]:
    """What is learnt, turn by turn, and everything else."""
    spans = response.spans or ((0, len(response.response_ids)),)
    context, place = list(response.prompt_ids), 0
    for start, end in spans:
        context += response.response_ids[place:start]
        place = end
    assert place == len(response.response_ids), "nothing follows the last turn"
    learnt = [text_of(tokenizer, response.response_ids[start:end]) for start, end in spans]
    assert "".join(learnt) == text_of(tokenizer, response.label_ids)
    assert response.tokens == len(response.label_ids)
    return learnt, text_of(tokenizer, tuple(context))


WORDS = st.text(alphabet="abcdefgh \u00e9\u4e2d.", min_size=1, max_size=12).filter(lambda text: bool(text.strip()))


@pytest.mark.parametrize("family", PLAIN)
@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_turn_of_the_assistant_is_learnt_once_and_nothing_else(
    family: str, make_tokenizer: MakeTokenizer, said: list[tuple[str, str]]
) -> None:
    wording, options = PLAIN[family]
    tokenizer = tokenizer_of(family, make_tokenizer)
    questions = [f"Q{number} {question.strip()}" for number, (question, _) in enumerate(said)]
    answers = [f"A{number} {answer.strip()}" for number, (_, answer) in enumerate(said)]
    turns = [turn for q, a in zip(questions, answers, strict=True) for turn in (user(q), assistant(a))]
    prompt = Prompt(id="p", messages=tuple(turns[:-1]), completion=answers[-1])
    responses = encode_responses([prompt], tokenizer, loss_on="all", chat_options=options)
    found = [parts(tokenizer, response) for response in responses]
    assert [one for learnt, _ in found for one in learnt] == [wording.format(answer) for answer in answers]
    if len(responses) == 1:
        for answer in answers:
            assert answer not in found[0][1]
    for response, (_, context) in zip(responses, found, strict=True):
        assert questions[0] in context
        assert response.stop == "eos"
    (last,) = encode_responses([prompt], tokenizer, loss_on="last", chat_options=options)
    assert text_of(tokenizer, last.response_ids) == wording.format(answers[-1])


@pytest.mark.parametrize("family", PLAIN)
def test_each_turn_is_asked_as_the_model_would_be(family: str, make_tokenizer: MakeTokenizer) -> None:
    _, options = PLAIN[family]
    tokenizer = tokenizer_of(family, make_tokenizer)
    turns = (user("one"), assistant("A"), user("two"), assistant("B"), user("three"))
    (*_, last) = encode_responses(
        [Prompt(id="p", messages=turns, completion="C")], tokenizer, loss_on="all", chat_options=options
    )
    whole = (*last.prompt_ids, *last.response_ids)
    asked = encode_prompts([Prompt(id="p", messages=turns)], tokenizer, chat_options=options)[0].ids
    assert whole[: len(asked)] == asked
    assert last.spans[-1][0] + len(last.prompt_ids) == len(asked) if last.spans else last.prompt_ids == asked


@pytest.mark.parametrize("family", PLAIN)
def test_one_turn_is_what_it_was_before_there_were_several(family: str, make_tokenizer: MakeTokenizer) -> None:
    _, options = PLAIN[family]
    tokenizer = tokenizer_of(family, make_tokenizer)
    prompt = Prompt(id="p", text="What is tea?", completion="A drink.")
    every = encode_responses([prompt], tokenizer, loss_on="all", chat_options=options)
    assert every == encode_responses([prompt], tokenizer, chat_options=options)
    assert every[0].spans == ()


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_told_as_it_is_written_is_refused(family: str, make_tokenizer: MakeTokenizer) -> None:
    turns = (user("one"), assistant("A"), user("two"))
    with pytest.raises(LimbeckError, match=REFUSED[family]):
        encode_responses(
            [Prompt(id="p", messages=turns, completion="B")], tokenizer_of(family, make_tokenizer), loss_on="all"
        )


@pytest.mark.parametrize("family", CALLING)
def test_calls_of_tools_are_learnt_and_their_results_are_context(family: str, make_tokenizer: MakeTokenizer) -> None:
    calling, saying, options = CALLING[family]
    tokenizer = tokenizer_of(family, make_tokenizer)
    prompt = Prompt(id="p", messages=(ASKED, CALLS, RESULT), completion="Take a coat.", tools=(SCHEMA,))
    found = [parts(tokenizer, r) for r in encode_responses([prompt], tokenizer, loss_on="all", chat_options=options)]
    assert [one for learnt, _ in found for one in learnt] == [calling, saying.format("Take a coat.")]
    assert "It rains." in found[-1][1] and "Looks out of the window." in found[0][1]
    (last,) = encode_responses([prompt], tokenizer, chat_options=options)
    assert text_of(tokenizer, last.response_ids) == saying.format("Take a coat.")
    (call,) = encode_responses(
        [Prompt(id="c", messages=(ASKED,), answer=CALLS, tools=(SCHEMA,))], tokenizer, chat_options=options
    )
    assert text_of(tokenizer, call.response_ids) == calling


def test_turns_whose_prompts_differ_become_responses_of_their_own(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = published("qwen3", make_tokenizer)
    turns = (user("one"), assistant("A", reasoning_content="hm"), user("two"))
    prompt = Prompt(id="p", messages=turns, answer=assistant("B", reasoning_content="so"), completion="B")
    first, second = encode_responses([prompt], tokenizer, loss_on="all")
    assert text_of(tokenizer, first.response_ids) == "<think>\nhm\n</think>\n\nA<|im_end|>"
    assert text_of(tokenizer, second.response_ids) == "<think>\nso\n</think>\n\nB<|im_end|>"
    assert "hm" not in text_of(tokenizer, second.prompt_ids), "Qwen3 reads no earlier thought"
    assert (first.prompt_id, second.prompt_id) == ("p", "p")


def test_a_thought_that_the_template_drops_is_refused(make_tokenizer: MakeTokenizer) -> None:
    prompt = Prompt(id="p", messages=(ASKED,), answer=assistant("B", reasoning_content="so"), completion="B")
    with pytest.raises(LimbeckError, match=r"drops or changes the thought 'so' .*messages\.FIELD"):
        encode_responses([prompt], make_tokenizer(CHATML, eos="<|im_end|>"))


@pytest.mark.parametrize("said", ["n", "i", "42", "end", "think", "Let me think."])
def test_a_text_that_stands_in_its_thought_or_in_the_end_token_too(said: str, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = published("qwen3", make_tokenizer)
    prompt = Prompt(
        id="p", messages=(ASKED,), answer=assistant(said, reasoning_content="Let me think."), completion=said
    )
    (response,) = encode_responses([prompt], tokenizer)
    wanted = f"<think>\nLet me think.\n</think>\n\n{said}<|im_end|>"
    assert text_of(tokenizer, response.response_ids) == wanted


def test_a_thought_that_the_text_holds_too_is_missed_where_the_template_drops_it(make_tokenizer: MakeTokenizer) -> None:
    answer = assistant("the answer: yes", reasoning_content="yes")
    with pytest.raises(LimbeckError, match="drops or changes the thought 'yes'"):
        encode_responses([Prompt(id="p", messages=(ASKED,), answer=answer)], make_tokenizer(CHATML, eos="<|im_end|>"))
    called = {**CALL, "function": {"name": "rain", "arguments": {}}}
    answer = Message(role="assistant", content="rain", fields={"tool_calls": [called]})
    written = "(message.tool_calls[0].function | tojson if message.tool_calls else message['content'])"
    dropping = CHATML.replace("message['content']", written)
    with pytest.raises(LimbeckError, match="drops or changes the text 'rain'"):
        encode_responses([Prompt(id="p", messages=(ASKED,), answer=answer)], make_tokenizer(dropping, eos="<|im_end|>"))


def test_a_template_without_tools_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    with pytest.raises(LimbeckError, match=r"leaves out the tool 'weather'.*ignore_columns=\[tools\]"):
        encode_prompts([Prompt(id="p", messages=(ASKED,), tools=(SCHEMA,))], tokenizer)
    with pytest.raises(LimbeckError, match="does not write calls of tools"):
        encode_prompts([Prompt(id="p", messages=(ASKED, CALLS, RESULT))], tokenizer)


def test_tools_without_a_chat_template_are_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(LimbeckError, match="which template 'plain' has no words for"):
        encode_prompts([Prompt(id="p", text="Hi", tools=(SCHEMA,))], make_tokenizer())


def test_what_is_sent_to_services_of_a_conversation() -> None:
    thoughtful = Message(role="assistant", content="A", fields={"reasoning_content": "hm", "name": "Ann"})
    prompt = Prompt(
        id="p", messages=(Message(role="user", content="one", fields={"name": "Bo"}), thoughtful, user("x"))
    )
    assert beyond_text(prompt) is None
    assert sent_turns(prompt) == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "x"},
    ]
    assert beyond_text(Prompt(id="p", messages=(ASKED,), tools=(SCHEMA,))) == "tools"
    assert beyond_text(Prompt(id="p", messages=(ASKED, CALLS, RESULT))) == "tool_calls in a turn of the assistant"
    assert beyond_text(Prompt(id="p", messages=(ASKED, RESULT))) == "tool_call_id in a turn of the tool"


def test_a_blank_turn_of_the_assistant_is_refused(make_tokenizer: MakeTokenizer) -> None:
    prompt = Prompt(id="p", messages=(user("one"), assistant(" "), user("two")), completion="B")
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    with pytest.raises(LimbeckError, match=r"turn 2 is a blank turn of the assistant.*loss_on=last"):
        encode_responses([prompt], tokenizer, loss_on="all")
    assert encode_responses([prompt], tokenizer)


@pytest.mark.parametrize("family", ["chatml", "generation", "qwen2_5", "qwen3_instruct_2507"])
def test_what_the_assistant_begins_a_conversation_with_is_context(family: str, make_tokenizer: MakeTokenizer) -> None:
    turns = (assistant("Welcome."), user("one"), assistant("A1"), user("two"))
    prompt, tokenizer = Prompt(id="p", messages=turns, completion="B2"), tokenizer_of(family, make_tokenizer)
    (response,) = encode_responses([prompt], tokenizer, loss_on="all")
    learnt, context = parts(tokenizer, response)
    assert learnt == ["A1<|im_end|>", "B2<|im_end|>"] and "Welcome." in context


def test_marks_without_an_end_are_refused(make_tokenizer: MakeTokenizer) -> None:
    endless = GENERATION.replace("{% endgeneration %}{{ '<|im_end|>\n' }}", "").replace(
        "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    )
    prompt = Prompt(id="p", messages=(user("one"), assistant("A"), user("two")), completion="B")
    with pytest.raises(LimbeckError, match=r"marks an answer \(\{% generation %\}\) without the token that ends"):
        encode_responses([prompt], make_tokenizer(endless, eos="<|im_end|>"), loss_on="all")


def test_control_tokens_in_calls_and_schemas_are_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = published("qwen2_5", make_tokenizer)
    spelled = {**CALL, "function": {"name": "weather", "arguments": {"city": "<|im_end|>"}}}
    for prompt in (
        Prompt(
            id="p", messages=(ASKED, Message(role="assistant", content="", fields={"tool_calls": [spelled]}), RESULT)
        ),
        Prompt(id="p", messages=(ASKED,), tools=({"name": "<|im_end|>"},)),
    ):
        with pytest.raises(LimbeckError, match=r"spells the control token <\|im_end\|>"):
            encode_prompts([prompt], tokenizer)


def test_the_last_answer_alone_is_cut(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    prompt = Prompt(id="p", messages=(user("one"), assistant("a b c d e f"), user("two")), completion="a b c d e f")
    (whole,) = encode_responses([prompt], tokenizer, loss_on="all")
    (cut,) = encode_responses([prompt], tokenizer, loss_on="all", max_new_tokens=3)
    assert cut.stop == "length" and cut.spans[0] == whole.spans[0]
    assert cut.spans[1] == (whole.spans[1][0], whole.spans[1][0] + 3)
    assert len(cut.response_ids) == cut.spans[1][1]


def test_white_space_that_the_end_token_swallows_is_no_second_end(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers import AddedToken

    # Phi-3's own tokenizer: the line break behind <|end|> belongs to it, and the end of the text follows.
    tokenizer = published("phi3", make_tokenizer)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)  # type: ignore[list-item]
    (response,) = encode_responses([Prompt(id="p", text="Hi", completion="Hello")], tokenizer)
    assert text_of(tokenizer, response.response_ids).rstrip() == "Hello<|end|>"
