"""Whatever the teacher sees, the tokens of the answer are the student's: over real and hand-written chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from limbeck.prompts.templates import encode_prompts, encode_responses
from limbeck.rollouts.collate import collate
from limbeck.teachers.seeing import behind
from limbeck.teachers.sees import SEES, View
from limbeck.types import ImageRef, LimbeckError, Message, Prompt
from tests.prompts import chat_templates
from tests.prompts.conftest import MakeTokenizer
from tests.prompts.test_published_templates import EXTENDING, published

WRITTEN = ("CHATML", "CHATML_SYSTEM", "LLAMA2", "GEMMA", "GENERATION", "MISTRAL")
# Templates that refuse a system turn, or leave it out.
WITHOUT_SYSTEM = {"LLAMA2", "GEMMA", "MISTRAL"}
VIEWS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "column": {"column": "hint"},
    "template": {"text": "{hint} {{so}}\n\n{prompt}\n\nThink of {hint} first."},
    "system": {"text": "Answer in one word."},
}
COLUMNS: Mapping[str, str] = {"hint": " Paris is a town. "}
ASKED = (
    Prompt(id="text", text=" What is 2 + 2?\n", completion="\nIt is 4. ", columns=COLUMNS),
    Prompt(
        id="turns",
        messages=(
            Message(role="user", content="Who are you?"),
            Message(role="assistant", content="A model."),
            Message(role="user", content="What is the capital of France?"),
        ),
        completion="It is Paris: \u00e9t\u00e9 \U0001f600",
        columns=COLUMNS,
    ),
)


def view_of(name: str) -> View:
    return SEES.build(name, **VIEWS[name])


def turns_of(view: View, prompt: Prompt) -> list[Message]:
    return list(view.of(prompt).messages or ())


def tokenizer_of(template: str, make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    if template in EXTENDING:
        return published(template, make_tokenizer)
    return make_tokenizer(getattr(chat_templates, template))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("template", [*WRITTEN, *EXTENDING])
def test_answers_have_the_same_tokens_behind_both_prompts(
    template: str, name: str, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer, view = tokenizer_of(template, make_tokenizer), view_of(name)
    seen = [view.of(prompt) for prompt in ASKED]
    if name == "system" and template in WITHOUT_SYSTEM:
        with pytest.raises(LimbeckError, match="chat template"):
            encode_prompts(seen, tokenizer)
        return
    own, theirs = encode_responses(ASKED, tokenizer), encode_responses(seen, tokenizer)
    assert [r.response_ids for r in own] == [r.response_ids for r in theirs]
    assert [r.prompt_id for r in own] == [r.prompt_id for r in theirs] == ["text", "turns"]
    assert all((a.prompt_ids == b.prompt_ids) == (name == "prompt") for a, b in zip(own, theirs, strict=True))
    # What is scored: the student's batch with the teacher's prompts in it is the batch of what the teacher sees.
    batch = behind(collate(own, range(2), pad_id=0), [p.ids for p in encode_prompts(seen, tokenizer)])
    wanted = collate(theirs, range(2), pad_id=0)
    for part in ("input_ids_BT", "attention_mask_BT", "loss_mask_BT", "labels_N"):
        assert torch.equal(getattr(batch, part), getattr(wanted, part)), part


def test_alpaca_and_plain_prompts_take_text_on_the_side_where_it_stands(make_tokenizer: MakeTokenizer) -> None:
    tokenizer, view = make_tokenizer(), view_of("template")
    both = Prompt(id="i", text="Add.\n\n2 and 2", instruction=("Add.", "2 and 2"), columns={"hint": "H"})
    alone = Prompt(id="a", text="Add.", instruction=("Add.", ""), columns={"hint": "H"})
    for prompt, template, wanted in (
        (both, "plain", "H {so}\n\nAdd.\n\n2 and 2\n\nThink of H first."),
        (both, "alpaca", "### Instruction:\nH {so}\n\nAdd.\n\n### Input:\n2 and 2\n\nThink of H first.\n\n"),
        (alone, "alpaca", "### Instruction:\nH {so}\n\nAdd.\n\nThink of H first.\n\n"),
    ):
        (encoded,) = encode_prompts([view.of(prompt)], tokenizer, template)
        assert wanted in tokenizer.decode(list(encoded.ids))


def test_a_turn_with_an_image_keeps_it_in_its_place() -> None:
    picture = ImageRef(id="0" * 16)
    turn = Message(role="user", content="What is this?", parts=(picture, "What is this?"))
    prompt = Prompt(id="v", messages=(turn,), columns={"hint": "a cat"})
    (seen,) = turns_of(SEES.build("template", text="Look. {prompt} It is {hint}."), prompt)
    assert seen.parts == ("Look. ", picture, "What is this? It is a cat.")
    assert seen.content == "Look. What is this? It is a cat."


def test_a_system_prompt_stands_before_the_one_of_the_prompt() -> None:
    prompt = Prompt(id="s", messages=(Message(role="system", content="Be kind."), Message(role="user", content="Hi")))
    system, user = turns_of(SEES.build("system", text="Be short."), prompt)
    assert (system.content, user.content) == ("Be short.\n\nBe kind.", "Hi")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("template", {"text": "no prompt"}, "names {prompt} 0 times"),
        ("template", {"text": "{prompt} {prompt}"}, "names {prompt} 2 times"),
        ("template", {"text": "{prompt} {"}, "brace that names no column"),
        ("template", {"text": "{prompt} {}"}, "without a name"),
        ("template", {"text": "{prompt} {hint:>8}"}, "form of its own"),
        ("template", {"text": "{prompt}"}, "the prompt alone"),
        ("system", {"text": " \n"}, "blank"),
    ],
)
def test_options_that_make_no_view(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LimbeckError) as caught:
        SEES.build(name, **options).check()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_conversation_without_a_user_turn_is_named() -> None:
    turns = (Message(role="tool", content="4"),)
    prompt = Prompt(id="t", messages=turns, columns={"hint": "x"}, where="a.jsonl, line 3")
    with pytest.raises(LimbeckError, match=r"a\.jsonl, line 3 has no user turn"):
        view_of("column").of(prompt)
