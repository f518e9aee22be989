"""Lines of a run's files that are no responses and no prompts: one line of what to do, never a traceback."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from limbeck.rollouts.io import asked_line, read_asked, read_batch, read_responses, write_responses
from limbeck.types import LimbeckError, Response, TokenPrompt

JUNK = (b"[]", b"null", b"3", b'"text"', b"{}", b"{", b"\xff\xfe", b"[" * 9999, b'{"id": 3, "ids": [1]}')
IDS = (
    b'{"id": "a", "ids": 3}',
    b'{"id": "a", "ids": "12"}',
    b'{"id": "a", "ids": [1.5]}',
    b'{"id": "a", "ids": [true]}',
)


@pytest.mark.parametrize("line", [*JUNK, *IDS], ids=lambda line: line[:20].decode("latin-1"))
def test_asked(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_bytes(b'{"id": "first", "ids": [1, 2]}\n' + line + b"\n")
    with pytest.raises(LimbeckError, match=rf"{path}:2 is damaged .*; delete {path} and run the same command again$"):
        read_asked(path)


@pytest.mark.parametrize("line", JUNK, ids=lambda line: line[:20].decode("latin-1"))
def test_responses(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "teacher.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(LimbeckError, match=rf"{path}:1 is damaged .*; delete {path} and run the same command again$"):
        read_responses(path)


def test_a_batch_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    path.write_bytes(b"")
    with pytest.raises(LimbeckError, match="it holds 0 responses of 4"):
        read_batch(path, 4)


@pytest.mark.parametrize("read", [read_responses, read_asked])
def test_ids_take_eight_bytes_each_in_memory(tmp_path: Path, read: object) -> None:
    """One object for each distinct id: an object for each token takes 36 bytes, and a run holds millions of tokens."""
    path, ids = tmp_path / "a.jsonl", tuple(range(1000, 1500))
    if read is read_asked:
        path.write_text("".join(asked_line(TokenPrompt(id=str(i), ids=ids)) for i in range(100)))
    else:
        write_responses(
            path,
            [
                Response(prompt_id=str(i), author="teacher", prompt_ids=ids, response_ids=ids, stop="length")
                for i in range(50)
            ],
        )
    tracemalloc.start()
    held = read(path)  # type: ignore[operator]
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held and used < 12 * 100 * len(ids)
