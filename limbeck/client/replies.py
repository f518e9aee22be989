"""Reading a server's replies: text, error messages and waiting times, with the key removed where it is repeated."""

from __future__ import annotations

import email.utils
import json
import math
import time
from dataclasses import dataclass
from typing import Any

from limbeck.client.http import HttpReply
from limbeck.client.keys import Key
from limbeck.types import Json

# Of a text that a message may quote.
_QUOTED = 240


@dataclass(frozen=True, kw_only=True)
class ReplyText:
    """An answer in which the key is blotted out, for everything that is shown or kept of it.

    Attributes:
        reply: its JSON; None where it is none, or nested too deep to be an answer.
    """

    status: int
    reply: Any
    _answer: HttpReply
    _key: Key

    @classmethod
    def of(cls, answer: HttpReply, key: Key) -> ReplyText:
        try:
            reply = key.hidden_in_data(json.loads(answer.raw))
        except (ValueError, RecursionError):
            reply = None
        return cls(status=answer.status, reply=reply, _answer=answer, _key=key)

    @property
    def text(self) -> str:
        """The beginning of it, in one line."""
        raw = self._answer.raw.decode("utf-8", "replace") if self.reply is None else json.dumps(self.reply)
        # Hidden before it is cut, so that no part of the key is left.
        return shortened(self._key.hidden_in(raw)[: 16 * _QUOTED])

    @property
    def message(self) -> str:
        """The server's error message, in one line."""
        said = self.reply
        for name in ("error", "detail", "message"):
            if isinstance(said, dict) and said.get(name):
                said = said[name]
        if said is not None and not isinstance(said, str):
            said = json.dumps(said)
        text = self.text if said is None else shortened(self._key.hidden_in(said)[: 16 * _QUOTED])
        return text or "no reason given"

    def header(self, name: str) -> str:
        """A header in one line; empty where there is none."""
        return shortened(self._key.hidden_in(self._answer.headers.get(name) or ""))


def shortened(text: str, most: int = _QUOTED) -> str:
    """A text in one line, as a message quotes it."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]} ..."


def short_json(value: object) -> str:
    """A value as a message shows it."""
    return shortened(json.dumps(value, ensure_ascii=False, default=str), 120)


def counted(reply: Json, name: str) -> int | None:
    """Tokens by the server's count, such as `completion_tokens`; None where it gives none."""
    usage = reply.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    # What a counter can reach; thousands of digits would end in an error where they are added up and printed.
    return count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 1 << 53 else None


def retry_after_s(header: str) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 for anything else."""
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        date = email.utils.parsedate_tz(header)
        return 0.0 if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
    except OverflowError:
        # The year 99999: as good as for ever.
        return math.inf
    except (ValueError, TypeError):
        return 0.0
