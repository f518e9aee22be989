"""Types of values that recipe keys and options of registered members share, and the marks of keys without effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
Probability = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Strings = tuple[str, ...]
# How a judge's verdict is read: as [[A]] in its prose, or by the probabilities of one letter.
VerdictBy = Literal["text", "logprobs"]


@dataclass(frozen=True)
class Effect:
    """The mark, in a key's annotation, of a key with little or no effect on results; see `recipe.keys`."""

    name: str


# No fingerprint holds such a key: two runs may differ in it and be the same run.
NEUTRAL = Effect("neutral")
# What is written depends on such a key, but a comparison takes runs that differ in it alone for one arm.
SAME_ARM = Effect("same arm")
# No fingerprint holds such a key while it has its default: it came later, and what was made before it stays made.
LATER = Effect("later")
