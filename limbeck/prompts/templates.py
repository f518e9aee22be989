"""From prompts to token ids, exactly as the tokenizer's own chat template gives them.

    chat     apply_chat_template(..., add_generation_prompt=True); a text becomes a user turn
    alpaca   the Alpaca wording of (instruction, input)
    plain    the text as it stands

A prompt ends where the answer begins. A reference answer is what the template appends to those ids, up to and including
the token that ends the turn; its ids are made once, here, and never made again from text.

Text that spells a control token (`<|im_end|>`) is that control token to a Hugging Face tokenizer, in training as in
use. That is refused, unless the caller asks for it with control_tokens="parse".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from limbeck.flow import Author, LimbeckError, Prompt, Response, StopReason, TokenPrompt
from limbeck.prompts.chat import Options, render, require_asked, require_options, text_after_answer, turns_of
from limbeck.prompts.control import ControlTokens, refuse_control_tokens, special_tokens
from limbeck.prompts.endings import cut_after_end, first_run
from limbeck.prompts.naming import label
from limbeck.prompts.saved_template import alpaca_chat_template
from limbeck.prompts.wording import alpaca_text, plain_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["chat", "plain", "alpaca"]

_PROBE_ANSWER = "A probe of the template."


def resolve_template(choice: str, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> TemplateName:
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
        TokenPrompt(id=prompt.id, ids=ids, split=prompt.split, label=label(prompt))
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
) -> list[Response]:
    """The reference answers as token ids, each beside the ids of its prompt, ended by the end-of-turn token.

    With a chat template the ids are those that the template gives for the whole conversation, whose beginning must be
    the ids of the prompt; white space around the answer is dropped first, as many templates do, because it would merge
    with the end of the prompt. Otherwise the answer is tokenised on its own and the tokenizer's end-of-sequence token
    follows.

    Args:
        max_new_tokens: cut longer answers to so many tokens; they carry stop "length" and no end token.

    Raises:
        LimbeckError: a prompt without a reference answer, a template whose conversation is not prompt + answer + end
            token, or what `encode_prompts` raises.
    """
    name = resolve_template(template, tokenizer, prompts)
    for prompt in prompts:
        if prompt.completion is None:
            raise LimbeckError(
                f"prompt {label(prompt)} has no completion; let the teacher answer (responses.author=teacher), "
                "or give data with answers"
            )
    refuse_control_tokens(prompts, tokenizer, control_tokens, answers=True)
    texts = _prompt_texts(prompts, tokenizer, name, chat_options)
    prompt_ids = _tokenize_prompts(texts, tokenizer, name)
    if name == "chat":
        answers = _chat_answers(prompts, texts, prompt_ids, tokenizer, chat_options)
    else:
        answers = _plain_answers(prompts, tokenizer)
    return [
        _response(prompt, ids, answer, author, max_new_tokens)
        for prompt, ids, answer in zip(prompts, prompt_ids, answers, strict=True)
    ]


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
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE_ANSWER}]
        (text,) = render([turns], tokenizer, ["probe"], chat_options, ask=False)
        if _PROBE_ANSWER not in text:
            raise LimbeckError(
                f"the chat template of {tokenizer.name_or_path} drops an assistant's text, so that its end cannot be "
                "found; use template alpaca or plain, or a tokenizer whose template takes plain text"
            )
        ending = _tokenize([text.rpartition(_PROBE_ANSWER)[2]], tokenizer, special=False)[0]
        ends.update(first_run(ending, special_tokens(tokenizer))[-1:])
    return tuple(sorted(ends))


def _response(
    prompt: Prompt, prompt_ids: tuple[int, ...], answer: tuple[int, ...], author: Author, max_new_tokens: int | None
) -> Response:
    stop: StopReason = "eos"
    if max_new_tokens is not None and len(answer) > max_new_tokens:
        answer, stop = answer[:max_new_tokens], "length"
    return Response(
        prompt_id=prompt.id,
        author=author,
        prompt_ids=prompt_ids,
        response_ids=answer,
        stop=stop,
        split=prompt.split,
    )


def _prompt_texts(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, name: TemplateName, options: Options | None
) -> list[str]:
    if name == "chat":
        require_options(options or {}, tokenizer)
        conversations = [turns_of(prompt) for prompt in prompts]
        texts = render(conversations, tokenizer, [label(prompt) for prompt in prompts], options, ask=True)
        for prompt, turns, text in zip(prompts, conversations, texts, strict=True):
            require_asked(label(prompt), tokenizer, turns, text)
        return texts
    if options:
        raise LimbeckError(
            f"prompts.chat_options are for the chat template, got {sorted(options)} with template {name!r}; "
            "leave them out, or set prompts.template=chat"
        )
    return [alpaca_text(prompt) if name == "alpaca" else plain_text(prompt) for prompt in prompts]


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[tuple[int, ...]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [tuple(ids) for ids in encoded["input_ids"]]  # type: ignore[union-attr]


def _tokenize_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, name: TemplateName
) -> list[tuple[int, ...]]:
    # A chat template writes its own special tokens; otherwise the tokenizer adds what its models expect (Llama's BOS).
    rows = _tokenize(texts, tokenizer, special=name != "chat")
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
    rows = _tokenize([str(prompt.completion) for prompt in prompts], tokenizer, special=False)
    return [(*ids, _eos(tokenizer)) for ids in rows]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos


def _chat_answers(
    prompts: Sequence[Prompt],
    prompt_texts: Sequence[str],
    prompt_ids: Sequence[tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    options: Options | None,
) -> list[tuple[int, ...]]:
    completions = [str(prompt.completion).strip() for prompt in prompts]
    conversations = [
        [*turns_of(prompt), {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    names = [label(prompt) for prompt in prompts]
    texts = render(conversations, tokenizer, names, options, ask=False)
    rows = _tokenize(texts, tokenizer, special=False)
    control = special_tokens(tokenizer)
    endings: dict[str, tuple[int, ...]] = {}
    answers = []
    for name, completion, before, text, ids, whole in zip(
        names, completions, prompt_texts, texts, prompt_ids, rows, strict=True
    ):
        ending = text_after_answer(name, tokenizer, before, text, completion)
        if whole[: len(ids)] != ids:
            raise LimbeckError(
                f"prompt {name}: the tokenizer merges the end of the prompt with the beginning of its answer "
                f"{completion[:20]!r}, so that the prompt's ids do not begin the conversation's; change or drop the row"
            )
        if ending not in endings:
            endings[ending] = _tokenize([ending], tokenizer, special=False)[0]
        answers.append(cut_after_end(name, whole[len(ids) :], endings[ending], control, tokenizer))
    return answers
