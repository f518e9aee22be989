"""A store on disk: found by exact ids, whole or made again whatever happens to it, written by one process at a time."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from limbeck.pipeline.store_verbs import store as verbs
from limbeck.rollouts.collate import collate
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.store.addresses import address_of, addresses_of
from limbeck.teachers.store.dense import Hidden, Svd
from limbeck.teachers.store.estimate import Length, estimate, total_bytes
from limbeck.teachers.store.manifest import read_manifest
from limbeck.teachers.store.merging import merge
from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.shards import OpenShard
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.teachers.store.texts import Text, prompt_key
from limbeck.teachers.store.verifying import verify
from limbeck.teachers.store.writer import writing
from limbeck.types import DenseSignal, LimbeckError, TopKSignal
from tests.teachers.store.made import FRAME, content, heads, make, manifest, texts, tiny_teacher
from tests.training.play import tiny_responses

SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "store"
    make(path)
    return path


def test_an_address_is_the_same_for_a_response_and_its_row_of_a_batch():
    responses = tiny_responses()
    long = replace(responses[0], response_ids=tuple(range(3, 15)), spans=((0, 3), (5, 9)))
    pictured = replace(responses[1], images=("a" * 16,))
    chosen = [responses[4], long, responses[2], pictured]
    assert addresses_of(collate(chosen, [2, 0, 1, 3], pad_id=0)) == [address_of(chosen[i]) for i in (2, 0, 1, 3)]
    # What comes after the last token of the loss is read by nothing.
    assert address_of(replace(long, response_ids=long.response_ids[:10])) == address_of(long)
    assert address_of(replace(long, prompt_id="other", author="teacher", round=3)) == address_of(long)
    others = [
        replace(long, spans=((0, 3), (5, 8))),
        replace(long, spans=((0, 4), (5, 9))),
        replace(long, prompt_ids=(*long.prompt_ids, 9)),
        replace(long, response_ids=(7, *long.response_ids[1:])),
        replace(long, images=("b",)),
        replace(long, prompt_ids=long.prompt_ids[:-1], response_ids=(long.prompt_ids[-1], *long.response_ids),
                spans=((1, 4), (6, 10))),
    ]  # fmt: skip
    # The last one is the same ids with the same ones in the loss, cut otherwise into prompt and answer.
    assert len({address_of(one) for one in [long, *others]}) == len(others)
    assert address_of(others[-1]) == address_of(long)


def test_signals_are_read_as_the_teacher_gives_them(whole):
    teacher, responses, store = tiny_teacher(), texts(), Store(whole)
    known = heads(store)
    train = store.signal(collate(responses, [3, 0, 7], pad_id=0), known)
    dense = teacher.signal(collate(responses, [3, 0, 7], pad_id=0))
    logits_NV = dense.hidden_ND @ teacher.head.weight_VD[: FRAME.vocab_size].T
    assert isinstance(train, TopKSignal) and train.temperatures == (1.0, 2.0)
    assert torch.equal(train.ids_NK[:, 0], logits_NV.argmax(-1))
    assert torch.allclose(train.logp_NK[:, 0], logits_NV.log_softmax(-1).max(-1).values, atol=1e-2)
    log_z_N = (logits_NV.log_softmax(-1) / 2).logsumexp(-1)
    assert torch.allclose(train.log_z_NG[:, 1], log_z_N, atol=1e-5)
    held = store.signal(collate(responses, [20, 18], pad_id=0), known)
    expected = teacher.signal(collate(responses, [20, 18], pad_id=0))
    assert isinstance(held, DenseSignal)
    assert torch.allclose(held.hidden_ND, expected.hidden_ND, atol=1e-5)
    assert torch.equal(held.head.weight_VD, teacher.head.weight_VD[: FRAME.vocab_size])


def test_another_text_has_no_signal(whole):
    other = replace(texts()[0], prompt_ids=(5, *texts()[0].prompt_ids[1:]))
    with pytest.raises(LimbeckError, match=r"no signal for 1 of 2 responses.*other texts, or with another template"):
        Store(whole).signal(collate([texts()[1], other], [0, 1], pad_id=0), {})


def test_what_is_there_is_not_captured_again_and_new_texts_are_added(tmp_path):
    class Counting(LocalTeacher):
        asked = 0

        def signal(self, batch):
            Counting.asked += len(batch.ids)
            return super().signal(batch)

    model = tiny_teacher()
    teacher, responses = Counting(model.model, model.head), texts()
    first = make(tmp_path / "s", responses[:12], teacher=teacher)
    before = content(tmp_path / "s", responses[:12])
    again = make(tmp_path / "s", responses[:12], teacher=teacher)
    assert (first.added, first.found, again.added, again.found) == (12, 0, 0, 12) and Counting.asked == 12
    # A text that comes twice is one.
    more = make(tmp_path / "s", [*responses, replace(responses[15], prompt_id="twin")], teacher=teacher)
    assert (more.added, more.found) == (len(responses) - 12, 12)
    assert content(tmp_path / "s", responses[:12]) == before
    addresses = [a for shard in Store(tmp_path / "s").seals for a in OpenShard(shard).addresses]
    assert len(addresses) == len(set(addresses)) == len(responses)


def test_two_writers_are_one_too_many(whole, tmp_path):
    path = tmp_path / "s"
    shutil.copytree(whole, path)
    with (
        writing(path, manifest(), say=print),
        pytest.raises(LimbeckError, match=rf"in use by another process \(process {os.getpid()}\); wait for it"),
        writing(path, manifest(), say=print),
    ):
        pass
    assert len(content(path, texts())) == len(texts())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": replace(manifest().teacher, fingerprint="0" * 64)}, "another teacher"),
        ({"teacher": replace(manifest().teacher, dtype="bfloat16")}, "another dtype of the teacher"),
        ({"tokenizer": "0" * 64}, "another tokenizer"),
        ({"template": {"name": "plain"}}, "another template"),
        ({"codec": TopK(k=9)}, "another codec"),
        ({"heldout": Hidden(dtype="float16")}, "another codec of held-out texts"),
        ({"frame": replace(FRAME, temperatures=(1.0,))}, "another temperatures"),
        ({"frame": replace(FRAME, vocab_size=99)}, "another vocab_size"),
    ],
)
def test_a_store_of_something_else_is_not_added_to(whole, change, said):
    with pytest.raises(LimbeckError, match=rf"{said}.*store of its own") as error:
        make(whole, identity=replace(manifest(), **change))
    assert "\n" not in str(error.value)


def test_a_folder_of_other_things_is_no_store(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(LimbeckError, match=r"holds notes.txt and no store.json"):
        make(tmp_path)
    with pytest.raises(LimbeckError, match="is a file"):
        make(tmp_path / "notes.txt")
    for reading in (verify, read_manifest):
        with pytest.raises(LimbeckError, match=r"is no store .*limbeck store capture RECIPE"):
            reading(tmp_path)


def test_a_store_that_lost_its_manifest_alone_gets_it_back(tmp_path):
    path, responses = tmp_path / "store", texts()
    make(path, responses)
    before, manifest_text = content(path, responses), (path / "store.json").read_bytes()
    (path / "store.json").unlink()
    with pytest.raises(LimbeckError, match=r"holds .* and no store\.json"):
        make(path, responses, identity=replace(manifest(), tokenizer="u" * 64))
    assert make(path, responses).added == 0
    assert content(path, responses) == before and (path / "store.json").read_bytes() == manifest_text


def test_the_identity_of_a_store_is_read_as_it_was_written(whole):
    assert read_manifest(whole) == manifest()


def test_merged_stores_hold_each_text_once(tmp_path):
    responses, teacher = texts(), tiny_teacher()
    make(tmp_path / "a", responses[:14], teacher=teacher)
    make(tmp_path / "b", responses[8:], teacher=teacher)
    before = content(tmp_path / "a", responses[:14])
    merge(tmp_path / "c", [tmp_path / "a", tmp_path / "b"], say=print)
    assert content(tmp_path / "c", responses)[:14] == before and not verify(tmp_path / "c")
    assert sum(seal["responses"] for seal in Store(tmp_path / "c").seals.values()) == len(responses)
    # A third time adds nothing.
    merge(tmp_path / "c", [tmp_path / "b"], say=print)
    assert sum(seal["responses"] for seal in Store(tmp_path / "c").seals.values()) == len(responses)
    make(tmp_path / "d", responses[:4], identity=replace(manifest(), tokenizer="0" * 64), teacher=teacher)
    with pytest.raises(LimbeckError, match="another tokenizer"):
        merge(tmp_path / "e", [tmp_path / "a", tmp_path / "d"], say=print)
    with pytest.raises(LimbeckError, match="name another one to write"):
        merge(tmp_path / "a", [tmp_path / "a"], say=print)


def test_approximations_of_two_heads_are_not_merged(tmp_path):
    responses, teacher, codec = texts(), tiny_teacher(), manifest(Svd(rank=8))
    make(tmp_path / "a", responses[:10], identity=codec, teacher=teacher)
    make(tmp_path / "b", responses[10:], identity=codec, teacher=teacher)
    with pytest.raises(LimbeckError, match=r"svd.safetensors is not the same"):
        merge(tmp_path / "c", [tmp_path / "a", tmp_path / "b"], say=print)


def test_shards_of_a_lost_approximation_are_captured_again(tmp_path):
    responses, teacher, codec = texts(), tiny_teacher(), manifest(Svd(rank=8))
    make(tmp_path / "a", responses[:10], identity=codec, teacher=teacher)
    (tmp_path / "a" / "svd.safetensors").unlink()
    end = make(tmp_path / "a", responses, identity=codec, teacher=teacher)
    # Of the texts that are held out, which have the teacher's own head, none was there.
    assert (end.added, end.found) == (len(responses), 0) and not verify(tmp_path / "a")
    store = Store(tmp_path / "a")
    assert isinstance(store.signal(collate(responses, [2], pad_id=0), heads(store)), DenseSignal)


@pytest.mark.parametrize("codec", [TopK(k=8), TopK(k=64, bits=32), Sampled(), Hidden(dtype="bfloat16"), Svd(rank=16)])
def test_the_size_is_known_before_anything_is_captured(tmp_path, codec):
    responses = texts(120)
    make(tmp_path / "s", responses, identity=manifest(codec), shard_responses=256)
    written = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    lengths = {split: [Length(r.tokens, r.length) for r in responses if r.split == split] for split in SPLITS}
    train, held = lengths.values()
    foreseen = total_bytes(estimate(codec, manifest(codec).heldout, FRAME, train, held, number_bytes=4))
    assert foreseen == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("parts", [1, 2])
def test_answers_are_found_by_their_prompts_and_the_way_they_were_sampled(tmp_path, parts):
    responses, teacher, how = texts(), tiny_teacher(), {"temperature": 1.0, "stop": []}
    stores = [tmp_path / str(part) for part in range(parts)]
    for part, path in enumerate(stores):
        make(path, responses[part * 9 :], teacher=teacher, sampling=how)
    merge(tmp_path / "all", stores, say=print)
    store, keys = Store(tmp_path / "all"), [Text.of(response).key for response in responses]
    found = store.answers([*keys, b"0" * 16], how)
    assert found.keys() == {*keys} and store.samplings == [how]
    assert store.answers(keys, how | {"temperature": 0.5}) == {}
    for response in responses:
        answer = found[Text.of(response).key]
        assert (answer.ids[: answer.prompt], answer.ids[answer.prompt :]) == (
            response.prompt_ids,
            response.response_ids,
        )
        assert answer.stop == response.stop
    # The same prompt with a picture is another one.
    assert prompt_key(responses[0].prompt_ids, ("a",)) not in keys


def test_a_changed_answer_is_never_handed_out(tmp_path):
    responses, how = texts(12), {"temperature": 1.0}
    make(tmp_path / "s", responses, sampling=how)
    keys = [Text.of(response).key for response in responses]
    expected = Store(tmp_path / "s").answers(keys, how)
    shard = tmp_path / "s" / "000000.safetensors"
    good, place = shard.read_bytes(), text_place(shard)
    for number in range(place[0], place[1], 3):
        data = bytearray(good)
        data[number] ^= 4
        shard.write_bytes(data)
        with pytest.raises(LimbeckError, match="damaged"):
            Store(tmp_path / "s").answers(keys, how)
    shard.write_bytes(good)
    assert Store(tmp_path / "s").answers(keys, how) == expected


def text_place(shard: Path) -> tuple[int, int]:
    """Where the ids of the answers are in the file of a shard."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8 : 8 + length])["text.ids"]["data_offsets"]
    return 8 + length + first, 8 + length + end


def test_what_a_strangers_store_says_reaches_no_terminal_as_a_command(tmp_path: Path) -> None:
    known = manifest()
    odd = replace(known.teacher, name="tiny\x1b[2J\nbytes 7", dtype="float32\x9b1m")
    make(tmp_path / "store", texts(6), identity=replace(known, teacher=odd, template={"na\x07me": "ch\u202eat"}))
    end = CliRunner().invoke(verbs, ["inspect", str(tmp_path / "store")])
    assert end.exit_code == 0 and not set("\x1b\x9b\x07\u202e") & set(end.output)
    assert r"tiny\x1b[2J\nbytes 7" in end.output and r"na\x07me=ch\u202eat" in end.output
