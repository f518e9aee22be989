"""What a server said, as far as it can be read."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any

Json = dict[str, Any]


def parsed(raw: bytes) -> Any:
    """The JSON of a reply; None where it is none."""
    try:
        return json.loads(raw)
    except ValueError:
        return None


def message_in(raw: bytes, *, secret: str | None) -> str:
    """What the server says is wrong, in one line, without the secret should it repeat it."""
    said = parsed(raw)
    for name in ("error", "detail", "message"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    text = said if isinstance(said, str) else raw.decode("utf-8", "replace") if said is None else json.dumps(said)
    text = " ".join(text.split()) or "no reason given"
    if secret:
        text = text.replace(secret, "***")
    return text if len(text) <= 240 else f"{text[:240]} ..."


def short(value: object) -> str:
    """A value as a message shows it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:120]} ..."


def wish_s(header: str | None) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 for anything else."""
    header = header or "0"
    if header.strip().isdigit():
        return float(header)
    date = email.utils.parsedate_tz(header)
    return 0.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
