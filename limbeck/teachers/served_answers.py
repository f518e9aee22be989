"""A server's answers on disk, one file per text, until what was made of them is on disk elsewhere.

    asked.json                    which model of the server they are by
    asked/3f5b0c...safetensors

A file is named by a hash of everything that its answer depends on, so that a text that was asked about is not asked
about again, whichever stage, batch or round wants it and however the process before ended.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.runtime.files import whole_file, write_json
from limbeck.runtime.records import read_object
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from torch import Tensor

Answer = dict[str, "Tensor"]


@dataclass(frozen=True)
class KeptAnswers:
    """The answers in a folder.

    Attributes:
        folder: None keeps nothing.
    """

    folder: Path | None

    def get(self, question: Mapping[str, Any]) -> Answer | None:
        """The answer to a question; None where it has not been asked.

        Raises:
            LimbeckError: the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(question)
        if path is None or not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise LimbeckError(f"{path} is damaged ({error}); delete it and run the same command again") from None

    def put(self, question: Mapping[str, Any], answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        from safetensors.torch import save_file

        path = self._path(question)
        if path is None:
            return
        with whole_file(path) as partial:
            save_file(answer, partial)

    def require_same(self, asked: Mapping[str, Any], answered_by: str) -> None:
        """Check that a server's model is the one that answered the same questions before, and note which it is.

        Raises:
            LimbeckError: it is another.
        """
        if self.folder is None:
            return
        path, record = self.folder.with_suffix(".json"), {"asked": dict(asked), "model": answered_by}
        before = read_object(path) if path.exists() else None
        if before is not None and before.get("asked") == record["asked"] and before.get("model") != answered_by:
            raise LimbeckError(
                f"{path.parent} holds answers of {before.get('model')!r}, and the server has {answered_by!r}; serve "
                "the former again, or name another directory with output_dir=..."
            )
        if before != record:
            write_json(path, record)

    def forget(self, question: Mapping[str, Any]) -> None:
        """Delete the answer to a question."""
        path = self._path(question)
        if path is not None:
            path.unlink(missing_ok=True)

    def forget_all(self) -> None:
        """Delete all answers."""
        if self.folder is not None and self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _path(self, question: Mapping[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"
