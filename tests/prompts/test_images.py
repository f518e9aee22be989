"""Images of rows: where they stand, what is refused with its row, and what stays of them on disk."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL", reason="images need Pillow: pip install 'limbeck[vision]'")

from PIL import Image

from limbeck.models.images import ImageFolder, decode_image, image_id
from limbeck.models.loading import load_tokenizer
from limbeck.prompts.formats import Example
from limbeck.prompts.images import RowImages, images_digest
from limbeck.prompts.io import read_prompts, write_prompts
from limbeck.prompts.readers import PlacedRow, rows_of
from limbeck.prompts.sources import PromptSet, load_prompts
from limbeck.prompts.templates import encode_prompts, encode_responses
from limbeck.types import LimbeckError, Prompt
from tests.tiny_vision import FAMILIES, Family, write_processor, write_vision_model


def png(colour: str = "red", *, side: int = 8) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(data, "PNG")
    return data.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that says it is so large and holds nothing."""
    fields = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + fields, b"IDAT" + zlib.compress(bytes(8)), b"IEND"):
        data += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data


def animation() -> bytes:
    data = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:])
    return data.getvalue()


def read(folder: Path, *rows: dict[str, Any], images: bool = True) -> PromptSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    reader = RowImages(ImageFolder(folder / "kept")) if images else None
    return load_prompts(str(path), heldout_fraction=1.0, images=reader)


def parts_of(prompt: Prompt) -> list[Any]:
    return [
        part if isinstance(part, str) else "IMAGE"
        for turn in prompt.messages or ()
        for part in turn.parts or [turn.content]
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png("blue"))
    return tmp_path


FORMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "blocks": (
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
            "images": ["a.png"],
        },
        ["IMAGE", "What?"],
    ),
    "blocks_with_paths": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image", "path": "a.png"}]}
            ]
        },
        ["See", "IMAGE"],
    ),
    "spelt": (
        {"messages": [{"role": "user", "content": "First <image> then <image>?"}], "images": ["a.png", "b.png"]},
        ["First ", "IMAGE", " then ", "IMAGE", "?"],
    ),
    "no_place": ({"prompt": "What is it?", "image": "a.png"}, ["IMAGE", "What is it?"]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}],
            "image": "a.png",
        },
        ["IMAGE", "\nWhat?"],
    ),
    "instruction": (
        {"instruction": "Name it.", "input": "", "output": "Red.", "images": ["a.png"]},
        ["IMAGE", "Name it."],
    ),
    "two_turns": (
        {
            "messages": [
                {"role": "user", "content": "<image>One?"},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "And <image>?"},
            ],
            "images": ["a.png", "b.png"],
        },
        ["IMAGE", "One?", "Yes.", "And ", "IMAGE", "?"],
    ),
    "only_an_image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a.png"]}, ["IMAGE"]),
    "none": ({"messages": [{"role": "user", "content": "No image."}]}, ["No image."]),
}


@pytest.mark.parametrize("name", FORMS)
def test_images_stand_where_the_row_has_them(folder: Path, name: str) -> None:
    row, expected = FORMS[name]
    (prompt,) = read(folder, row).prompts
    found = parts_of(prompt) if prompt.messages else [prompt.text]
    assert found == expected
    assert len(prompt.images) == expected.count("IMAGE")
    for image in prompt.images:
        assert image_id((folder / "kept" / image).read_bytes()) == image
    write_prompts(folder / "prompts.jsonl", [prompt])
    assert read_prompts(folder / "prompts.jsonl") == [prompt]


def test_prompts_differ_by_their_images_and_not_by_their_order(folder: Path) -> None:
    """The released code attaches answers by position after a shuffle; here a prompt is named by what it holds."""
    rows = [{"prompt": "What?", "completion": c, "images": [f"{c}.png"]} for c in "ab"]
    there, turned = read(folder, *rows), read(folder, *rows[::-1])
    assert len({p.id for p in there.prompts}) == 2
    assert {p.id: p.completion for p in there.prompts} == {p.id: p.completion for p in turned.prompts}
    red = next(p for p in there.prompts if p.completion == "a")
    assert red.images == (image_id(png()),)


def test_bytes_of_parquet_and_of_datasets(folder: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    rows = [{"prompt": "What?", "images": [{"bytes": png(), "path": None}]}]
    features = Features({"prompt": Value("string"), "images": List(ImageFeature())})
    saved = Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(folder / "set"))
    saved.to_parquet(str(folder / "rows.parquet"))
    for source in (folder / "set", folder / "rows.parquet"):
        (prompt,) = load_prompts(str(source), heldout_fraction=1.0, images=RowImages()).prompts
        assert prompt.images == (image_id(png()),)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"prompt": "x", "images": ["gone.png"]}, r"image 1 \('gone.png'\) does not exist"),
    "cut_off": ({"prompt": "x", "images": ["cut.png"]}, "cannot be decoded .* cut off or damaged"),
    "text": ({"prompt": "x", "images": ["text.png"]}, "is no image of a format that is read here"),
    "empty": ({"prompt": "x", "images": ["empty.png"]}, "is no image of a format that is read here .it is empty"),
    "program": (
        {"prompt": "x", "images": ["program.png"]},
        r"is no image of a format that is read here \(it begins with b'%!PS-Adobe.*expected one of PNG, JPEG, .*; "
        "save it as one of these",
    ),
    "folder": ({"prompt": "x", "images": ["inner"]}, r"image 1 \('inner'\) is a folder, pipe or device"),
    "pipe": ({"prompt": "x", "images": ["pipe"]}, r"image 1 \('pipe'\) is a folder, pipe or device"),
    "animated": ({"prompt": "x", "images": ["moving.gif"]}, "has 2 frames"),
    "bomb": ({"prompt": "x", "images": ["bomb.png"]}, "pixels, expected at most 89,478,485"),
    "large": ({"prompt": "x", "images": ["large.png"]}, "has 10000 x 10000 pixels, expected at most 89,478,485"),
    "address": ({"prompt": "x", "images": ["https://example.org/a.png"]}, "nothing is fetched here"),
    "number": ({"prompt": "x", "images": [5]}, "image 1 is 5, expected a path"),
    "nul": ({"prompt": "x", "images": ["a\0.png"]}, "expected a path"),
    "two_for_one": (
        {"messages": [{"role": "user", "content": "<image> What?"}], "images": ["a.png", "b.png"]},
        "got 2 images in the column and 1 places for them",
    ),
    "one_for_two": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "images": ["a.png"]},
        "got 1 images in the column and 2 places for them",
    ),
    "none_for_one": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "got 0 images in the column and 1 places",
    ),
    "both_columns": ({"prompt": "x", "images": ["a.png"], "image": "b.png"}, "got both 'images' and 'image'"),
    "in_the_answer": (
        {
            "messages": [
                {"role": "user", "content": "Draw."},
                {"role": "assistant", "content": [{"type": "image", "path": "a.png"}]},
            ]
        },
        "the answer holds an image|conversation",
    ),
    "in_the_system": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "image", "path": "a.png"}]},
                {"role": "user", "content": "Hi"},
            ]
        },
        "a turn of the system holds an image",
    ),
    "video": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "got a block of type 'video'"),
    "video_column": ({"prompt": "x", "video": "a.mp4"}, "the column 'video' belongs to the prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_one_line_with_its_row(folder: Path, name: str) -> None:
    import os

    (folder / "cut.png").write_bytes(png(side=64)[:-60])
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").touch()
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n")
    (folder / "inner").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "moving.gif").write_bytes(animation())
    (folder / "bomb.png").write_bytes(header_of(1_000_000_000, 1))
    (folder / "large.png").write_bytes(header_of(10_000, 10_000))
    row, message = BAD[name]
    with pytest.raises(LimbeckError, match=f"rows.jsonl, line 2: .*(?:{message})") as caught:
        read(folder, {"prompt": "first", "image": "a.png"} if "prompt" in row else FORMS["blocks"][0], row)
    assert "\n" not in str(caught.value) and str(caught.value).count("line 2") == 1


def test_a_row_of_the_hub_names_no_file_of_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, fetched = folder / "data", folder / "fetched"
    for one in (data / "inner", fetched / "snapshot"):
        one.mkdir(parents=True)
        (one / "c.png").write_bytes(png("green"))
    (data / "link.png").symlink_to(folder / "a.png")
    # A file of prompts is the user's own, wherever its images lie.
    for path in ("inner/c.png", "link.png", "../a.png", str(folder / "a.png"), f"file://{folder}/a.png"):
        assert len(read(data, {"prompt": "x", "image": path}).prompts) == 1

    def of_the_hub(**source: Any) -> list[Any]:
        placed = PlacedRow({"prompt": "x", "image": source}, "owner/name, row 7")
        (example,) = RowImages().placed([Example(text="x")], placed.row, placed)
        return [part for turn in example.messages or () for part in turn.parts]

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(fetched))
    assert of_the_hub(bytes=png(), path="a.png") and of_the_hub(bytes=None, path=str(fetched / "snapshot/c.png"))
    monkeypatch.chdir(folder)
    for path in ("a.png", str(folder / "a.png"), str(fetched / "../a.png"), "~/a.png"):
        with pytest.raises(LimbeckError, match=r"name, row 7: image 1 \(.*\) is a path, expected an image's bytes"):
            of_the_hub(bytes=None, path=path)


def test_images_are_refused_where_only_text_is_read(folder: Path) -> None:
    with pytest.raises(LimbeckError, match="the column 'images' belongs to the prompt"):
        read(folder, FORMS["blocks"][0], images=False)
    with pytest.raises(LimbeckError, match="only text conversations are read"):
        read(folder, FORMS["blocks_with_paths"][0], images=False)


def test_a_changed_image_changes_the_digest(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps(FORMS[name][0]) + "\n" for name in ("blocks", "blocks_with_paths")), "utf-8"
    )

    def digest() -> str | None:
        return images_digest((placed.row, placed) for placed in rows_of(str(folder / "rows.jsonl")))

    before = digest()
    assert before is not None and digest() == before
    (folder / "a.png").write_bytes(png("green"))
    assert digest() != before


BLOCKS = {
    "video": ({"type": "video"}, "got a block of type 'video' in 'messages'"),
    "audio": ({"type": "audio", "path": "a.wav"}, "got a block of type 'audio' in 'messages'"),
    "text": ({"type": "text", "text": 5}, "got a block of type 'text' without a text in 'messages'"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_another_kind_is_named_with_its_row_where_images_are_hashed(folder: Path, name: str) -> None:
    block, message = BLOCKS[name]
    row = {"messages": [{"role": "user", "content": [block, {"type": "image", "path": "a.png"}]}]}
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (FORMS["blocks"][0], row)), "utf-8")
    with pytest.raises(LimbeckError, match=f"rows.jsonl, line 2: {message}"):
        images_digest((placed.row, placed) for placed in rows_of(str(path)))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_of_pixels_are_read(format: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, format)
    assert decode_image(data.getvalue(), "image").size == (8, 8)


def test_a_damaged_copy_is_seen(folder: Path) -> None:
    (prompt,) = read(folder, FORMS["no_place"][0]).prompts
    kept = ImageFolder(folder / "kept")
    assert kept.open(prompt.images[0]).size == (8, 8)
    (folder / "kept" / prompt.images[0]).write_bytes(png("green"))
    with pytest.raises(LimbeckError, match="is damaged; delete it and run the same command again"):
        kept.open(prompt.images[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_answers_as_the_processor_writes_them(folder: Path, family: Family) -> None:
    """The ids of a prompt, its placeholders expanded by nobody yet, are those of apply_chat_template; the prompt ends
    with the template's opening of the answer (which the released code misspells), and images are out of the answer."""
    write_vision_model(folder / "model", family)
    tokenizer: Any = load_tokenizer(folder / "model")
    rows = [FORMS[name][0] for name in ("blocks", "none")]
    rows[0] = {**rows[0], "messages": [*rows[0]["messages"], {"role": "assistant", "content": "red"}]}
    rows[1] = {**rows[1], "messages": [*rows[1]["messages"], {"role": "assistant", "content": "blue"}]}
    prompts = read(folder, *rows).prompts
    for prompt, encoded, response in zip(
        prompts, encode_prompts(prompts, tokenizer), encode_responses(prompts, tokenizer), strict=True
    ):
        turns: Any = [
            {**t.as_turn(), "content": t.as_turn()["content"] if t.parts else [{"type": "text", "text": t.content}]}
            for t in prompt.messages or ()
        ]
        expected: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(encoded.ids) == list(expected) and encoded.images == prompt.images
        assert tokenizer.decode(encoded.ids).endswith("<|im_start|>assistant\n")
        assert (response.prompt_ids, response.images) == (encoded.ids, prompt.images)
        assert tokenizer.decode(response.response_ids) == f"{prompt.completion}<|im_end|>"


def test_a_template_that_leaves_images_out_is_refused(folder: Path) -> None:
    write_vision_model(folder / "model", "llava")
    tokenizer: Any = load_tokenizer(folder / "model")
    prompts = read(folder, FORMS["blocks"][0]).prompts
    with pytest.raises(LimbeckError, match="has images, which template 'plain' has no words for"):
        encode_prompts(prompts, tokenizer, "plain")
    tokenizer.chat_template = tokenizer.chat_template.replace("<image>", "")
    with pytest.raises(LimbeckError, match=r"has 1 images, and the chat template of .* writes 0 placeholders"):
        encode_prompts(prompts, tokenizer)


def test_text_that_spells_the_placeholder_is_refused(folder: Path) -> None:
    """In a row without a column of images it is a control token like any other."""
    write_vision_model(folder / "model", "llava")
    write_processor(folder / "model", "llava")
    prompts: list[Prompt] = list(read(folder, {"prompt": "What does <image> mean?"}).prompts)
    with pytest.raises(LimbeckError, match="spells the control token <image>"):
        encode_prompts(prompts, load_tokenizer(folder / "model"))
