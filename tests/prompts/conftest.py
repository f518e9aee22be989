"""A small byte-level tokenizer with the control tokens of the families whose templates are tested."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<filename>"]
CORPUS = [
    "user\nassistant\nmodel\nsystem\nYou are a helpful AI assistant.\n",
    "What is the capital of France? The capital of France is Paris.\n\n### Response:\n",
    "Write a response that appropriately completes the request. \n\n[INST] the answer [/INST] it is",
]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def small_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend.to_str()


@pytest.fixture
def make_tokenizer(small_backend: str) -> MakeTokenizer:
    def make(chat_template: str | None = None, bos: str = "<s>", eos: str = "</s>") -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(small_backend), bos_token=bos, eos_token=eos, name_or_path="tiny"
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make
