"""Health of the student's own responses: cut off, looping, empty, how long. Token ids in, numbers out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from limbeck.rollouts.alarms import COUNT, EMPTY, LENGTH, LOG_Q, REPEATED, TRUNCATED
from limbeck.rollouts.monitor import Alarm, Watch
from limbeck.types import Response

__all__ = ["Alarm", "Watch", "health_of", "loops", "rates", "repeated_share", "tally"]

# The shortest ending of a response that is looked at by itself. 61 4-grams: loops of up to 30 tokens show.
ENDING = 64


def repeated_share(ids: Sequence[int]) -> float:
    """Share of the 4-grams that stood before in the same ids; 0 for fewer than four ids."""
    grams = len(ids) - 3
    return 1 - len(set(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))) / grams if grams > 0 else 0.0


def loops(ids: Sequence[int]) -> bool:
    """Whether more than half of the 4-grams are repeated, in all ids or in an ending of 64, 128, 256, ... of them.

    The endings find a loop that began late: one of period P counts once it has run for 4 P tokens, and 64 at least.
    Six times the same token is the shortest loop.
    """
    size = ENDING
    while size < len(ids):
        if repeated_share(ids[-size:]) > 0.5:
            return True
        size *= 2
    return repeated_share(ids) > 0.5


def tally(responses: Iterable[Response]) -> tuple[float, float, float, float, float]:
    """Count, truncated, looping, empty, tokens: sums over the student's responses, which add up over ranks and batches.

    Responses of other authors are left out.
    """
    count = truncated = repeated = empty = tokens = 0
    for response in responses:
        if response.author != "student":
            continue
        ids = response.response_ids
        # The end token is not said, and would break the rhythm of a loop.
        said = ids[:-1] if response.stop == "eos" else ids
        count += 1
        truncated += response.stop == "length"
        repeated += loops(said)
        empty += not said
        tokens += len(ids)
    return float(count), float(truncated), float(repeated), float(empty), float(tokens)


def rates(sums: Sequence[float]) -> dict[str, float]:
    """The metrics of (added up) tallies; nothing where the student wrote nothing."""
    count, truncated, repeated, empty, tokens = sums
    if not count:
        return {}
    return {
        COUNT: count,
        TRUNCATED: truncated / count,
        REPEATED: repeated / count,
        LENGTH: tokens / count,
        EMPTY: empty / count,
    }


def health_of(responses: Iterable[Response], *, log_q_mean: float | None = None) -> dict[str, float]:
    """The metrics of the student's responses among these; empty where there are none.

    Args:
        log_q_mean: mean log-probability (nats per token, temperature 1) that the current student gives the tokens of
            its responses, where it was measured; it becomes `log_q/student`.

    Returns:
        `responses/count`; `responses/truncated`, `responses/repeated` (see `loops`), `responses/empty` (nothing but the
        end token, if that): shares of the responses; `responses/length`: mean tokens, the end token included.
    """
    found = rates(tally(responses))
    return found if log_q_mean is None or not found else found | {LOG_Q: log_q_mean}
