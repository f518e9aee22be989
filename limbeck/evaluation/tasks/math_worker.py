"""The process that compares mathematical answers with math-verify, see `mathanswers`: a line in, a line out."""

from __future__ import annotations

import json
import logging
import resource
import sys

# Seconds for reading one answer, and for comparing two; the caller waits longer than both together.
_STEP_S = 3
# sympy needs a small part of it; the rest is for what a formula unfolds to.
_MEMORY = 4 << 30


class _TimeOuts(logging.Handler):
    """What math-verify says of a step that took too long: to its caller such answers only differ."""

    seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen = self.seen or record.getMessage().startswith("Timeout during")


def compared(reference: str, answer: str, time_outs: _TimeOuts) -> str:
    """How an answer compares with the reference: "equal", "different", or "timeout" where math-verify gave up.

    Both are LaTeX or plain text, without dollar signs.
    """
    from math_verify import parse, verify

    time_outs.seen = False
    read = [parse(f"\\boxed{{{text}}}", parsing_timeout=_STEP_S) for text in (reference, answer)]
    if verify(read[0], read[1], timeout_seconds=_STEP_S):
        return "equal"
    return "timeout" if time_outs.seen else "different"


def main() -> None:
    # What a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    time_outs = _TimeOuts()
    logging.getLogger("math_verify").addHandler(time_outs)
    compared("\\frac{1}{2}", "0.5", time_outs)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        verdict = compared(asked["reference"], asked["answer"], time_outs)
        print(json.dumps({"verdict": verdict}), file=answers, flush=True)


if __name__ == "__main__":
    main()
