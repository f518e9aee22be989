"""The text of `train.lm`: read, tokenised and cut into blocks once, and kept in the run directory.

Documents are read in the order of the source, each followed by the tokenizer's end of sequence, until there are enough
tokens; what is left of the last block is dropped. A resumed run reads the blocks, never the source.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.pipeline.context import RunContext
from limbeck.prompts.documents import TextSource, documents_of
from limbeck.prompts.readers import is_path, source_digest
from limbeck.recipe.sections import LmSection
from limbeck.runtime.files import whole_file
from limbeck.training.corpus import Corpus
from limbeck.types import Json, LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Documents that are tokenised in one call.
_DOCUMENTS = 1000


def corpus_inputs(context: RunContext) -> Json:
    """Inputs of the corpus beside the section: the content of its files, where they are local."""
    section = context.recipe.train.lm
    return {} if section is None else {"lm": source_digest(section.source)}


def check_corpus(context: RunContext) -> None:
    """Check that the text can be found and that its blocks fit the pair, as far as possible without a network.

    Raises:
        LimbeckError: it is not, or they do not.
    """
    section = context.recipe.train.lm
    if section is None:
        return
    window = context.window
    if window is not None and section.max_length > window:
        raise LimbeckError(
            f"train.lm.max_length is {section.max_length} and the window of the pair {window} tokens; lower it"
        )
    if is_path(section.source):
        next(_texts(section))


def open_corpus(context: RunContext, tokenizer: PreTrainedTokenizerBase) -> Corpus | None:
    """The blocks of `train.lm`, made if they are not there; None where the recipe has none."""
    section, train = context.recipe.train.lm, context.recipe.train
    if section is None:
        return None
    path = context.run.corpus
    if not path.exists():
        if context.rank:
            context.wait_until(path.exists)
        else:
            _write(path, pack(_texts(section), tokenizer, section))
    blocks_NL = _read(path)
    context.console.say(f"lm: {blocks_NL.numel():,} tokens of {section.source} in blocks of {blocks_NL.shape[1]}")
    rows = section.per_device_batch_size or train.per_device_train_batch_size
    return Corpus(blocks_NL=blocks_NL, weight=section.weight, rows=rows, seed=train.seed)


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, section: LmSection) -> Tensor:
    """Documents one after another in blocks of `max_length` ids, at most `max_tokens` of them, int32.

    Text that spells a control token is text.

    Raises:
        LimbeckError: not one block.
    """
    end: list[Any] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    length, ids = section.max_length, array("i")
    for documents in _in_lots(texts):
        encoded: Any = tokenizer(documents, add_special_tokens=False, split_special_tokens=True, verbose=False)
        for document in encoded["input_ids"]:
            ids.extend([*document, *end])
        if len(ids) >= section.max_tokens:
            break
    blocks = min(len(ids), section.max_tokens) // length
    if not blocks:
        raise LimbeckError(
            f"train.lm.source={section.source} gives {len(ids)} tokens (train.lm.max_tokens={section.max_tokens}), "
            f"fewer than one block of train.lm.max_length={length}; give more text, or lower it"
        )
    return torch.tensor(ids[: blocks * length], dtype=torch.int32).view(blocks, length)


def _in_lots(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while lot := list(islice(left, _DOCUMENTS)):
        yield lot


def _texts(section: LmSection) -> Iterator[str]:
    """The documents of the source that are not blank.

    Raises:
        LimbeckError: a row without the field, no text at all, or what `rows_of` raises.
    """
    empty = True
    source = TextSource(
        name=section.source,
        field=section.text_field,
        dataset_split=section.dataset_split,
        dataset_config=section.dataset_config,
        keys="train.lm",
        field_key="train.lm.text_field",
    )
    for document in documents_of(source):
        if document is not None:
            empty = False
            yield document.text
    if empty:
        raise LimbeckError(
            f"train.lm.source={section.source} holds no text in the field {section.text_field!r}; "
            "give another source or field"
        )


def _write(path: Path, blocks_NL: Tensor) -> None:
    from safetensors.torch import save_file

    with whole_file(path) as partial:
        save_file({"blocks": blocks_NL}, partial, metadata={"sha256": _digest(blocks_NL)})


def _read(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    remedy = f"{path} is damaged; delete it and run the same command again"
    try:
        with safe_open(path, "pt") as file:
            blocks_NL, said = file.get_tensor("blocks"), (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError):
        raise LimbeckError(remedy) from None
    if said != _digest(blocks_NL):
        raise LimbeckError(remedy)
    return blocks_NL


def _digest(blocks_NL: Tensor) -> str:
    shape = f"{tuple(blocks_NL.shape)} {blocks_NL.dtype}\n".encode()
    return hashlib.sha256(shape + blocks_NL.contiguous().numpy().tobytes()).hexdigest()
