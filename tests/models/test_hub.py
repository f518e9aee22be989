"""Hub ids: what the hub answers, and what happens without it. A small server on this machine plays the hub."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from limbeck.models import sources
from limbeck.models.sources import resolve
from limbeck.types import LimbeckError

_ANSWERS = {
    "absent": (404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}),
    "private": (401, {"X-Error-Code": "RepoNotFound"}, {"error": "Invalid username or password."}),
    "gated": (403, {"X-Error-Code": "GatedRepo"}, {"error": "Access to model is restricted"}),
    "norevision": (404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}),
    "broken": (500, {}, {"error": "Internal Server Error"}),
    "pickled": (200, {}, {"id": "owner/pickled", "sha": "a" * 40, "siblings": [{"rfilename": "pytorch_model.bin"}]}),
}


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.split("/api/models/owner/")[-1].split("/")[0]
        status, headers, body = _ANSWERS[name]
        payload = json.dumps(body).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", "no such model on the hub"),
        ("private", "log in with `hf auth login`"),
        ("gated", "is gated; accept its terms at https://huggingface.co/owner/gated"),
        ("broken", "cannot be reached"),
        ("pickled", r"only pickled weights \(pytorch_model.bin\)"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(hub: None, name: str, expected: str) -> None:
    with pytest.raises(LimbeckError, match=expected) as caught:
        resolve(f"owner/{name}")
    assert "\n" not in str(caught.value)


def test_a_revision_the_hub_does_not_have(hub: None) -> None:
    with pytest.raises(LimbeckError, match="has no revision 'v9'"):
        resolve("owner/norevision", revision="v9")


def test_without_a_network_it_fails_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(LimbeckError, match=r"no model 'owner/name': .*cannot be reached.*or one of smollm2") as caught:
        resolve("owner/name")
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


def test_offline_mode_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "_ask", lambda repo, revision: pytest.fail("asked the hub although offline"))
    with pytest.raises(LimbeckError, match="HF_HUB_OFFLINE is set while the hub cache has no copy"):
        resolve("owner/name")


def test_the_hub_cache_serves_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> None:
    cache, commit = tmp_path_factory.mktemp("hub"), "b" * 40
    snapshot = cache / "models--owner--kept" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    refs = cache / "models--owner--kept" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    source = resolve("hub:owner/kept")
    assert (source.kind, source.revision, source.directory) == ("hub", commit, snapshot)


def test_what_is_no_hub_id() -> None:
    with pytest.raises(LimbeckError, match="no hub id; expected owner/name"):
        resolve("hub:a/b/c")
