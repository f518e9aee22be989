"""Every format by its fields, and what a row of it may not be."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.prompts.formats import Example, family_of, read_row
from limbeck.types import LimbeckError, Message

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
ASSISTANT = {"role": "assistant", "content": "Hello"}
HI = (Message(role="user", content="Hi"),)


def read(row: dict[str, Any]) -> list[Example]:
    return read_row(row, family_of(row, "here"), "here")


GOOD: dict[str, tuple[dict[str, Any], Example]] = {
    "prompt": ({"prompt": " Hi", "extra": 1}, Example(text=" Hi")),
    "prompt_category": ({"prompt": "Hi", "category": "chat"}, Example(text="Hi", category="chat")),
    "prompt_completion": ({"prompt": "Hi", "completion": " Hello"}, Example(text="Hi", completion=" Hello")),
    "prompt_completion_beside_messages": (
        {"prompt": "Hi", "completion": "Hello", "messages": [USER], "instruction": "x"},
        Example(text="Hi", completion="Hello"),
    ),
    "prompt_blank_completion": ({"prompt": "Hi", "completion": " "}, Example(text="Hi")),
    "prompt_turns": ({"prompt": [USER]}, Example(messages=HI)),
    "prompt_turns_completion": (
        {"prompt": [USER], "completion": [ASSISTANT]},
        Example(messages=HI, completion="Hello"),
    ),
    "prompt_turns_completion_text": (
        {"prompt": [USER], "completion": "Hello"},
        Example(messages=HI, completion="Hello"),
    ),
    "messages_asking": ({"messages": [USER]}, Example(messages=HI)),
    "messages": (
        {"messages": [SYSTEM, USER, ASSISTANT], "prompt": "Hi", "category": 7},
        Example(messages=(Message(role="system", content="Be kind."), *HI), completion="Hello", category="7"),
    ),
    "messages_many_turns": (
        {"messages": [USER, ASSISTANT, USER, {"role": "assistant", "content": "Again"}]},
        Example(messages=(*HI, Message(role="assistant", content="Hello"), *HI), completion="Again"),
    ),
    "sharegpt": (
        {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Example(messages=HI, completion="Hello"),
    ),
    "sharegpt_system_asking": (
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}]},
        Example(messages=(Message(role="system", content="Be kind."), *HI)),
    ),
    "conversations_in_openai_words": ({"conversations": [USER, ASSISTANT]}, Example(messages=HI, completion="Hello")),
    "alpaca": (
        {"instruction": "Add", "input": "2, 3", "output": "5", "prompt": "worded"},
        Example(text="Add\n\n2, 3", instruction=("Add", "2, 3"), completion="5"),
    ),
    "alpaca_bare": ({"instruction": "Add"}, Example(text="Add", instruction=("Add", ""))),
    "alpaca_blank_input": (
        {"instruction": "Add", "input": "", "output": "5"},
        Example(text="Add", instruction=("Add", ""), completion="5"),
    ),
    "gpteacher": (
        {"instruction": "Add", "input": "2", "response": "2"},
        Example(text="Add\n\n2", instruction=("Add", "2"), completion="2"),
    ),
    "dolly": (
        {"instruction": "Add", "context": "2, 3", "response": "5", "category": "closed_qa"},
        Example(text="Add\n\n2, 3", instruction=("Add", "2, 3"), completion="5", category="closed_qa"),
    ),
    "gsm8k": (
        {"question": "2 + 3?", "answer": "#### 5"},
        Example(text="2 + 3?", instruction=("2 + 3?", ""), completion="#### 5"),
    ),
    "math": (
        {"problem": "2 + 3?", "solution": "It is 5.", "answer": "5", "level": 1},
        Example(text="2 + 3?", instruction=("2 + 3?", ""), completion="It is 5."),
    ),
    "several_outputs": (
        {"instruction": "Add", "output": ["5", " ", "five"]},
        Example(text="Add", instruction=("Add", ""), completion="5", references=("5", "five")),
    ),
    "a_list_of_one": (
        {"instruction": "Add", "output": ["5"], "response": "6"},
        Example(text="Add", instruction=("Add", ""), completion="5"),
    ),
    "no_outputs": (
        {"instruction": "Add", "output": [], "response": "5"},
        Example(text="Add", instruction=("Add", ""), completion="5"),
    ),
    "several_answers": (
        {"question": "2 + 3?", "answer": ["5", "five"]},
        Example(text="2 + 3?", instruction=("2 + 3?", ""), completion="5", references=("5", "five")),
    ),
    "several_completions": (
        {"prompt": [USER], "completion": ["Hello", "Good day"]},
        Example(messages=HI, completion="Hello", references=("Hello", "Good day")),
    ),
    "evol": ({"prompt": "Hi", "generated_text": "Hello"}, Example(text="Hi")),
}


@pytest.mark.parametrize("name", GOOD)
def test_row_is_read(name: str) -> None:
    row, expected = GOOD[name]
    assert read(row) == [expected]


def test_self_instruct_gives_one_example_an_instance() -> None:
    row = {"instruction": "Add", "instances": [{"input": "2", "output": "2"}, {"input": "", "output": "0"}]}
    assert [(one.text, one.completion) for one in read(row)] == [("Add\n\n2", "2"), ("Add", "0")]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no_format": ({"text": "x", "title": None}, "got the fields text, expected one of the formats"),
    "blank_instruction": ({"instruction": "\t", "output": "x"}, "got a blank 'instruction'"),
    "blank_question": ({"question": "", "answer": "x"}, "got a blank 'question'"),
    "number": ({"instruction": "x", "input": 3}, "expected text in 'input', got int"),
    "two_inputs": ({"instruction": "x", "input": "a", "context": "b"}, "got both 'input' and 'context'"),
    "empty_messages": ({"messages": []}, "got \\[\\] in 'messages', expected a list of messages, such as"),
    "messages_text": ({"messages": "Hi"}, "got 'Hi' in 'messages', expected a list of messages, such as"),
    "answer_alone": ({"messages": [ASSISTANT]}, "with a user turn to answer, got the answer alone"),
    "system_last": ({"messages": [USER, SYSTEM]}, "got one that ends with 'system'"),
    "two_answers": ({"messages": [USER, ASSISTANT, ASSISTANT]}, "got one that ends with 'assistant'"),
    "blank_turn": ({"messages": [{"role": "user", "content": " "}]}, "got a blank last user turn"),
    "tool_call": ({"messages": [USER, {"role": "assistant", "content": None}]}, "expected turns with 'role'"),
    "bare_turn": ({"messages": ["Hi"]}, "expected turns with 'role' and 'content' as text in 'messages', got 'Hi'"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text conversations are read"),
    "stranger": ({"conversations": [{"from": "bing", "value": "Hi"}]}, "got a turn from 'bing', expected one of human"),
    "prompt_ends_answered": ({"prompt": [USER, ASSISTANT]}, "'prompt' ends with an answer"),
    "completion_of_two": ({"prompt": "Hi", "completion": [ASSISTANT, USER]}, "expected one assistant turn"),
    "completion_number": (
        {"prompt": "Hi", "completion": 5},
        "got 5 in 'completion', expected text or a list of messages",
    ),
    "mixed_outputs": ({"instruction": "x", "output": ["5", 5]}, "expected text or a list of texts in 'output'"),
    "half_a_pair": ({"instruction": "x", "output": ["5", "\ud800"]}, "'output' holds half of a surrogate pair"),
    "no_instances": ({"instruction": "x", "instances": []}, "expected a list of input/output pairs in 'instances'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_one_line_with_its_place(name: str) -> None:
    row, message = BAD[name]
    with pytest.raises(LimbeckError, match=f"^here: .*{message}") as caught:
        read(row)
    assert "\n" not in str(caught.value)
