"""A description of a store, from its seals alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from limbeck.teachers.store.codecs import codec_text, read_codec
from limbeck.teachers.store.reader import Store


def describe(path: Path) -> dict[str, str]:
    """What a store holds, in words, by what it is called.

    Raises:
        LimbeckError: it is no store, or damaged.
    """
    store = Store(path)
    known, seals = store.manifest, store.seals
    found = {
        "teacher": f"{known.teacher.name} ({known.teacher.fingerprint[:12]}), {known.teacher.dtype}",
        "tokenizer": f"{known.tokenizer[:12]}, {known.frame.vocab_size:,} tokens",
        "template": " ".join(f"{key}={value}" for key, value in known.template.items()),
        "temperatures": ", ".join(f"{tau:g}" for tau in known.frame.temperatures),
    }
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for seal in seals.values():
        of = counts[codec_text(read_codec(seal["codec"]))]
        for place, value in enumerate((1, seal["responses"], seal["tokens"], seal["bytes"])):
            of[place] += value
    for codec, (shards, responses, tokens, size) in counts.items():
        found[codec] = (
            f"{responses:,} responses, {tokens:,} tokens in {shards} shards, {size / tokens:,.1f} bytes per token"
        )
    found["bytes"] = f"{sum(file.stat().st_size for file in path.iterdir() if file.is_file()):,}"
    return found
