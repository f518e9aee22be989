"""Tokenizers of several kinds, trained on the spot, and random texts that are hard on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and then some more of it. ",
    "def f(x):\n    return x ** 2  # naïve café résumé\n",
    "Tea is a drink made of leaves; rain falls on maps of iron and glass. ",
    "日本語の文章と中文 한국어 Ελληνικά Привет мир 👩‍👩‍👧 🇩🇪 ",
)
PIECES = (
    *("the", " the", "The", " international", "ization", " of", "ing", "\n", "\n\n", "\t", "  ", "      ", "\r\n"),
    *(
        "é",
        "e\u0301",
        "a\u0308\u0323",
        "ﬁ",
        "½",
        "日本",
        "語",
        "中文",
        "한국어",
        "가\u11a8",
        "\u200b",
        "\ufeff",
        "\ufffd",
    ),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "\U0001f44d\U0001f3fd"),
    *("▁", "Ġ", "<0x0A>", "<|im_end|>", "<end_of_turn>", "</s>", "<s>", "[INST]", "\x00", "\x7f", "\u2028", "…", "—"),
    *("def f(x):\n\treturn x**2", "{'a': [1, 2.5e-3]}", "1234567890", "3.14", "http://a.b/c?d=e", "'s", "don't"),
    *("אבג", "\u05d0\u05b8", "नमस्ते", "ক্ষ", "ไทย", "\u0300\u0301\u0302", "\U0001d518\U0001d52b", "\U0002070e", "İ", "ß"),
)


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Random texts: pieces of many scripts, runs of white space, emoji, code, any characters."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = [_piece(rng) for _ in range(rng.randrange(0, 12))]
        yield rng.choice(("", " ")).join(parts)


def _piece(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(PIECES)
    if kind < 0.7:
        return rng.choice(" \t\n") * rng.randrange(1, 20)
    if kind < 0.9:
        return "".join(rng.choice("abcdefghij XYZ.,;(){}_") for _ in range(rng.randrange(1, 12)))
    code = rng.choice((rng.randrange(1, 0x300), rng.randrange(0x3000, 0xD800), rng.randrange(0xE000, 0x20000)))
    return chr(code)


@cache
def byte_level(size: int = 330, *, composed: bool = False, seed: int = 0) -> Any:
    """Byte-level BPE, as of SmolLM2; `composed` composes accents first, as Qwen does."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC() if composed else None  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS[seed:], *CORPUS[:seed][:1]], trainer)
    return _wrapped(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@cache
def llama_3() -> Any:
    """Byte-level BPE behind a rule that splits, as of Llama 3."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>")


@cache
def sentencepiece(*, prefix: bool = False, size: int = 420) -> Any:
    """BPE over characters with bytes behind it, as of Gemma; with `prefix` a space before every text, as Llama 2."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prefix else steps)  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    # Without the emoji: what no piece has becomes bytes.
    backend.train_from_iterator([line.replace(" ", "▁") for line in CORPUS[:3]], trainer)
    return _wrapped(_with_plain_bytes(backend), eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def _with_plain_bytes(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, whose bytes are pieces and no control tokens."""
    import json

    rules: dict[str, Any] = json.loads(backend.to_str())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(rules))


def _wrapped(backend: Tokenizer, **roles: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "composing": lambda: byte_level(380, composed=True, seed=2),
    "llama-3": llama_3,
    "sentencepiece": sentencepiece,
    "llama-2": lambda: sentencepiece(prefix=True, size=450),
}


def permuted(tokenizer: Any, order: Sequence[int]) -> Any:
    """The same tokenizer with other ids: token i becomes token `order[i]`."""
    import json

    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["vocab"] = {piece: order[index] for piece, index in rules["model"]["vocab"].items()}
    rules["added_tokens"] = sorted(
        [token | {"id": order[token["id"]]} for token in rules["added_tokens"]], key=lambda token: token["id"]
    )
    return _wrapped(Tokenizer.from_str(json.dumps(rules)), **tokenizer.special_tokens_map)  # type: ignore[arg-type]
