"""A store under attack: flipped bits, cut files, kills at any time, and more of it than fits into memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal as signals
import time
from pathlib import Path

import pytest

from limbeck.teachers.store.reader import Store
from limbeck.teachers.store.shards import OpenShard
from limbeck.teachers.store.verifying import verify
from limbeck.types import LimbeckError
from tests.teachers.store.made import content, heads, make, texts, tiny_teacher


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "store"
    make(path)
    return path


def test_flipped_bits_are_named_and_never_read(whole, tmp_path):
    path, draw, responses = tmp_path / "s", random.Random(0), texts()
    shutil.copytree(whole, path)
    files = [file for file in sorted(path.iterdir()) if file.name != ".lock"]
    expected, bits = content(path, responses), [8 * file.stat().st_size for file in files]
    unnoticed = misread = 0
    for number in range(1000):
        file = draw.choices(files, bits)[0] if number % 2 else draw.choice(files)
        data = bytearray(file.read_bytes())
        place = draw.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        stat, good = file.stat(), file.read_bytes()
        file.write_bytes(data)
        # Not even the time of change shows it.
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        unnoticed += file not in {fault.path for fault in verify(path)}
        if number % 5 == 0 and file.suffix == ".safetensors" and file.stem.isdigit():
            try:
                misread += content(path, responses) != expected
            except LimbeckError as error:
                assert "\n" not in str(error)
        file.write_bytes(good)
    assert (unnoticed, misread) == (0, 0)
    assert not verify(path)


def test_truncated_files_are_named_and_captured_again(whole, tmp_path):
    path, draw, responses = tmp_path / "s", random.Random(1), texts()
    shutil.copytree(whole, path)
    expected = content(path, responses)
    files = [file for file in sorted(path.iterdir()) if file.name != ".lock"]
    for _ in range(200):
        file = draw.choice(files)
        good = file.read_bytes()
        file.write_bytes(good[: draw.randrange(len(good))])
        assert file in {fault.path for fault in verify(path)}
        with pytest.raises(LimbeckError, match="damaged") as error:
            content(path, responses)
            heads(Store(path))
        assert "\n" not in str(error.value) and "store capture" in str(error.value)
        file.write_bytes(good)
    teacher, said = tiny_teacher(), []
    for number in range(len(files)):
        file = sorted(file for file in path.iterdir() if file.name != ".lock")[number]
        file.write_bytes(file.read_bytes()[:-1])
        make(path, said=said, teacher=teacher)
        assert content(path, responses) == expected, file
    assert not verify(path) and "000001.safetensors is damaged; it is captured again" in " ".join(said)


def test_a_kill_at_any_time_loses_and_doubles_nothing(tmp_path):
    """In a child, so that the time of a kill falls anywhere in a capture, between two bytes of a file too."""
    responses, teacher, draw = texts(12), tiny_teacher(), random.Random(2)
    started = time.monotonic()
    make(tmp_path / "timed", responses, teacher=teacher, shard_responses=2)
    takes, killed = time.monotonic() - started, 0
    expected = content(tmp_path / "timed", responses)
    for number in range(50):
        path = tmp_path / f"s{number % 5}"
        child = os.fork()
        if not child:
            try:
                make(path, responses, teacher=teacher, shard_responses=2)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, takes))
        os.kill(child, signals.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if number >= 45:
            make(path, responses, teacher=teacher, shard_responses=2)
            assert content(path, responses) == expected and not verify(path)
            addresses = [a for shard in Store(path).seals for a in OpenShard(shard).addresses]
            assert len(addresses) == len(set(addresses)) == len(responses)
    assert killed


def test_memory_does_not_grow_with_the_store(tmp_path):
    """A shard of 10 GB of which most is a hole in a sparse file: reading all over it keeps nothing of it in memory."""
    rows, width = 160_000, 16_384
    path = tmp_path / "000000.safetensors"
    tensors = {
        "index.address": ("U8", [rows, 16], 16),
        "index.first": ("I64", [rows], 8),
        "index.tokens": ("I64", [rows], 8),
        "index.crc": ("U32", [rows], 4),
        "column.hidden": ("F32", [rows, width], 4 * width),
    }
    header, at = {}, 0
    for name, (dtype, shape, row) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + rows * row]}
        at += rows * row
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    assert path.stat().st_size > 10e9

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    shard = OpenShard(path)
    shard._rows("column.hidden", 0, 1)
    before = resident()
    for start in range(0, rows, 400):
        assert not shard._rows("column.hidden", start, start + 4).any()
    assert resident() - before < 16 << 20
