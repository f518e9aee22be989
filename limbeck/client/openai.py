"""Requests to an OpenAI-compatible server; temporary failures (a full queue, a lost connection) are retried."""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass, replace
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from limbeck.client.http import CONNECT_S, MAX_BYTES, ConnectionFailed, exchange
from limbeck.client.keys import Key, read_key
from limbeck.client.replies import ReplyText, retry_after_s, short_json
from limbeck.types import Json, LimbeckError

_URL = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s/?#@:]+)(:\d{1,5})?(/[^\s?#]*)?")
# Statuses that another try may mend; every other 4xx is the server's last word on the request.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
# Those of them by which a server, or what stands before it, gives up waiting for work that may go on.
_GIVEN_UP = frozenset({408, 502, 504})
_LONGEST_PAUSE_S = 60.0
# What a server may ask us to wait; beyond it a person should decide.
_LONGEST_WISH_S = 600.0
_FOR_EVER_S = 1e8


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The server understood a request and declined it (HTTP 4xx); the message is its own, in one line."""

    status: int
    message: str

    def __str__(self) -> str:
        return f"HTTP {self.status}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class _RetryableError:
    """A failure that may pass.

    Attributes:
        retry_after_s: how long the server asks to wait.
        perhaps_done: whether the server may have done the work all the same.
    """

    what: str
    remedy: str
    retry_after_s: float = 0.0
    perhaps_done: bool = True


class TryWatch(Protocol):
    """A record of the tries of one request, for servers that are paid by the request."""

    def begin(self) -> None:
        """Called before each try.

        Raises:
            LimbeckError: there is to be none.
        """
        ...

    def failed(self, *, perhaps_done: bool) -> None:
        """Called after a try without an answer.

        Args:
            perhaps_done: whether the server may have done the work all the same.
        """
        ...


class ServerOptions(Protocol):
    """Options of a server, wherever a recipe holds them."""

    @property
    def timeout_s(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def api_key_env(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        base_url: up to and including /v1; a bare host and port get it appended.
        timeout_s: seconds for one whole answer.
        retries: further tries after what may pass, with pauses that double from `backoff_s`, jittered, never shorter
            than the server's Retry-After.
        api_key_env: environment variable that holds the key; the key itself is kept nowhere, and leaves this machine
            only for hosts that the environment allows (`keys`).
        section: of the recipe, whose keys messages name.
        max_bytes: of one answer; None is as `exchange` has it.
    """

    base_url: str
    timeout_s: float = 120.0
    retries: int = 5
    api_key_env: str | None = None
    backoff_s: float = 0.5
    section: str = "responses.server"
    max_bytes: int | None = None

    @classmethod
    def at(cls, base_url: str, options: ServerOptions, section: str) -> Server:
        """The server at an address, with the options of a section; it is not asked anything yet."""
        return cls(
            base_url=base_url,
            timeout_s=options.timeout_s,
            retries=options.retries,
            api_key_env=options.api_key_env,
            section=section,
        )

    @property
    def hurried(self) -> Server:
        """The same with one retry at most, for questions whose answer a person waits for."""
        return replace(self, retries=min(self.retries, 1))

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        # Not repeated: the recipe is kept with the run, and messages are passed on.
        if parts.username or parts.password or parts.query:
            raise LimbeckError(
                f"{self.section}.base_url holds a user name, a password or a query; leave it out, and name the "
                f"environment variable that holds the key with {self.section}.api_key_env"
            )
        if not (
            _URL.fullmatch(self.base_url) and _has_port(parts) and parts.path.isascii() and parts.path.isprintable()
        ):
            raise LimbeckError(
                f"{self.section}.base_url is {self.base_url!r}, expected something like http://localhost:8000/v1"
            )

    @property
    def root(self) -> str:
        """Base address for paths, without a slash at its end."""
        url = self.base_url.rstrip("/")
        return url if urlsplit(url).path else f"{url}/v1"

    def get(self, path: str) -> Json | Refusal:
        """The JSON object at a path such as "/models"; one that begins with two slashes lies beside /v1, not below it.

        Raises:
            LimbeckError: the server is down, too slow, sends no JSON, hangs up, refuses the key, or redirects.
        """
        return self._ask(path, None)

    def post(self, path: str, body: Json, watch: TryWatch | None = None) -> Json | Refusal:
        """The JSON object that the server answers `body` with.

        Raises:
            LimbeckError: as for `get`, or what `watch` raises.
        """
        return self._ask(path, body, watch)

    def models(self) -> tuple[str, ...]:
        """Names of the server's models; empty where it has no list.

        Raises:
            LimbeckError: as for `get`, or a list of another shape.
        """
        reply = self.get("/models")
        if isinstance(reply, Refusal):
            return ()
        entries = reply.get("data")
        names = [e.get("id") if isinstance(e, dict) else None for e in entries] if isinstance(entries, list) else [None]
        if not all(isinstance(name, str) for name in names):
            raise LimbeckError(
                f"{self.root}/models answers {short_json(reply)}, expected a list of models; "
                f"check that {self.section}.base_url is that of an OpenAI-compatible server"
            )
        return tuple(str(name) for name in names)

    def window(self, model: str) -> int | None:
        """The most tokens of a text and its continuation, as vLLM and SGLang list it; None where it is not said.

        Raises:
            LimbeckError: as for `get`.
        """
        reply = self.get("/models")
        entries = None if isinstance(reply, Refusal) else reply.get("data")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("id") == model and isinstance(entry.get("max_model_len"), int):
                return entry["max_model_len"]
        return None

    def model(self, wanted: str | None) -> str:
        """The name to ask with: `wanted`, or the only model there is.

        An absolute path is a folder on the server's machine that need not be listed (transformers serve): it is taken
        as it is, like any name where the server keeps no list, and the first request shows whether it is right.

        Raises:
            LimbeckError: not offered, or none wanted and not exactly one offered.
        """
        offered = self.models()
        listed = ", ".join(offered[:8]) + (", ..." if len(offered) > 8 else "")
        if wanted is None:
            if len(offered) != 1:
                offers = f"{len(offered)} models ({listed})" if offered else "no list of models"
                raise LimbeckError(f"{self.root} offers {offers}; name one with {self.section}.model")
            return offered[0]
        if offered and wanted not in offered and not wanted.startswith("/"):
            raise LimbeckError(f"{self.root} has no model {wanted!r}; it offers {listed}: set {self.section}.model")
        return wanted

    def check_key(self) -> None:
        """Check that the key is set, where one is named; no request is made.

        Raises:
            LimbeckError: the variable is not set, or what it holds can be no key.
        """
        read_key(self.api_key_env, root=self.root, section=self.section)

    def _ask(self, path: str, body: Json | None, watch: TryWatch | None = None) -> Json | Refusal:
        tries, reply = 1, self._watched(path, body, watch)
        while isinstance(reply, _RetryableError) and tries <= self.retries and reply.retry_after_s <= _LONGEST_WISH_S:
            pause_s = min(self.backoff_s * 2 ** (tries - 1), _LONGEST_PAUSE_S)
            # Apart from each other, so that requests that failed together do not come back together.
            time.sleep(max(pause_s * random.uniform(0.5, 1.0), reply.retry_after_s * random.uniform(1.0, 1.1)))
            tries, reply = tries + 1, self._watched(path, body, watch)
        if not isinstance(reply, _RetryableError):
            return reply
        wish = f" and asks to wait {reply.retry_after_s:.0f} s" if reply.retry_after_s else ""
        if reply.retry_after_s > _FOR_EVER_S:
            wish = " and asks to wait for years"
        tried = f" ({tries} tries)" if tries > 1 else ""
        raise LimbeckError(f"{self.root} {reply.what}{wish}{tried}; {reply.remedy}")

    def _watched(self, path: str, body: Json | None, watch: TryWatch | None) -> Json | Refusal | _RetryableError:
        if watch is None:
            return self._attempt(path, body)
        watch.begin()
        try:
            reply = self._attempt(path, body)
        except LimbeckError:
            # No key, no certificate, another address: nothing was done.
            watch.failed(perhaps_done=False)
            raise
        if isinstance(reply, _RetryableError):
            watch.failed(perhaps_done=reply.perhaps_done)
        return reply

    def _attempt(self, path: str, body: Json | None) -> Json | Refusal | _RetryableError:
        headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "limbeck"}
        key = read_key(self.api_key_env, root=self.root, section=self.section)
        if key.value:
            headers["Authorization"] = f"Bearer {key.value}"
        data = None if body is None else json.dumps(body).encode()
        url = self.root.removesuffix("/v1") + path[1:] if path.startswith("//") else self.root + path
        answer = exchange(url, data, headers, self.timeout_s, self.max_bytes)
        if isinstance(answer, ConnectionFailed):
            return self._connection_error(answer, key)
        # From here on nothing holds the key, whatever the server has repeated.
        return self._outcome(ReplyText.of(answer, key), asked_for_a_list=data is None)

    def _connection_error(self, broken: ConnectionFailed, key: Key) -> _RetryableError:
        if broken.kind == "untrusted":
            raise LimbeckError(
                f"{self.root} shows a certificate that cannot be verified ({key.hidden_in(broken.why)}); "
                "let SSL_CERT_FILE point to its authority's certificate"
            )
        if broken.kind == "unreachable":
            limit = f" within {min(CONNECT_S, self.timeout_s):g} s" if broken.why == "nothing answers" else ""
            what = f"cannot be reached ({key.hidden_in(broken.why)}{limit})"
            return _RetryableError(
                what=what, remedy=f"start the server, or correct {self.section}.base_url", perhaps_done=False
            )
        if broken.kind == "slow":
            what = f"did not answer within {self.timeout_s:g} s"
            remedy = f"raise {self.section}.timeout_s or lower {self.section}.concurrency"
            return _RetryableError(what=what, remedy=remedy)
        if broken.kind == "long":
            remedy = f"check that {self.section}.base_url is that of an OpenAI-compatible server, with its /v1"
            most = (self.max_bytes or MAX_BYTES) >> 20
            return _RetryableError(what=f"answers with more than {most} MiB", remedy=remedy)
        what = "cut the connection off in the middle of an answer"
        return _RetryableError(what=what, remedy="look at the server's log; the same command then continues")

    def _outcome(self, said: ReplyText, *, asked_for_a_list: bool) -> Json | Refusal | _RetryableError:
        status = said.status
        if 200 <= status < 300:
            if isinstance(said.reply, dict):
                return said.reply
            remedy = f"check that {self.section}.base_url is that of an OpenAI-compatible server, with its /v1"
            return _RetryableError(what=f"answers {said.text[:80]!r}, expected a JSON object", remedy=remedy)
        if 300 <= status < 400:
            raise LimbeckError(
                f"{self.root} redirects to {said.header('Location') or 'nowhere'}; give that as {self.section}.base_url"
            )
        if status in (401, 403):
            has = f"check the key in the environment variable that {self.section}.api_key_env names"
            lacks = f"name the environment variable that holds one with {self.section}.api_key_env"
            raise LimbeckError(
                f"{self.root} does not let us in (HTTP {status}: {said.message}); {has if self.api_key_env else lacks}"
            )
        # A list that a server fails to make is one it does not have (transformers serve without a cache of models).
        if status in _PASSING and not (status == 500 and asked_for_a_list):
            remedy = f"lower {self.section}.concurrency" if status == 429 else "look at the server's log"
            return _RetryableError(
                what=f"cannot answer (HTTP {status}: {said.message})",
                remedy=f"{remedy}; the same command then continues",
                retry_after_s=retry_after_s(said.header("Retry-After")),
                perhaps_done=status in _GIVEN_UP,
            )
        return Refusal(status=status, message=said.message)


def _has_port(parts: SplitResult) -> bool:
    """Whether an address names no port, or one that there is."""
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False
