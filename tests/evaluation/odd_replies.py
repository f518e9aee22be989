"""Replies of a judge that are odd, and how each is counted."""

from __future__ import annotations

from typing import Any

HALF = "Both say \ud800 much.\n\n[[A]]"


def completion(content: Any, **more: Any) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]
    } | more


# What one reply among good ones may be: its body, and how it is counted (None: as the verdict that it holds).
ODD: dict[str, tuple[Any, str | None]] = {
    "half of a surrogate pair": (completion(HALF), "garbled"),
    "half of a pair after a thought": (completion("<think>\udfff</think>[[B]]"), "garbled"),
    "half of a pair in a refusal": ({"choices": [{"message": {"content": None, "refusal": "\ud800"}}]}, "refused"),
    "no choices": ({"choices": []}, "odd"),
    "choices that are none": ({"choices": {"0": 1}}, "odd"),
    "a choice that is none": ({"choices": [None]}, "odd"),
    "no message": ({"choices": [{"finish_reason": "stop"}]}, "odd"),
    "a message that is text": ({"choices": [{"message": "[[A]]"}]}, "odd"),
    "parts for content": (completion([{"type": "text", "text": "[[A]]"}]), "odd"),
    "a number for content": (completion(7), "odd"),
    "another object": ({"id": "\ud800" * 500}, "odd"),
    "no content": (completion(None), "empty"),
    "nothing but white space": (completion(" \u2028\x85\t"), "empty"),
    "a thought without end": (completion("<think>[[A]]"), None),
    "line ends of Unicode": (completion("a\u2028b\u2029c\x85d\x0b\x1c\n[[A]]"), None),
    "control characters": (completion("\x00\x1b[2J\x07\ufeff\u202e[[B]]"), None),
    "a very long reply": (completion("x" * (1 << 20) + "[[C]]"), None),
    "other brackets": (completion("[[\uff21]] [[D]] [[AA]]"), "none"),
    "two verdicts": (completion("[[A]][[B]]"), "contradictory"),
    "a finish that is no text": ({"choices": [{"finish_reason": {"x": 1}, "message": {"content": "[[A]]"}}]}, None),
    "a refusal that is no text": ({"choices": [{"message": {"content": "[[A]]", "refusal": {"why": [1]}}}]}, "refused"),
    "usage that is none": (completion("[[A]]", usage=[1]), None),
    "counts without end": (completion("[[A]]", usage={"prompt_tokens": 10**4000, "completion_tokens": -1}), None),
    "counts that are none": (completion("[[A]]", usage={"prompt_tokens": True, "completion_tokens": 1e400}), None),
    "HTML in it": (completion("</script><script>alert(1)</script>[[A]]"), None),
}
