"""Endings of a student's answers: the tokenizer, chat template and end tokens that it is trained and saved with.

Training runs on ids that the teacher's tokenizer made, so the student of a pair with one vocabulary is given that
tokenizer whatever its own said: a base model under an instruct teacher learns to end a turn with the teacher's
end-of-turn token, and plain `generate` must stop there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from limbeck.models.heads import causal_model
from limbeck.models.vocabulary import control_ids
from limbeck.prompts.saved_template import saved_chat_template
from limbeck.prompts.templates import TemplateName, end_token_ids
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_UNLIMITED = 10**9
_WRITES = {"chat": "the teacher's", "alpaca": "one that writes the Alpaca wording", "plain": "none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """Tokenizer, chat template and end tokens that a student is trained and saved with.

    Attributes:
        template: how prompts are written.
        tokenizer: a copy of the one that made the ids, with the chat template that writes such prompts.
        end_ids: the tokens that end an answer, the one that a taught answer ends with first.
        changed: what differs from the tokenizer that the student came with, a sentence each.
    """

    template: TemplateName
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    changed: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, ...]:
        """The end tokens as text."""
        return _spelled(self.tokenizer, self.end_ids)


def answer_format(
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    chat_options: Mapping[str, Any] | None,
    *,
    own: PreTrainedTokenizerBase,
    window: int | None = None,
) -> AnswerFormat:
    """The format of answers to prompts that were written with a tokenizer and a template.

    Args:
        tokenizer: the teacher's.
        own: the one that the student came with.
        window: tokens that the student reads at most; None leaves what the tokenizer says.

    Raises:
        LimbeckError: a chat template that refuses or drops an assistant's text.
    """
    ends = end_token_ids(tokenizer, template, chat_options)
    given = copy.deepcopy(tokenizer)
    given.chat_template = saved_chat_template(tokenizer, template, chat_options)
    if window is not None and window < _UNLIMITED:
        given.model_max_length = window
    if given.pad_token is None and own.pad_token in given.get_vocab():
        given.pad_token = own.pad_token
    end_ids = tuple(sorted(ends, key=lambda index: index == tokenizer.eos_token_id))
    return AnswerFormat(
        template=template, tokenizer=given, end_ids=end_ids, changed=_changes(own, given, end_ids, template)
    )


def end_answers_with(model: nn.Module, format: AnswerFormat, also: Iterable[int] = ()) -> None:
    """Let plain `generate` stop where answers end: sets bos, eos and pad of the model's configurations, in place.

    Args:
        also: further tokens to stop at, such as those that the teacher's own generation stops at.
    """
    inner, tokenizer = causal_model(model), format.tokenizer
    stops = list(dict.fromkeys([*format.end_ids, *also]))
    if not stops:
        return
    ids: dict[str, Any] = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    for role in ("bos_token_id", "pad_token_id"):
        if (index := getattr(tokenizer, role)) is not None:
            ids[role] = index
    for config in {id(one): one for one in (inner.config, inner.config.get_text_config())}.values():
        _set(config, ids)
    if inner.generation_config is not None:
        # Rows of different lengths need one, and a model's own may be none of the tokenizer's.
        _set(inner.generation_config, {"pad_token_id": stops[0]} | ids)


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, copy.copy(value))


def answer_ends(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateName,
    chat_options: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """The tokens that end a model's answers: those of `end_token_ids`, then others that its own generation stops at.

    Qwen2.5 ends a turn with <|im_end|> and stops at <|endoftext|> too, Llama 3 at <|end_of_text|> and <|eom_id|>. Of
    what its generation configuration names, control tokens alone are taken.

    Raises:
        LimbeckError: a chat template that refuses or drops an assistant's text.
    """
    ends, control = end_token_ids(tokenizer, template, chat_options), control_ids(tokenizer)
    return tuple(dict.fromkeys([*ends, *(index for index in stop_ids(model) if index in control)]))


def stop_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids at which a model's own generation stops, by its generation configuration."""
    config: Any = causal_model(model).generation_config
    found = None if config is None else config.eos_token_id
    ids = found if isinstance(found, list | tuple) else [found]
    # A damaged file may name any number.
    rows = causal_model(model).config.get_text_config().vocab_size
    return tuple(index for index in ids if isinstance(index, int) and 0 <= index < rows)


def _changes(
    own: PreTrainedTokenizerBase, given: PreTrainedTokenizerBase, end_ids: tuple[int, ...], template: TemplateName
) -> tuple[str, ...]:
    found, before = [], _own_end_ids(own)
    if set(before) != set(end_ids):
        found.append(f"answers end with {_listed(_spelled(given, end_ids))}, not {_listed(_spelled(own, before))}")
    if own.chat_template != given.chat_template:
        found.append(f"chat template: {_WRITES[template]}{', where it had none' if own.chat_template is None else ''}")
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        old, new = (tokenizer.special_tokens_map.get(role) or "none" for tokenizer in (own, given))
        if old != new:
            found.append(f"{role}: {new}, not {old}")
    return tuple(found)


def _own_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids at which the tokenizer by itself lets an answer end."""
    if isinstance(tokenizer.chat_template, str):
        try:
            return end_token_ids(tokenizer, "chat")
        except LimbeckError:
            pass
    return end_token_ids(tokenizer, "plain")


def _spelled(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> tuple[str, ...]:
    return tuple(map(str, tokenizer.convert_ids_to_tokens(list(ids))))


def _listed(tokens: Iterable[object]) -> str:
    return " or ".join(map(str, tokens)) or "nothing"
