"""Prompts that leave no room for an answer are refused or dropped aloud."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.prompts.lengths import check_lengths
from limbeck.types import LimbeckError, Split, TokenPrompt


def of_length(length: int, split: Split = "train") -> TokenPrompt:
    return TokenPrompt(id=f"p{length}", ids=tuple(range(length)), split=split)


def test_the_first_long_prompt_is_named() -> None:
    with pytest.raises(LimbeckError) as caught:
        check_lengths([of_length(6), of_length(7), of_length(9)], window=10, max_new_tokens=4)
    assert str(caught.value) == (
        "prompt p7 has 7 tokens, expected at most 6 (window 10 - responses.max_new_tokens 4), and 1 more are too long; "
        "lower responses.max_new_tokens, shorten the prompts, or set prompts.too_long to drop"
    )


def test_a_lower_limit_than_the_windows() -> None:
    asked = [of_length(3), of_length(5)]
    fitting = check_lengths(asked, window=10, max_new_tokens=4, too_long="drop", longest=4)
    assert [prompt.id for prompt in fitting.kept] == ["p3"] and fitting.limit == 4
    with pytest.raises(LimbeckError, match=r"expected at most 4 \(prompts\.max_prompt_length\); raise prompts\.max"):
        check_lengths(asked, window=10, max_new_tokens=4, longest=4)
    # One above the window's changes nothing, the message included.
    with pytest.raises(LimbeckError, match=r"at most 4 \(window 8 - responses\.max_new_tokens 4\); lower responses"):
        check_lengths(asked, window=8, max_new_tokens=4, longest=9)


def test_dropped_prompts_are_reported() -> None:
    fitting = check_lengths([of_length(7), of_length(6), of_length(9)], window=10, max_new_tokens=4, too_long="drop")
    assert [prompt.id for prompt in fitting.kept] == ["p6"]
    assert (fitting.dropped, fitting.limit) == (("p7", "p9"), 6)


def test_a_split_that_loses_everything_is_refused() -> None:
    prompts = [of_length(2), of_length(9, "heldout")]
    with pytest.raises(LimbeckError, match="every heldout prompt has more than 6 tokens"):
        check_lengths(prompts, window=10, max_new_tokens=4, too_long="drop")


def test_a_window_without_room_and_an_unknown_policy_are_refused() -> None:
    with pytest.raises(LimbeckError, match="max_new_tokens is 10 and the window 10 tokens, so no prompt fits"):
        check_lengths([of_length(1)], window=10, max_new_tokens=10)
    with pytest.raises(LimbeckError, match="too_long is 'cut', expected error or drop"):
        check_lengths([of_length(1)], window=10, max_new_tokens=4, too_long="cut")  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 20), min_size=1), st.integers(2, 20), st.integers(1, 19))
def test_kept_and_dropped_are_all_and_kept_fit(lengths: list[int], window: int, answer: int) -> None:
    prompts = [of_length(length) for length in lengths]
    if window <= answer or min(lengths) > window - answer:
        with pytest.raises(LimbeckError):
            check_lengths(prompts, window=window, max_new_tokens=answer, too_long="drop")
        return
    fitting = check_lengths(prompts, window=window, max_new_tokens=answer, too_long="drop")
    assert [prompt.id for prompt in fitting.kept] == [p.id for p in prompts if len(p.ids) + answer <= window]
    assert len(fitting.kept) + len(fitting.dropped) == len(prompts)
