"""Training on the student's own responses: the alarms that went off, and responses of both authors over the
training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.report.format import figure, setting, share
from limbeck.report.read_run import Run, lines_of, number
from limbeck.report.values import shown
from limbeck.rollouts.account import never_acted, summary
from limbeck.rollouts.alarms import EMPTY, EVERY_ALARM, REPEATED, TRUNCATED
from limbeck.rollouts.health import loops

Decode = Callable[[list[int]], str]

# A few prompts, each at a few steps, are enough to see a trend.
PROMPTS, MOMENTS = 5, 5
# A longer text shows its beginning and, where loops live, its end.
BEGINNING, END = 500, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class RaisedAlarm:
    """An alarm that went off. `seen` gives the values at the first step that it named; the last two may be empty."""

    name: str
    steps: str
    seen: str
    meaning: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownResponse:
    """A response. `remarks` are such as "cut off"; `again` says that it is the one shown before it."""

    author: str
    text: str
    remarks: tuple[str, ...]
    again: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A prompt, and for some points of the training (name of the point, the responses by author)."""

    prompt: str
    moments: tuple[tuple[str, Mapping[str, ShownResponse]], ...]


def names_in(row: Mapping[str, Any]) -> list[str]:
    """The alarms of a metrics line."""
    found = row.get("warnings")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def warned(run: Run) -> list[RaisedAlarm]:
    """The alarms in the order in which they first went off."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in run.steps:
        for name in names_in(row):
            rows.setdefault(name, []).append(row)
    return [_warned(name, found) for name, found in rows.items()]


def _warned(name: str, rows: Sequence[Mapping[str, Any]]) -> RaisedAlarm:
    kind = EVERY_ALARM.get(name)
    first, *more = [f"{row['step']:,.0f}" for row in rows]
    again = f", again at {', '.join(more[:3])}{' …' if more[3:] else ''}" if more else ""
    seen = []
    for key in kind.keys if kind else ():
        value = number(rows[0], key)
        if value is not None:
            shown = share(value) if key in (REPEATED, TRUNCATED, EMPTY) else figure(value)
            seen.append(f"{key} {shown}")
    return RaisedAlarm(
        name=name,
        steps=f"step {first}{again}",
        seen=", ".join(seen),
        meaning=kind.meaning if kind else "",
        remedy=kind.remedy if kind else "",
    )


def account(run: Run) -> tuple[str, list[str]]:
    """A sentence on how much each author wrote (may be empty), and one for each mechanism that never acted."""
    last = run.steps[-1] if run.steps else {}
    try:
        return summary(last), never_acted(last)
    except (KeyError, TypeError, ValueError):
        # A page of whatever is there: a line that lacks half of its numbers is no account.
        return "", []


def exchanges(run: Run) -> list[Exchange]:
    """A few prompts with the responses that were trained on; those that both authors answered most often come first."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in run.written:
        if _whole(row):
            by_prompt.setdefault(str(row["prompt_id"]), []).append(row)
    if not by_prompt:
        return []

    def worth(name: str) -> tuple[int, int]:
        authors = [row["author"] for row in by_prompt[name]]
        return len(set(authors)), authors.count("student")

    chosen = sorted(by_prompt, key=worth, reverse=True)[:PROMPTS]
    decode = decoder(run.directory)
    asked = _asked(run.directory, set(chosen))
    return [
        Exchange(
            prompt=_shortened(asked.get(name) or decode(list(by_prompt[name][0]["prompt_ids"])).strip()),
            moments=tuple(_texts(_moments(by_prompt[name]), decode)),
        )
        for name in chosen
    ]


def _whole(row: Mapping[str, Any]) -> bool:
    lists = (row.get("prompt_ids"), row.get("response_ids"))
    ids = [i for part in lists if isinstance(part, list) for i in part]
    whole = all(isinstance(part, list) for part in lists) and all(type(i) is int and 0 <= i < 2**32 for i in ids)
    return whole and number(row, "step") is not None and isinstance(row.get("author"), str) and "prompt_id" in row


def _moments(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Mapping[str, Any]]]:
    """Responses of a prompt side by side: those of one step, else those of one epoch. Of many moments a few."""
    steps: dict[float, dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        steps.setdefault(row["step"], {})[_column(row)] = row
    moments: list[dict[str, Mapping[str, Any]]] = []
    for found in steps.values():
        last = moments[-1] if moments else {}
        if last and not last.keys() & found.keys() and _epoch(last) == _epoch(found):
            last |= found
        else:
            moments.append(found)
    if len(moments) > MOMENTS:
        moments = [moments[round(n * (len(moments) - 1) / (MOMENTS - 1))] for n in range(MOMENTS)]
    return moments


def _column(row: Mapping[str, Any]) -> str:
    return "student" if row["author"] == "student" else "teacher"


def _epoch(point: Mapping[str, Mapping[str, Any]]) -> int:
    # A step carries how far it brought the training: 1.0 is the end of the first epoch.
    return math.ceil((number(next(iter(point.values())), "epoch") or 0.0) - 1e-9)


def _when(point: Mapping[str, Mapping[str, Any]]) -> str:
    row = point.get("student") or next(iter(point.values()))
    epoch = number(row, "epoch")
    where = f"step {row['step']:,.0f}"
    return where if epoch is None else f"epoch {setting(round(epoch, 2))}, {where}"


def _texts(
    moments: Sequence[Mapping[str, Mapping[str, Any]]], decode: Decode
) -> Iterator[tuple[str, Mapping[str, ShownResponse]]]:
    before: dict[str, list[int]] = {}
    for point in moments:
        yield _when(point), {c: _said(row, decode, before.get(c)) for c, row in point.items()}
        before |= {column: row["response_ids"] for column, row in point.items()}


def _said(row: Mapping[str, Any], decode: Decode, before: list[int] | None) -> ShownResponse:
    ids = list(row["response_ids"])
    said = ids[:-1] if row.get("stop") == "eos" else ids
    remarks = [f"{len(ids):,} tokens"]
    remarks += ["cut off"] * (row.get("stop") == "length") + ["loops"] * loops(said)
    return ShownResponse(
        author=str(row["author"]).capitalize(),
        text=_shortened(decode(said).strip()),
        remarks=tuple(remarks),
        again=ids == before,
    )


def _shortened(text: str) -> str:
    text = shown(text)
    left_out = len(text) - BEGINNING - END
    return text if left_out < 100 else f"{text[:BEGINNING]} […{left_out:,} characters…] {text[-END:]}"


def decoder(run_dir: Path) -> Decode:
    """Text of ids by the student's tokenizer; special tokens stay visible. Without a tokenizer the ids themselves."""
    from tokenizers import Tokenizer

    path = run_dir / "student" / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the Rust tokenizers raise nothing narrower
        return lambda ids: f"token ids {' '.join(map(str, ids))} (no tokenizer in student/ yet)" if ids else ""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def _asked(run_dir: Path, names: set[str]) -> dict[str, str]:
    """The prompts as people wrote them, where prompts.jsonl has them: the ids carry the chat template."""
    found = {}
    for row in lines_of(run_dir, "prompts.jsonl", []):
        if isinstance(row.get("id"), str) and row["id"] in names:
            turns = row.get("messages")
            contents = (
                [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
            )
            found[row["id"]] = str(row.get("text") or "") or "\n".join(str(content) for content in contents)
    return found
