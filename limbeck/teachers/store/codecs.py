"""The registry of codecs: what a store keeps of each token's distribution, and in how many bits."""

from __future__ import annotations

from limbeck.registry import Registry
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.dense import Hidden, Svd
from limbeck.teachers.store.sparse import Sampled, TopK

_MEMBERS: dict[str, type[Codec]] = {"hidden": Hidden, "svd": Svd, "topk": TopK, "sampled": Sampled}
CODECS = Registry("codec", _MEMBERS, entry_points="limbeck.codecs")


def codec_tree(codec: Codec) -> dict[str, object]:
    """A codec as plain values: its name and options."""
    from dataclasses import asdict

    name = next(name for name, member in CODECS.items() if type(codec) is member)
    return {"name": name, **asdict(codec)}  # type: ignore[call-overload]


def read_codec(tree: dict[str, object]) -> Codec:
    """The codec of `codec_tree`.

    Raises:
        LimbeckError: no such codec or option.
    """
    options = dict(tree)
    return CODECS.build(str(options.pop("name", "")), **options)


def codec_text(codec: Codec) -> str:
    """A codec in words: its name and options."""
    return " ".join(str(value) if key == "name" else f"{key}={value}" for key, value in codec_tree(codec).items())
