"""The identity of a store: whose signals it holds, of texts in which template, in which form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from limbeck.runtime.records import fingerprint
from limbeck.teachers.store.base import Codec, Frame
from limbeck.teachers.store.codecs import codec_tree, read_codec
from limbeck.teachers.store.seals import read_record, write_record
from limbeck.types import Json, LimbeckError

FORMAT = 1
MANIFEST = "store.json"


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """The teacher of a store.

    Attributes:
        fingerprint: of everything its signal depends on (`Teacher.fingerprint`).
        configuration: hash of its config.json; empty where it has none.
        dtype, attention: how it was run.
        weight_bytes: size of its weights on disk.
    """

    name: str
    fingerprint: str
    configuration: str
    dtype: str
    attention: str
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What all signals of a store have in common; two stores that agree in it can be merged.

    Attributes:
        tokenizer: fingerprint of the teacher's tokenizer.
        template: name and options of the template of the texts.
        codec: of signals that are trained on.
        heldout: of signals of held-out texts, which evaluation reads over the whole vocabulary where it can.
    """

    teacher: TeacherIdentity
    tokenizer: str
    template: Mapping[str, Any]
    frame: Frame
    codec: Codec
    heldout: Codec
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        # What all tokens of a codec share lies under its name.
        assert self.codec == self.heldout or type(self.codec) is not type(self.heldout), "one form per codec"

    @property
    def codecs(self) -> tuple[Codec, ...]:
        return (self.codec,) if self.codec == self.heldout else (self.codec, self.heldout)

    @property
    def identity(self) -> Json:
        """Everything but names and sizes that say nothing of the signals."""
        tree = self.tree
        del tree["teacher"]["name"], tree["teacher"]["weight_bytes"]
        return tree

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def tree(self) -> Json:
        return {
            "format": self.format,
            "teacher": asdict(self.teacher),
            "tokenizer": self.tokenizer,
            "template": dict(self.template),
            "frame": asdict(self.frame) | {"temperatures": list(self.frame.temperatures)},
            "codec": codec_tree(self.codec),
            "heldout": codec_tree(self.heldout),
        }


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_record(path / MANIFEST, manifest.tree)


def read_manifest(path: Path) -> Manifest:
    """The identity of the store in a folder.

    Raises:
        LimbeckError: there is none, it is damaged, or of a later version.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise LimbeckError(
            f"{path} is no store (it has no {MANIFEST}); make one with `limbeck store capture RECIPE {path}`"
        )
    tree = read_record(file)
    if tree.get("format") != FORMAT:
        raise LimbeckError(
            f"{path} has format {tree.get('format')}, expected {FORMAT}; read it with the version that wrote it"
        )
    frame = tree["frame"] | {"temperatures": tuple(tree["frame"]["temperatures"])}
    return Manifest(
        teacher=TeacherIdentity(**tree["teacher"]),
        tokenizer=tree["tokenizer"],
        template=tree["template"],
        frame=Frame(**frame),
        codec=read_codec(tree["codec"]),
        heldout=read_codec(tree["heldout"]),
    )


_SAID = {
    "tokenizer": "another tokenizer",
    "template": "another template",
    "codec": "another codec",
    "heldout": "another codec of held-out texts",
}


def require_same(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Refuse a store of another teacher, tokenizer, template or form.

    Raises:
        LimbeckError: names the first difference.
    """
    for name in (f.name for f in fields(TeacherIdentity)):
        ours, theirs = getattr(wanted.teacher, name), getattr(found.teacher, name)
        if name not in ("name", "weight_bytes") and ours != theirs:
            what = "teacher" if name in ("fingerprint", "configuration") else f"{name} of the teacher"
            raise _other(path, f"another {what} ({_short(theirs)} of {found.teacher.name})", _short(ours))
    for name, said in _SAID.items():
        if (theirs := found.tree[name]) != (ours := wanted.tree[name]):
            raise _other(path, f"{said} ({_short(theirs)})", _short(ours))
    for name, theirs in found.tree["frame"].items():
        if theirs != (ours := wanted.tree["frame"][name]):
            raise _other(path, f"another {name} ({_short(theirs)})", _short(ours))


def _other(path: Path, what: str, expected: str) -> LimbeckError:
    return LimbeckError(f"{path} was captured with {what}, expected {expected}; give this one a store of its own")


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={one}" for key, one in value.items())
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
