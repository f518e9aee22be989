"""An exported draft in llama.cpp's own server, beside its exported teacher: loaded, drafting, and greedy as alone."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.export import export_model
from limbeck.models.loading import load_tokenizer
from tests.tiny_pair import TinyPair, questions

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp comes with xllamacpp: extra dev"
)

SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], 0
params.n_ctx, params.n_parallel = 256, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
if len(sys.argv) > 2:
    kind, draft = xllamacpp.common_speculative_type, params.speculative.draft
    params.speculative.types = [kind.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
    draft.mparams.path, draft.n_max = sys.argv[2], 4
    draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
    draft.cache_type_k = draft.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)
print("listening at", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def served(*files: Path) -> Iterator[Any]:
    """Ask llama.cpp for what follows some ids: the tokens, and what it counted; a second file is the draft."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *map(str, files)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    said = next((line for line in process.stdout if line.startswith("listening at")), None)
    assert said is not None, "llama.cpp does not load the files"

    def ask(ids: list[int]) -> Any:
        body = {"prompt": ids, "n_predict": 24, "temperature": 0.0, "return_tokens": True}
        request = urllib.request.Request(
            f"{said.split()[-1]}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        yield ask
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_greedy_answers_are_the_teachers_whatever_the_draft_says(tiny: TinyPair, tmp_path: Path) -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    if not hasattr(xllamacpp.CommonParams(), "speculative"):
        pytest.skip("this llama.cpp takes no draft model: pip install -U xllamacpp")
    tree = tiny.tree(tmp_path / "run", objective={"name": "lk"}, train={"max_steps": 4}, evaluate={"groups": {}})
    draft = export_model(str(limbeck.run(tree).directory), tmp_path / "draft", format="gguf").file
    teacher = export_model(str(tiny.teacher), tmp_path / "teacher", format="gguf").file
    tokenizer = load_tokenizer(str(tiny.teacher))
    asked = [tokenizer(text)["input_ids"] for text in questions(6)]
    with served(teacher) as ask:
        alone = [ask(ids) for ids in asked]
    with served(teacher, draft) as ask:
        drafted = [ask(ids) for ids in asked]
    assert [answer["tokens"] for answer in drafted] == [answer["tokens"] for answer in alone]
    assert all("draft_n" not in answer["timings"] for answer in alone)
    proposed = sum(answer["timings"]["draft_n"] for answer in drafted)
    kept = sum(answer["timings"]["draft_n_accepted"] for answer in drafted)
    assert 0 < kept < proposed, "a draft that is always right, or never, would show nothing"
