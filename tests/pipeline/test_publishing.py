"""`train.push_to_hub`: a small server on this machine plays the hub, and keeps what is committed to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import limbeck
from limbeck.types import LimbeckError
from tests.tiny_pair import TinyPair


class FakeHub(ThreadingHTTPServer):
    """Repositories with the files of their last commit, and every request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuse = False


class Handler(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuse:
            return self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.private[name] = bool(asked.get("private", asked.get("visibility") == "private"))
            return self.reply(200, {"url": f"http://127.0.0.1:{hub.server_port}/{name}", "id": name, "name": name})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        assert "/commit/" in self.path, self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "header":
                hub.commits.append(entry["value"]["summary"])
        url = f"http://127.0.0.1:{hub.server_port}/owner/tiny/commit/{len(hub.commits):040d}"
        return self.reply(200, {"success": True, "commitOid": f"{len(hub.commits):040d}", "commitUrl": url})

    def do_GET(self) -> None:
        self.reply(404, {"error": "Not Found"})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_the_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def recipe(tiny: TinyPair, run: Path, **train: Any) -> dict[str, Any]:
    return tiny.tree(run, train={"push_to_hub": True, "hub_model_id": "owner/tiny"} | train)


def test_the_student_is_uploaded_once(tiny: TinyPair, tmp_path: Path, hub: FakeHub) -> None:
    run = limbeck.run(recipe(tiny, tmp_path / "run"))
    assert hub.files.keys() >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert all((run.student / name).read_bytes() == data for name, data in hub.files.items())
    assert hub.private == {"owner/tiny": True} and hub.tokens == {"Bearer hf_a_token_of_the_test"}
    limbeck.run(recipe(tiny, tmp_path / "run"))
    assert len(hub.commits) == 1, "the same student is not uploaded again"
    # No file of the run holds the token.
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"hf_a_token" not in path.read_bytes(), path


def test_a_hub_that_refuses_costs_nothing_but_the_upload(tiny: TinyPair, tmp_path: Path, hub: FakeHub) -> None:
    hub.refuse = True
    with pytest.raises(LimbeckError, match=r"the hub refuses owner/tiny: .*same command uploads it") as caught:
        limbeck.run(recipe(tiny, tmp_path / "run"))
    assert "\n" not in str(caught.value) and (tmp_path / "run" / "report.html").exists()
    hub.refuse = False
    trained = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    limbeck.run(recipe(tiny, tmp_path / "run"))
    assert len(hub.commits) == 1 and (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, "train.hub_model_id is None; expected owner/name"),
        ("tiny", "train.hub_model_id is 'tiny'; expected owner/name"),
        ("owner/..tiny", "train.hub_model_id is 'owner/..tiny': "),
    ],
)
def test_a_name_that_no_repository_has_is_refused_before_any_work(
    tiny: TinyPair, tmp_path: Path, hub: FakeHub, name: str | None, said: str
) -> None:
    with pytest.raises(LimbeckError) as caught:
        limbeck.run(recipe(tiny, tmp_path / "run", hub_model_id=name))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "prompts.jsonl").exists() and not hub.tokens


def test_without_a_token_or_a_hub_it_is_refused_before_any_work(
    tiny: TinyPair, tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(LimbeckError, match="needs a token of the hub that may write"):
        limbeck.run(recipe(tiny, tmp_path / "run"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LimbeckError, match="HF_HUB_OFFLINE is set"):
        limbeck.run(recipe(tiny, tmp_path / "run"))
