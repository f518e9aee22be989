"""Alignment of tokenisations on random texts: every byte in exactly one span, and the share of tokens that are exact.

    python -m benchmarks.alignment MODEL MODEL ... --texts 100000

Every model's tokenizer in turn is the student of every other one: named assets, directories or GGUF files, and small
ones made on the spot (byte-level, composing, sentencepiece, llama-2, llama-3). A text is
pieces of many scripts, emoji, combining marks, code, runs of white space and any characters; every tenth answer is
random token ids, which are no text, and every tenth is cut off, often inside a character. The first alignment that does
not hold stops the program.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from limbeck.models.loading import load_tokenizer
from limbeck.teachers.alignment.reading import Aligner
from tests.teachers.alignment.spans import require_whole
from tests.teachers.alignment.tokenizers_at_hand import KINDS, texts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="two or more tokenizers")
    parser.add_argument("--texts", type=int, default=100_000, help="texts per run, dealt out to the pairs in turn")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    tokenizers = {name: KINDS[name]() if name in KINDS else load_tokenizer(name) for name in asked.models}
    pairs = list(permutations(asked.models, 2))
    print("| student | teacher | shared ids | texts | tokens | exact | merged | rest | texts/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for number, (student, teacher) in enumerate(pairs):
        mine = tokenizers[student]
        aligner = Aligner.of(mine, tokenizers[teacher])
        count = asked.texts // len(pairs) + (number < asked.texts % len(pairs))
        tokens, kinds, began = 0, dict.fromkeys(("exact", "merged", "rest"), 0), time.monotonic()
        for i, ids in enumerate(_answers(mine, count, seed=asked.seed + number)):
            alignment = aligner.align(ids)
            try:
                require_whole(alignment, ids, sum(len(aligner.student_bytes.of[index]) for index in ids))
            except AssertionError:
                print(f"{student} <- {teacher}, answer {i}: {list(ids)}", file=sys.stderr)
                raise
            tokens += len(ids)
            for kind in kinds:
                kinds[kind] += alignment.tokens(kind)
        shares = " | ".join(f"{kinds[kind] / max(tokens, 1):.1%}" for kind in kinds)
        rate = count / max(time.monotonic() - began, 1e-9)
        names = f"{Path(student).name} | {Path(teacher).name}"
        print(f"| {names} | {len(aligner.shared):,} | {count:,} | {tokens:,} | {shares} | {rate:,.0f} |", flush=True)
    return 0


def _answers(tokenizer: Any, count: int, *, seed: int) -> Iterator[Sequence[int]]:
    """Answers as a student might write them, in its token ids."""
    rng = random.Random(seed)
    size = max(tokenizer.get_vocab().values()) + 1
    for i, text in enumerate(texts(count, seed)):
        if i % 10 == 9:
            yield [rng.randrange(size) for _ in range(rng.randrange(1, 40))]
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        yield ids[: rng.randrange(len(ids) + 1)] if i % 10 == 4 else ids


if __name__ == "__main__":
    raise SystemExit(main())
