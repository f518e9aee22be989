"""Where prompts come from, what is refused with file and line, and what the split promises."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limbeck.prompts import hub
from limbeck.prompts.formats import Example, instruction_example
from limbeck.prompts.readers import source_digest
from limbeck.prompts.references import require_answers_for_sft
from limbeck.prompts.scratch import ScratchFile
from limbeck.prompts.sources import (
    PromptSet,
    asked_id,
    canonical_content,
    content_id,
    load_prompts,
    split_of,
    with_heldout,
)
from limbeck.types import LimbeckError, Message

TWENTY = [{"prompt": f"Question number {n}?"} for n in range(20)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path | str, **options: Any) -> PromptSet:
    return load_prompts(str(path), heldout_fraction=options.pop("heldout_fraction", 0.3), **options)


def asked(loaded: PromptSet) -> set[str | None]:
    return {prompt.text for prompt in loaded.prompts}


TWENTY_TEXTS = {row["prompt"] for row in TWENTY}


def test_jsonl_with_blank_lines_bom_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in TWENTY))
    loaded = load(path)
    assert asked(loaded) == TWENTY_TEXTS
    assert loaded.counts() | {"train": 0, "heldout": 0} == {
        "rows": 20, "duplicates": 0, "contradicted": 0, "limited": 0, "train": 0, "heldout": 0, "with_completion": 0,
    }  # fmt: skip


@pytest.mark.parametrize("lines", [False, True])
def test_json_holds_an_array_or_lines(tmp_path: Path, lines: bool) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, TWENTY)) if lines else json.dumps(TWENTY, indent=1), encoding="utf-8")
    assert asked(load(path)) == TWENTY_TEXTS


def test_parquet_folder_glob_and_saved_data_set_hold_the_same(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(TWENTY)
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0, 1])}).save_to_disk(tmp_path / "dict")
    write_rows(tmp_path / "a-0.jsonl", TWENTY[:7])
    write_rows(tmp_path / "a-1.jsonl", TWENTY[7:])
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "0.jsonl", TWENTY[:7])
    (folder / "notes.txt").write_text("not read")
    data.select(range(7, 20)).to_parquet(folder / "1.parquet")
    prompts = load(tmp_path / "rows.parquet").prompts
    assert len(prompts) == 20
    for source in ("saved", "dict", "a-*.jsonl", "folder"):
        assert load(tmp_path / source).prompts == prompts
    with pytest.raises(LimbeckError, match="has the splits train, test, not 'dev'; set"):
        load(tmp_path / "dict", dataset_split="dev")


def test_nulls_of_a_columnar_file_count_as_absent(tmp_path: Path) -> None:
    import datasets

    rows = [{"instruction": f"Task {n}", "input": None, "output": None, "messages": None} for n in range(20)]
    rows[3] |= {"input": "given", "output": "answer"}
    datasets.Dataset.from_list(rows[3:] + rows[:3]).to_parquet(tmp_path / "rows.parquet")
    loaded = load(tmp_path / "rows.parquet")
    assert loaded.with_completion == 1
    assert {prompt.instruction for prompt in loaded.prompts} >= {("Task 3", "given"), ("Task 4", "")}


def test_a_digest_changes_with_any_byte_of_any_file(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a-0.jsonl", TWENTY), write_rows(tmp_path / "a-1.jsonl", TWENTY[:3])
    sources = [str(first), str(tmp_path), str(tmp_path / "a-*.jsonl")]
    before = [source_digest(source) for source in sources]
    assert None not in before
    assert before == [source_digest(source) for source in sources]
    write_rows(second, TWENTY[:4])
    after = [source_digest(source) for source in sources]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, False]
    assert source_digest("builtin") not in (None, *after)
    assert source_digest("somebody/something") is None


def test_absent_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for absent in ("nothing.jsonl", "./nothing", str(tmp_path / "nothing"), str(tmp_path / "*.jsonl")):
        with pytest.raises(LimbeckError, match="does not exist; give a file or folder, a hub id, or builtin"):
            load(absent)
    (tmp_path / "rows.csv").write_text("prompt\nhello\n")
    with pytest.raises(LimbeckError, match=r"rows.csv is not one of \.jsonl"):
        load(tmp_path / "rows.csv")
    with pytest.raises(LimbeckError, match="holds neither a saved data set nor"):
        load(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(LimbeckError, match=r"rows.parquet is no readable parquet file"):
        load(tmp_path / "rows.parquet")


def test_an_unreachable_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str, config: str | None, split: str) -> None:
        assert (name, config, split) == ("nobody/nothing", "main", "test")
        raise ConnectionError("Couldn't reach 'nobody/nothing'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(hub, "_why_unreachable", lambda name: "")
    with pytest.raises(LimbeckError) as caught:
        load("nobody/nothing", dataset_config="main", dataset_split="test")
    assert re.fullmatch(r"nobody/nothing is neither a local .*Couldn't reach .* on the Hub.*login", str(caught.value))


def test_a_hub_id_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(hub, "_why_unreachable", lambda name: "")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_list(TWENTY))
    assert asked(load("somebody/something")) == TWENTY_TEXTS


def test_without_a_network_one_request_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` is asked for what it has on disk alone, and everything is as it was afterwards."""
    import datasets.config
    from huggingface_hub import constants

    seen = []

    def cached(name: str, config: str | None, split: str) -> datasets.Dataset:
        seen.append((datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))  # type: ignore[attr-defined]
        return datasets.Dataset.from_list(TWENTY)

    for module in (datasets.config, constants):  # type: ignore[attr-defined]
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert asked(load("somebody/something")) == TWENTY_TEXTS
    assert seen == [(True, True)]
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)  # type: ignore[attr-defined]


def test_what_cannot_be_a_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("some/where/else", "my prompts"):
        with pytest.raises(LimbeckError, match=f"{name} does not exist and is no hub id"):
            load(name)


BAD_LINES = {
    "truncated": ('{"prompt": "half', r"line 3, column 12: malformed JSON \(Unterminated string"),
    "array": ('["prompt"]', r"line 3: expected a JSON object with named fields, got list"),
    "unknown": ('{"text": "x", "a": null}', r"line 3: got the fields text, expected one of the formats prompt"),
    "nameless": ("{}", r"line 3: got the fields none, expected one of the formats"),
    "blank": ('{"prompt": " \\n"}', r"line 3: got a blank 'prompt', expected a prompt"),
    "mixed": ('{"question": "x"}', r"line 3: got the format 'question' after 'prompt' in .*rows\.jsonl, line 1"),
    "number": ('{"prompt": 3}', r"line 3: got 3 in 'prompt', expected text or a list of messages"),
    "surrogate": ('{"prompt": "\\ud800"}', r"line 3: 'prompt' holds half of a surrogate pair"),
    "deep": ("[" * 100_000, r"line 3: unreadable JSON \(maximum recursion"),
    "digits": ('{"prompt": ' + "9" * 5000 + "}", r"line 3: unreadable JSON \(Exceeds the limit"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(TWENTY[0]) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(LimbeckError, match=rf"rows\.jsonl, {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_bad_rows_of_an_array_and_bad_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "x"},\n {"prompt": ""}]')
    with pytest.raises(LimbeckError, match=r"rows\.json, row 2: got a blank 'prompt'"):
        load(path)
    path.write_text('[{"prompt": "x"},\n {"prompt": }]')
    with pytest.raises(LimbeckError, match=r"rows\.json, line 2, column 13: malformed JSON"):
        load(path)
    path.write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(LimbeckError, match=r"rows\.json, line 1 is not UTF-8 \(byte 15\)"):
        load(path)


def test_empty_sources_and_empty_splits_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [])
    with pytest.raises(LimbeckError, match=r"rows\.jsonl holds no rows"):
        load(path)
    write_rows(path, TWENTY[:1])
    with pytest.raises(LimbeckError, match=r"1 prompts at prompts\.eval_fraction 1e-09 leave none for heldout"):
        load(path, heldout_fraction=1e-9)
    with pytest.raises(LimbeckError, match="leave none for train"):
        load(path, heldout_fraction=1 - 1e-9)


def test_held_out_prompts_of_another_source(tmp_path: Path) -> None:
    training = load(write_rows(tmp_path / "rows.jsonl", TWENTY), heldout_fraction=None)
    assert {prompt.split for prompt in training.prompts} == {"train"} and len(training.prompts) == 20
    other = load(write_rows(tmp_path / "test.jsonl", [{"prompt": "and this?"}]), heldout_fraction=1.0)
    both = with_heldout(training, other)
    assert both.counts()["train"] == 20 and both.of("heldout") == other.prompts
    assert list(both.prompts) == sorted(both.prompts, key=lambda prompt: prompt.id)
    # White space aside, as everywhere.
    again = [{"prompt": f"  {TWENTY[3]['prompt']} "}, {"prompt": "and this?"}]
    overlapping = load(write_rows(tmp_path / "test.jsonl", again), heldout_fraction=1.0)
    with pytest.raises(LimbeckError, match=r"test\.jsonl, line 1 asks what .*rows\.jsonl, line 4 asks, so 1 of 2"):
        with_heldout(training, overlapping)


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TWENTY)
    for fraction in (0.0, 1.1, -1.0, float("nan")):
        with pytest.raises(LimbeckError, match="eval_fraction is"):
            load(path, heldout_fraction=fraction)
    with pytest.raises(LimbeckError, match="limit is 1, expected at least 2"):
        load(path, limit=1)


def test_fields_name_the_prompt_of_any_other_format(tmp_path: Path) -> None:
    rows = [{"text": f"Write a function {n}", "code": "pass", "messages": []} for n in range(20)]
    path = write_rows(tmp_path / "mbpp.jsonl", rows)
    loaded = load(path, fields={"prompt": "text", "completion": "code"})
    assert asked(loaded) == {row["text"] for row in rows}
    assert {prompt.completion for prompt in loaded.prompts} == {"pass"}
    with pytest.raises(LimbeckError, match=r"line 1: expected the field 'txt' that prompts.fields names, got code"):
        load(path, fields={"prompt": "txt"})
    with pytest.raises(LimbeckError, match="names no field for 'prompt'"):
        load(path, fields={"completion": "code"})


def test_duplicates_are_kept_once_and_counted(tmp_path: Path) -> None:
    more = [
        {"prompt": "  Question  number 3?\n", "completion": "late"},
        {"prompt": [{"role": "user", "content": "New"}]},
    ]
    loaded = load(write_rows(tmp_path / "rows.jsonl", TWENTY + TWENTY[:5] + more))
    assert (loaded.rows, loaded.duplicates, loaded.contradicted, len(loaded.prompts)) == (27, 6, 1, 21)
    assert loaded.with_completion == 0


def test_an_answer_that_calls_a_tool_is_one(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "Will it rain?"}, answer]}])
    loaded = load(path, heldout_fraction=None)
    (prompt,) = loaded.prompts
    assert prompt.completion is None and prompt.answered and loaded.with_completion == 1
    require_answers_for_sft(loaded.prompts)
    with ScratchFile(tmp_path) as scratch:
        scratch.append(prompt)
        assert scratch.since(0).answered == loaded.with_completion


def test_one_question_with_several_contexts_is_several_prompts_of_one_split(tmp_path: Path) -> None:
    """What the teacher sees with it is part of a prompt; what the student reads decides the split."""
    rows = [{"prompt": "What is shown?", "context": text, "answer": text} for text in ("a cat", "a dog", "a cat")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    options: dict[str, Any] = {"seen_columns": ("context", "answer"), "heldout_fraction": None}
    loaded = load(path, distinct_columns=("context",), **options)
    assert {prompt.columns["context"] for prompt in loaded.prompts} == {"a cat", "a dog"} and loaded.duplicates == 1
    assert len({prompt.id for prompt in loaded.prompts}) == 2
    (plain,) = load(path, **options).prompts
    assert plain.id == content_id(canonical_content(plain)) == asked_id(loaded.prompts[0])
    many = write_rows(tmp_path / "many.jsonl", [{**row, "prompt": f"{n}?"} for n in range(20) for row in rows[:2]])
    halves = load(many, distinct_columns=("context",), seen_columns=("context", "answer"), heldout_fraction=0.5)
    asked_of = {split: {p.text for p in halves.of(split)} for split in ("train", "heldout")}
    assert len(halves.prompts) == 40 and not asked_of["train"] & asked_of["heldout"]
    other = load(write_rows(tmp_path / "test.jsonl", [{**rows[0], "context": "a bird"}]), **options)
    with pytest.raises(LimbeckError, match=r"test\.jsonl, line 1 asks what .*rows\.jsonl, line \d asks, so 1 of 1"):
        with_heldout(loaded, other)


def test_a_prompt_is_the_same_in_every_format() -> None:
    turn = (Message(role="user", content="Add these.\n\n2, 3"),)
    same = {
        canonical_content(Example(text="Add these. 2, 3")),
        canonical_content(Example(messages=turn)),
        canonical_content(replace(instruction_example("Add these.", "2, 3", category="maths"), completion="5")),
    }
    assert len(same) == 1
    system = (Message(role="system", content="Be brief."), *turn)
    assert canonical_content(Example(messages=system)) not in same


def test_ids_and_splits_never_change() -> None:
    content = canonical_content(Example(text="Why is the sky blue?"))
    assert content == '[["user", "Why is the sky blue?"]]'
    assert content_id(content) == GOLDEN_ID
    assert "".join(split_of(content, 0.5, seed)[0] for seed in range(12)) == GOLDEN_SPLITS


# Fixed: a change would make every earlier run train on what was held out.
GOLDEN_ID = "0c5f70887097729b"
GOLDEN_SPLITS = "hhthttttthtt"

PROMPTS = st.lists(st.text(min_size=1, max_size=12).filter(lambda text: bool(text.strip())), min_size=8, max_size=40)


@given(texts=PROMPTS, fraction=st.floats(0.2, 0.8), seed=st.integers(0, 9), order=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_split_is_disjoint_stable_and_blind_to_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], fraction: float, seed: int, order: Any
) -> None:
    path = tmp_path_factory.mktemp("split") / "rows.jsonl"
    splits = {split_of(canonical_content(Example(text=text)), fraction, seed) for text in texts}
    assume(splits == {"train", "heldout"})
    loaded = load_prompts(
        str(write_rows(path, [{"prompt": text} for text in texts])), heldout_fraction=fraction, split_seed=seed
    )
    spaceless = [
        {" ".join((prompt.text or "").split()) for prompt in loaded.of(split)} for split in ("train", "heldout")
    ]
    assert spaceless[0].isdisjoint(spaceless[1])
    assert spaceless[0] | spaceless[1] == {" ".join(text.split()) for text in texts}
    assert loaded.rows == len(texts) == len(loaded.prompts) + loaded.duplicates
    assert [prompt.id for prompt in loaded.prompts] == sorted({prompt.id for prompt in loaded.prompts})

    order.shuffle(texts)
    extra = [*texts, "Somebody added this row later."]
    again = load_prompts(
        str(write_rows(path, [{"prompt": text} for text in extra])), heldout_fraction=fraction, split_seed=seed
    )
    split_by_id = {prompt.id: prompt.split for prompt in again.prompts}
    assert {prompt.id: prompt.split for prompt in loaded.prompts}.items() <= split_by_id.items()


@given(text=st.text(max_size=20), small=st.floats(0.01, 0.99), large=st.floats(0.01, 0.99), seed=st.integers())
def test_a_larger_fraction_only_moves_prompts_to_heldout(text: str, small: float, large: float, seed: int) -> None:
    small, large = sorted((small, large))
    if split_of(text, small, seed) == "heldout":
        assert split_of(text, large, seed) == "heldout"


def test_the_share_is_the_fraction_and_seeds_differ() -> None:
    shares = [sum(split_of(f"{n}", 0.1, seed) == "heldout" for n in range(5000)) for seed in range(2)]
    # Binomial with mean 500 and standard deviation 21: five of them.
    assert all(394 < share < 606 for share in shares)
    both = sum(split_of(f"{n}", 0.1, 0) == split_of(f"{n}", 0.1, 1) == "heldout" for n in range(5000))
    assert both < 100


def test_a_limit_keeps_a_subset_by_hash(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", TWENTY)
    whole, some = load(path), load(path, limit=12)
    assert some.prompts == whole.prompts[:12]
    assert (some.limited, some.counts()["limited"]) == (8, 8)
    assert load(path, limit=100).prompts == whole.prompts
