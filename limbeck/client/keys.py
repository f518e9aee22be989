"""API keys: where they are read from, which servers may receive them, and how they are kept out of files and output."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from limbeck.client.http import is_this_machine
from limbeck.types import LimbeckError

# Hosts that keys may be sent to, HOST or NAME@HOST. In the environment, because a recipe may come from anybody.
ALLOWED_HOSTS_VARIABLE = "LIMBECK_ALLOW_KEY_TO"
# Words in the names of keys that no model service gives out, such as AWS_SECRET_ACCESS_KEY.
_OTHER_KEYS = {
    *("ACCESS", "SECRET", "PRIVATE", "ACCOUNT", "STORAGE", "MASTER"),
    *("SSH", "GPG", "DEPLOY", "SIGNING", "ENCRYPTION"),
}
# Shorter keys are placeholders such as EMPTY or ollama, which an answer may hold by chance.
_SHORTEST_SECRET = 12


@dataclass(frozen=True)
class Key:
    """A key as it is sent; None where the server wants none. Its repr does not show it."""

    value: str | None = field(repr=False)

    def hidden_in(self, text: str) -> str:
        """A text for a person, with the key blotted out."""
        return text.replace(self.value, "***") if self.value else text

    def hidden_in_data(self, value: Any) -> Any:
        """JSON that is kept, in which a server may have repeated the key.

        Raises:
            RecursionError: it is nested deeper than Python goes.
        """
        if isinstance(value, str):
            return self.hidden_in(value) if self.value and len(self.value) >= _SHORTEST_SECRET else value
        if isinstance(value, list):
            return [self.hidden_in_data(item) for item in value]
        if isinstance(value, dict):
            return {self.hidden_in_data(name): self.hidden_in_data(item) for name, item in value.items()}
        return value


def without_key(text: str, api_key_env: str | None) -> str:
    """A text without the key that a variable holds, for what is kept of what was written elsewhere."""
    return str(Key(os.environ.get(api_key_env or "", "").strip() or None).hidden_in_data(text))


def read_key(name: str | None, *, root: str, section: str) -> Key:
    """The key in the environment variable `name`, if it may be sent to the server at `root`.

    Raises:
        LimbeckError: the variable is not set, its value cannot be a key, or no user of this machine has allowed that
            this key goes to that host.
    """
    if name is None:
        return Key(None)
    key = os.environ.get(name, "").strip()
    # The name is not repeated: a key may have been put in its place.
    if not key or not key.isascii() or not key.isprintable():
        state = "holds characters that no HTTP header may hold" if key else "is not set"
        raise LimbeckError(f"the environment variable that {section}.api_key_env names {state}; export it with the key")
    _require_allowed(name, root, section)
    return Key(key)


def _require_allowed(name: str, root: str, section: str) -> None:
    parts = urlsplit(root)
    host = (parts.hostname or "").lower()
    here = is_this_machine(host)
    # http:// before a host says that the key may travel in clear.
    wanted = host if here or parts.scheme == "https" else f"http://{host}"
    said = os.environ.get(ALLOWED_HOSTS_VARIABLE, "").split(",")
    entries = [entry.strip().rstrip("/").rpartition("@") for entry in said]
    # A variable that is named with a host goes nowhere else.
    bound = [to.lower() for of, _, to in entries if of == name]
    unbound = not bound and _looks_like_an_api_key(name)
    if wanted in bound or (unbound and (here or wanted in [to.lower() for of, _, to in entries if not of])):
        return
    clear = "" if here or parts.scheme == "https" else ", in clear, which others on the way can read"
    why = "" if unbound or bound else ", whose name is none of an API key (..._KEY),"
    # The name is not repeated here either.
    entry = wanted if unbound else f"NAME@{wanted} with the variable's own name for NAME"
    raise LimbeckError(
        f"{section} would send the key that {section}.api_key_env names{why} to {host}{clear}; where you trust the "
        f"recipe and that host with it, export {ALLOWED_HOSTS_VARIABLE}={entry} (several: commas between them)"
    )


def _looks_like_an_api_key(name: str) -> bool:
    """Whether a variable is named like the key of a model service rather than a password or an account's token."""
    words = name.upper().split("_")
    return words[-1] in ("KEY", "APIKEY") and not _OTHER_KEYS & set(words)
