"""Token ids of prompts, exactly as the tokenizer's own chat template gives them.

    chat     apply_chat_template(..., add_generation_prompt=True); a text becomes a user turn
    alpaca   the Alpaca wording of (instruction, input)
    plain    the text as it stands

A prompt ends where the answer begins. A reference answer is what the template appends to those ids, up to and including
the token that ends the turn; its ids are made once, here, and never made again from text.

Text that spells a control token (`<|im_end|>`) is that control token to a Hugging Face tokenizer, in training as in
use. That is refused, unless the caller asks for it with control_tokens="parse".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from limbeck.models.processors import placeholder_of
from limbeck.prompts.chat import Options, Rendering, require_asked, require_options, turns_of
from limbeck.prompts.ids import tokenize
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.saved_template import alpaca_chat_template
from limbeck.prompts.special_tokens import ControlTokens, refuse_control_tokens
from limbeck.prompts.tools import call_form
from limbeck.prompts.turn_ends import end_token
from limbeck.prompts.turns import MarkedText, has_earlier_answers, marked_texts, marked_tokens
from limbeck.prompts.wording import alpaca_text, plain_text
from limbeck.types import Author, LimbeckError, Prompt, Response, TokenPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["chat", "plain", "alpaca"]
LossOn = Literal["all", "last"]

# Rendered at a time: the texts of a data set are larger than its ids.
_CONVERSATIONS = 512


def resolve_template(choice: str, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> TemplateName:
    """The template that `choice` means for this tokenizer and these prompts, to be recorded with the run.

    "auto" is the tokenizer's chat template where it has one; where that is the one that a student of the Alpaca wording
    is saved with, it is alpaca, which also has words for an input. Without one it is alpaca when every prompt is an
    instruction or a single user turn, and plain when any is raw text.

    Raises:
        LimbeckError: an unknown name, or "chat" for a tokenizer without a chat template.
    """
    has_chat = tokenizer.chat_template is not None
    if choice == "auto":
        if has_chat:
            return "alpaca" if tokenizer.chat_template == alpaca_chat_template(tokenizer) else "chat"
        instructions = all(prompt.instruction is not None or prompt.messages is not None for prompt in prompts)
        return "alpaca" if instructions else "plain"
    if choice == "chat":
        if not has_chat:
            raise LimbeckError(
                f"{tokenizer.name_or_path} has no chat template, which template 'chat' needs; use alpaca, plain or auto"
            )
        return "chat"
    if choice == "alpaca":
        return "alpaca"
    if choice == "plain":
        return "plain"
    raise LimbeckError(f"prompts.template is {choice!r}, expected auto, chat, plain or alpaca")


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "auto",
    *,
    control_tokens: ControlTokens = "error",
    chat_options: Options | None = None,
) -> list[TokenPrompt]:
    """Prompts as token ids, in the order given, ending where the answer begins.

    Args:
        control_tokens: what to do with text that spells a control token of the tokenizer: "error", or "parse" to take
            it as that token, as the tokenizer does.
        chat_options: variables for the chat template, such as {"enable_thinking": False}.

    Raises:
        LimbeckError: a template that does not fit the prompt or the tokenizer, or a control token spelled in a prompt.
    """
    name = resolve_template(template, tokenizer, prompts)
    refuse_control_tokens(prompts, tokenizer, control_tokens, answers=False)
    texts = _prompt_texts(prompts, tokenizer, name, chat_options)
    return [
        TokenPrompt(
            id=prompt.id,
            ids=ids,
            split=prompt.split,
            label=prompt_label(prompt),
            images=images_among(prompt, ids, tokenizer, whole=True),
        )
        for prompt, ids in zip(prompts, _tokenize_prompts(texts, tokenizer, name), strict=True)
    ]


def encode_responses(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    template: str = "auto",
    author: Author = "data",
    *,
    max_new_tokens: int | None = None,
    control_tokens: ControlTokens = "error",
    chat_options: Options | None = None,
    loss_on: LossOn = "last",
) -> list[Response]:
    """The reference answers as token ids, each beside the ids of its prompt, ended by the end-of-turn token.

    With a chat template the ids are those that the template gives for the whole conversation, whose beginning must be
    the ids of the prompt; white space around the answer is dropped first, as many templates do, because it would merge
    with the end of the prompt. Otherwise the answer is tokenised on its own and the tokenizer's end-of-sequence token
    follows.

    Args:
        max_new_tokens: cut longer answers to so many tokens; they carry stop "length" and no end token.
        loss_on: of a conversation every turn of the assistant, or the last one alone. With "all" a conversation is one
            response whose spans are these turns, or several where the template writes an earlier turn otherwise than
            the model would (see `limbeck.prompts.turns`): then each turn is a response of its own.

    Raises:
        LimbeckError: a prompt without a reference answer, a template whose conversation is not prompt + answer + end
            token, or what `encode_prompts` raises.
    """
    name = resolve_template(template, tokenizer, prompts)
    for prompt in prompts:
        if not prompt.answered:
            raise LimbeckError(
                f"prompt {prompt_label(prompt)} has no completion; let the teacher answer (responses.source=teacher), "
                "or give data with answers"
            )
    refuse_control_tokens(prompts, tokenizer, control_tokens, answers=True)
    if name != "chat":
        prompt_ids = _tokenize_prompts(_prompt_texts(prompts, tokenizer, name, chat_options), tokenizer, name)
        answers = _plain_answers(prompts, tokenizer)
        every = [
            _response(prompt, (*ids, *answer), [(len(ids), len(ids) + len(answer))], author)
            for prompt, ids, answer in zip(prompts, prompt_ids, answers, strict=True)
        ]
    else:
        rendering = _rendering(prompts, tokenizer, chat_options)
        every = []
        for start in range(0, len(prompts), _CONVERSATIONS):
            every += _chat_responses(prompts[start : start + _CONVERSATIONS], rendering, author, loss_on)
    return every if max_new_tokens is None else [_cut(response, max_new_tokens) for response in every]


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, template: TemplateName, chat_options: Options | None = None
) -> tuple[int, ...]:
    """The tokens that end an answer, ascending: the tokenizer's end of sequence and the chat template's end of turn.

    They differ for base tokenizers with a chat template (Qwen: <|endoftext|> and <|im_end|>), for Gemma and for Phi-3.

    Raises:
        LimbeckError: a chat template that refuses or drops an assistant's text.
    """
    ends = set() if tokenizer.eos_token_id is None else {_eos(tokenizer)}
    if template == "chat":
        rendering = Rendering(tokenizer=tokenizer, options=chat_options or {})
        end = end_token(rendering.usual_edges[1], rendering.control)
        ends |= set() if end is None else {end}
    return tuple(sorted(ends))


def _rendering(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, options: Options | None) -> Rendering:
    require_options(options or {}, tokenizer)
    return Rendering(tokenizer=tokenizer, options=options or {}, form=call_form(prompts, tokenizer, options or {}))


def _chat_responses(prompts: Sequence[Prompt], rendering: Rendering, author: Author, loss_on: LossOn) -> list[Response]:
    """The responses of some conversations: one of each, unless its turns need prompts of their own."""
    every: list[tuple[Prompt, MarkedText]] = []
    for prompt in prompts:
        asked = rendering.text(prompt_label(prompt), turns_of(prompt), prompt.tools, ask=True)
        require_asked(prompt_label(prompt), rendering, prompt, asked)
        several = loss_on == "all" and has_earlier_answers(prompt)
        every += [(prompt, one) for one in marked_texts(prompt, rendering, asked, every_turn=several)]
    ids = marked_tokens([(prompt_label(prompt), one) for prompt, one in every], rendering)
    return [
        _response(prompt, *found, author, images_among(prompt, found[0], rendering.tokenizer))
        for (prompt, _), found in zip(every, ids, strict=True)
    ]


def images_among(
    prompt: Prompt, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, whole: bool = False
) -> tuple[str, ...]:
    """The images of a prompt whose placeholders stand in some ids of its conversation, in order.

    Args:
        whole: all of them must.

    Raises:
        LimbeckError: the template leaves one out or adds one.
    """
    images = prompt.images
    if not images:
        return ()
    placeholder = placeholder_of(tokenizer)
    count = 0 if placeholder is None else ids.count(placeholder.id)
    if placeholder is None or count > len(images) or (whole and count < len(images)):
        raise LimbeckError(
            f"prompt {prompt_label(prompt)} has {len(images)} images, and the chat template of "
            f"{tokenizer.name_or_path} writes {count} placeholders; use a tokenizer whose template writes images"
        )
    return images[:count]


def _response(
    prompt: Prompt,
    ids: tuple[int, ...],
    spans: Sequence[tuple[int, int]],
    author: Author,
    images: tuple[str, ...] = (),
) -> Response:
    """A response from the first of the answered parts of some ids on."""
    begin = spans[0][0]
    return Response(
        prompt_id=prompt.id,
        author=author,
        prompt_ids=ids[:begin],
        response_ids=ids[begin:],
        stop="eos",
        split=prompt.split,
        spans=tuple((start - begin, end - begin) for start, end in spans) if len(spans) > 1 else (),
        images=images,
    )


def _cut(response: Response, most: int) -> Response:
    """A response whose last answer has at most so many tokens; what went before is context, which stays as it is."""
    start = response.spans[-1][0] if response.spans else 0
    if len(response.response_ids) - start <= most:
        return response
    end = start + most
    spans = (*response.spans[:-1], (start, end)) if response.spans else ()
    return replace(response, response_ids=response.response_ids[:end], spans=spans, stop="length")


def _prompt_texts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, name: TemplateName, options: Options | None
) -> list[str]:
    if name == "chat":
        rendering, texts = _rendering(prompts, tokenizer, options), []
        for prompt in prompts:
            text = rendering.text(prompt_label(prompt), turns_of(prompt), prompt.tools, ask=True)
            require_asked(prompt_label(prompt), rendering, prompt, text)
            texts.append(text)
        return texts
    if options:
        raise LimbeckError(
            f"prompts.chat_options are for the chat template, got {sorted(options)} with template {name!r}; "
            "leave them out, or set prompts.template=chat"
        )
    for prompt in prompts:
        if prompt.images:
            raise LimbeckError(
                f"prompt {prompt_label(prompt)} has images, which template {name!r} has no words for; set "
                "prompts.template=chat"
            )
        if prompt.tools or prompt.answer:
            raise LimbeckError(
                f"prompt {prompt_label(prompt)} has tools or an answer that calls them, which template {name!r} has no "
                "words for; use a tokenizer with a chat template, or leave them out: prompts.ignore_columns=[tools]"
            )
    return [alpaca_text(prompt) if name == "alpaca" else plain_text(prompt) for prompt in prompts]


def _tokenize_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: TemplateName
) -> list[tuple[int, ...]]:
    # A chat template writes its own special tokens; otherwise the tokenizer adds what its models expect (Llama's BOS).
    rows = tokenize(texts, tokenizer, special=name != "chat")
    if name != "chat" and tokenizer.eos_token_id is not None:
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
                raise LimbeckError(
                    f"{tokenizer.name_or_path} ends every text with {tokenizer.eos_token}, which would end a prompt "
                    "before its answer; set add_eos_token to false in its configuration"
                )
    return rows


def _plain_answers(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    if tokenizer.eos_token_id is None:
        raise LimbeckError(
            f"{tokenizer.name_or_path} has no end-of-sequence token to end an answer with; set eos_token"
        )
    rows = tokenize([str(prompt.completion) for prompt in prompts], tokenizer, special=False)
    return [(*ids, _eos(tokenizer)) for ids in rows]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos
