"""Keys: whom they are sent to, and that no message and no file repeats them."""

from __future__ import annotations

import json

import pytest

from limbeck.client.keys import ALLOWED_HOSTS_VARIABLE
from limbeck.client.openai import Refusal, Server
from limbeck.types import LimbeckError
from tests.client.evil import HEAD, Plot, once, playing, whole

SECRET = "sk-do/not-repeat-me"
ESCAPED = SECRET.replace("s", "\\u0073").replace("/", "\\/")


def body(text: str) -> bytes:
    return text.encode()


ECHOES: dict[str, Plot] = {
    "2xx that is no JSON": once(whole(body(f"Authorization: Bearer {SECRET}"))),
    "2xx that is no JSON, spread over lines": once(whole(body("\n" * 300 + f"Bearer {SECRET}"))),
    "2xx that is a JSON list": once(whole(body(f'["{ESCAPED}"]'))),
    "a list of another shape": once(whole(body(f'{{"data": {{"{SECRET}": "{ESCAPED}"}}}}'))),
    "the Location of a redirect": once(whole(b"", "302 Found", f"Location: http://x/?key={SECRET}\r\n")),
    "a folded Location": once(HEAD.replace(b"200 OK", b"301 No") + f"Location: x\r\n {SECRET}\r\n\r\n".encode()),
    "an error": once(whole(body(f'{{"error": {{"message": "not {ESCAPED}"}}}}'), "401 No")),
    "an error as an object": once(whole(body(f'{{"error": {{"code": 7, "{SECRET}": "{ESCAPED}"}}}}'), "400 No")),
    "an error cut in the middle of the key": once(whole(body("x" * 230 + SECRET), "503 No")),
    "a status line": once(f"HTTP/1.1 500 {SECRET}\r\nContent-Length: 0\r\n\r\n".encode()),
    "no HTTP": once(f"{SECRET}\r\n\r\n".encode()),
}


@pytest.mark.parametrize("name", ECHOES)
def test_no_message_repeats_the_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_API_KEY", SECRET)
    with playing(ECHOES[name]) as (url, asked):
        server = Server(base_url=url, retries=0, api_key_env="THE_API_KEY")
        lines = []
        for ask in (server.models, lambda: server.post("/completions", {})):
            try:
                lines.append(repr(ask()))
            except LimbeckError as error:
                lines.append(str(error))
        assert all(f"Authorization: Bearer {SECRET}\r\n" in said for said in asked)
    for line in lines:
        assert "repeat-me" not in line and "do/not" not in line and "u0073" not in line, line
    assert lines[0].startswith(("http", "()")), lines


def test_what_is_kept_of_an_answer_holds_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge's reply is written down as it comes."""
    said = {"choices": [{"text": f"a {SECRET}!", SECRET: [SECRET]}]}
    monkeypatch.setenv("THE_API_KEY", SECRET)
    with playing(once(whole(json.dumps(said).encode()))) as (url, _):
        reply = Server(base_url=url, retries=0, api_key_env="THE_API_KEY").post("/completions", {})
    assert not isinstance(reply, Refusal) and reply == {"choices": [{"text": "a ***!", "***": ["***"]}]}


def test_a_placeholder_for_a_key_is_left_in_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local servers are given EMPTY; an answer may hold the word, and is not changed."""
    monkeypatch.setenv("THE_API_KEY", "EMPTY")
    with playing(once(whole(b'{"text": "The glass is EMPTY."}'))) as (url, _):
        reply = Server(base_url=url, retries=0, api_key_env="THE_API_KEY").post("/completions", {})
    assert reply == {"text": "The glass is EMPTY."}


LOCAL = ("http://127.0.0.1:1/v1", "http://localhost:1/v1", "https://[::1]:1/v1", "http://127.8.9.10:1/v1")
ELSEWHERE = (
    *("http://evil.example/v1", "https://evil.example/v1", "http://127.0.0.1.evil.example/v1"),
    *("http://192.168.1.7:8000/v1", "https://localhost.evil.example/v1"),
)


@pytest.mark.parametrize("url", ELSEWHERE)
def test_a_recipe_sends_no_variable_to_a_host_that_nobody_here_has_named(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-very-secret")
    with playing(once(whole(b'{"data": []}'))) as (proxy, asked):
        # Whatever leaves this machine would come by here.
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy.removesuffix("/v1"))
        server = Server(base_url=url, retries=0, api_key_env="AWS_SECRET_ACCESS_KEY")
        for allowed in ("", "openai.example", "evil.example.org", "https://evil.example", "*"):
            monkeypatch.setenv(ALLOWED_HOSTS_VARIABLE, allowed)
            for ask in (server.check_key, server.models, lambda: server.post("/completions", {})):
                with pytest.raises(
                    LimbeckError, match=f"trust the recipe .* export {ALLOWED_HOSTS_VARIABLE}="
                ) as caught:
                    ask()
                assert "very-secret" not in str(caught.value) and "AWS" not in str(caught.value)
        assert not asked


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PGPASSWORD", "SSH_PRIVATE_KEY", "HOME"])
def test_what_is_no_api_key_by_its_name_goes_only_where_it_is_named_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to a host that another key may go to, and to no port of this machine: others may listen there."""
    monkeypatch.setenv(name, SECRET)
    for url, entry in (("http://127.0.0.1:9/v1", "127.0.0.1"), ("https://api.example/v1", "api.example")):
        server = Server(base_url=url, api_key_env=name)
        for allowed in ("", entry, f"OTHER_KEY@{entry}", f"{name}@evil.example", f"{name.lower()}@{entry}"):
            monkeypatch.setenv(ALLOWED_HOSTS_VARIABLE, allowed)
            with pytest.raises(LimbeckError, match=f"export {ALLOWED_HOSTS_VARIABLE}=NAME@{entry} with") as caught:
                server.check_key()
            assert name not in str(caught.value) and "\n" not in str(caught.value)
        monkeypatch.setenv(ALLOWED_HOSTS_VARIABLE, f"other.example, {name}@{entry.upper()}/")
        server.check_key()
        with pytest.raises(LimbeckError, match=f"{ALLOWED_HOSTS_VARIABLE}=NAME@http://api.example"):
            Server(base_url="http://api.example/v1", api_key_env=name).check_key()


def test_a_variable_that_is_named_with_a_host_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_API_KEY", SECRET)
    monkeypatch.setenv(ALLOWED_HOSTS_VARIABLE, "THE_API_KEY@api.example,other.example,THE_API_KEY@http://node7")
    for url in ("https://api.example/v1", "http://node7:8000/v1"):
        Server(base_url=url, api_key_env="THE_API_KEY").check_key()
    for url in ("https://other.example/v1", "http://localhost:9/v1", "https://node7/v1"):
        with pytest.raises(LimbeckError, match=f"{ALLOWED_HOSTS_VARIABLE}=NAME@"):
            Server(base_url=url, api_key_env="THE_API_KEY").check_key()


def test_a_key_goes_to_the_hosts_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_API_KEY", SECRET)
    for url in LOCAL:
        Server(base_url=url, api_key_env="THE_API_KEY").check_key()
    monkeypatch.setenv(ALLOWED_HOSTS_VARIABLE, "api.example, http://Node7")
    Server(base_url="https://API.example/v1", api_key_env="THE_API_KEY").check_key()
    Server(base_url="http://node7:8000/v1", api_key_env="THE_API_KEY").check_key()
    # In clear only where that is said.
    with pytest.raises(LimbeckError, match=rf"in clear, .* export {ALLOWED_HOSTS_VARIABLE}=http://api\.example"):
        Server(base_url="http://api.example/v1", api_key_env="THE_API_KEY").check_key()
    with pytest.raises(LimbeckError, match=rf"export {ALLOWED_HOSTS_VARIABLE}=node7 "):
        Server(base_url="https://node7/v1", api_key_env="THE_API_KEY").check_key()


def test_a_key_in_a_traceback_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from limbeck.client.keys import read_key

    monkeypatch.setenv("THE_API_KEY", SECRET)
    assert SECRET not in repr(read_key("THE_API_KEY", root="http://localhost/v1", section="responses.server"))
