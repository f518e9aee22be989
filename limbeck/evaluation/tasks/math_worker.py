"""The process that compares mathematical answers with math-verify, see `mathanswers`: a line in, a line out."""

from __future__ import annotations

import json
import resource
import sys

# Seconds for reading one answer, and for comparing two; the caller waits longer than both together.
_STEP_S = 3
# sympy needs a small part of it; the rest is for what a formula unfolds to.
_MEMORY = 4 << 30


def equal(reference: str, answer: str) -> bool:
    """Whether math-verify takes an answer for the reference. Both are LaTeX or plain text, without dollar signs."""
    from math_verify import parse, verify

    read = [parse(f"\\boxed{{{text}}}", parsing_timeout=_STEP_S) for text in (reference, answer)]
    return bool(verify(read[0], read[1], timeout_seconds=_STEP_S))


def main() -> None:
    # What a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    equal("\\frac{1}{2}", "0.5")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"equal": equal(asked["reference"], asked["answer"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
