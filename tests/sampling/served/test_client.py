"""Addresses, keys and names of models."""

from __future__ import annotations

import pytest

from limbeck.client.openai import Server
from limbeck.types import LimbeckError
from tests.sampling.served.fake_server import MODEL, FakeServer


def test_models_are_found_by_name(server: FakeServer) -> None:
    client = Server(base_url=server.url.removesuffix("/v1"), retries=0)
    assert client.model(None) == client.model(MODEL) == MODEL
    assert client.model("/a/folder") == "/a/folder"
    server.order(models=["a", "b"])
    with pytest.raises(
        LimbeckError, match=r"has no model 'tiny-teacher'; it offers a, b: set responses\.server\.model"
    ):
        client.model(MODEL)
    with pytest.raises(LimbeckError, match=r"offers 2 models \(a, b\); name one with responses\.server\.model"):
        client.model(None)
    server.order(models=[7])
    with pytest.raises(LimbeckError, match=r"/models answers \{.*expected a list of models"):
        client.models()


def test_keys_come_from_the_environment_alone(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.order(key="s3cret")
    with pytest.raises(LimbeckError, match=r"does not let us in \(HTTP 401: .*api_key_env"):
        Server(base_url=server.url).models()
    keyed = Server(base_url=server.url, api_key_env="THE_KEY")
    with pytest.raises(LimbeckError, match="is not set; export it"):
        keyed.models()
    monkeypatch.setenv("THE_KEY", "s3cret\n")
    assert keyed.models() == (MODEL,)
    monkeypatch.setenv("THE_KEY", "wr0ng")
    with pytest.raises(LimbeckError, match=r"Bearer \*\*\*\); check the key") as caught:
        keyed.models()
    assert "wr0ng" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://a b/v1", "http://host:x/v1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(LimbeckError, match=r"expected something like http://localhost:8000/v1"):
        Server(base_url=url)


def test_secrets_in_an_address_are_not_repeated() -> None:
    for url in ("http://me:s3cret@host/v1", "https://host/v1?key=s3cret"):
        with pytest.raises(LimbeckError, match="leave it out") as caught:
            Server(base_url=url)
        assert "s3cret" not in str(caught.value)
