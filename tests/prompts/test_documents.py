"""Documents in tokens and in pieces: put together again they are the text, and none is lost or predicted twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from limbeck.prompts import documents
from limbeck.prompts.documents import Document, TextSource, Tokenized, documents_of, lots_of, pieces_of, tokenized
from limbeck.prompts.readers import _read_stream, rows_of, source_digest
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair

IDS = st.lists(st.integers(0, 299), min_size=1, max_size=60).map(tuple)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "begins"])
def tokenizer(request: pytest.FixtureRequest, tiny: TinyPair) -> Any:
    """One that puts nothing before a text, and one that puts a beginning of sequence there."""
    found: Any = AutoTokenizer.from_pretrained(tiny.teacher)
    if request.param:
        found.bos_token = "<|im_start|>"
        found._tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", found.bos_token_id)]
        )
    return found


@given(ids=IDS, longest=st.integers(1, 20), begin=st.sampled_from([(), (7,)]))
@settings(deadline=None)
def test_pieces_put_together_are_the_document(ids: tuple[int, ...], longest: int, begin: tuple[int, ...]) -> None:
    cuts = list(Tokenized(begin=begin, ids=ids).cut(longest))
    predicted = tuple(token for _, piece in cuts for token in piece)
    # Every token but the first, which nothing stands before; with a beginning of sequence all of them.
    assert predicted == (ids if begin else ids[1:])
    assert all(1 <= len(piece) <= longest for _, piece in cuts)
    assert all(len(piece) == longest for _, piece in cuts[:-1])
    whole, at = (*begin, *ids), max(len(begin), 1)
    for context, piece in cuts:
        last = whole[at - 1]
        assert context == (begin if at == len(begin) else (*begin, last))
        at += len(piece)


@given(texts=st.lists(st.text("abc <|im_end|>\n", max_size=40), max_size=8), longest=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_the_text_comes_back_from_its_pieces(tokenizer: Any, texts: list[str], longest: int) -> None:
    kept = [Document(text=text, where="x") for text in texts if text.strip()]
    for document, pieces in zip(kept, pieces_of(kept, tokenizer, longest=longest), strict=True):
        ids = [*(() if tokenizer("")["input_ids"] else pieces[0].prompt_ids)]
        ids += [token for piece in pieces for token in piece.response_ids]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == document.text
        assert [piece.stop for piece in pieces] == ["length"] * (len(pieces) - 1) + ["eos"]
        assert {piece.prompt_id for piece in pieces} == {document.id}


def test_a_document_of_one_token_has_none_to_predict() -> None:
    assert list(Tokenized(begin=(), ids=(5,)).cut(4)) == []
    assert list(Tokenized(begin=(1,), ids=(5,)).cut(4)) == [((1,), (5,))]


def test_what_spells_a_control_token_is_text(tokenizer: Any) -> None:
    (found,) = tokenized(["<|im_end|>"], tokenizer)
    assert len(found.ids) > 2 and found.ids.count(tokenizer.eos_token_id) == 1


def test_white_space_makes_no_other_document() -> None:
    one, same, other = (Document(text=text, where="x") for text in ("a  b\n", " a b", "a c"))
    assert one.id == same.id != other.id and one.number(3) == same.number(3) != one.number(4)


def test_lots_end_by_number_and_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LOT", 3)
    monkeypatch.setattr(documents, "LOT_CHARACTERS", 10)
    texts = ["a", "b" * 10, None, "c", "d", "e", "f" * 30]
    every = [text and Document(text=text, where="x") for text in texts]
    lots = [[one.text if one else None for one in lot] for lot in lots_of(iter(every))]  # type: ignore[arg-type]
    assert lots == [["a", "b" * 10], [None, "c", "d"], ["e", "f" * 30]]


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": " "}\r\n{"text": 5}\nno json\n')
    found = documents_of(TextSource(name=str(path)))
    first = next(found)
    assert first is not None and (first.text, first.where) == ("one", f"{path}, line 1")
    assert next(found) is None
    with pytest.raises(LimbeckError, match="line 4: expected text in 'text', got int"):
        next(found)


def test_the_digest_of_a_file_is_of_its_bytes(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "text.jsonl"
    path.write_bytes(data := b"x" * (3 << 20))
    assert source_digest(str(path)) == hashlib.sha256(f"{path.name}\n{len(data)}\n".encode() + data).hexdigest()


def test_a_streamed_data_set_gives_the_rows_of_a_loaded_one(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"text": f"row {i}", "none": None} for i in range(5)])
    table.save_to_disk(tmp_path / "saved")
    streamed = [dict(row.row) for row in _read_stream(table.to_iterable_dataset(), "it")]
    assert streamed == [dict(row.row) for row in rows_of(str(tmp_path / "saved"))]
    parquet = tmp_path / "text.parquet"
    table.to_parquet(parquet)
    assert [d.text for d in documents_of(TextSource(name=str(parquet))) if d] == [f"row {i}" for i in range(5)]


def test_a_row_of_prompts_says_which_source_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Hello?"}) + "\n")
    with pytest.raises(LimbeckError, match=r"got the fields prompt, expected 'text'.*text_field.*source=teacher"):
        documents.first_text(TextSource(name=str(path)))
