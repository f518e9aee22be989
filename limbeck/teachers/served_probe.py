"""Questions to a server before it is relied on: its kind, the most it says of a position, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from limbeck.client.openai import Refusal, Server
from limbeck.teachers.served_choice import CHOOSING_DIALECTS
from limbeck.teachers.served_dialects import DIALECTS, ScoredText, ScoringDialect, cap_of
from limbeck.types import Json, LimbeckError

# Words, numbers, white space, code, scripts and half a character: where tokenizers differ.
PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and 3 of 12 don't.",
    "def f(x):\n\treturn  x**2 + 1e-3  # 1234567890\n\n\n",
    "na\u00efve caf\u00e9 \u2014 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \U0001f600 e\u0301",
)


def find_dialect(server: Server, model: str, wanted: str, text: ScoredText, count: int) -> ScoringDialect:
    """The way in which a server says how likely it finds given tokens, found by asking about a short text.

    With tokens that are chosen for the positions of the text, the way to ask for these.

    Args:
        wanted: the name of a dialect, or "auto" for the first that is answered.
        count: log-probabilities wanted at each position.

    Raises:
        LimbeckError: it knows none, or gives fewer log-probabilities than wanted.
    """
    said: list[str] = []
    for dialect in CHOOSING_DIALECTS if text.chosen else DIALECTS:
        if wanted not in ("auto", dialect.name):
            continue
        try:
            replies = list(_replies(server, dialect, text, model, count))
        except LimbeckError as error:
            # vLLM's way of saying that what lies there is switched off; its other addresses do answer.
            if not text.chosen or ("PermissionDenied" not in str(error) and "scale" not in str(error)):
                raise
            said.append(f"{dialect.name}: {error}")
            continue
        refused = next((reply for reply in replies if isinstance(reply, Refusal)), None)
        if refused is not None:
            if (cap := cap_of(refused.message)) is not None:
                if text.chosen:
                    raise LimbeckError(
                        f"{server.root} gives at most {cap} log-probabilities of a position, and teacher.support_k and "
                        f"teacher.student_k are {count} together; lower them, or start it with more (vLLM: "
                        f"--max-logprobs {count})"
                    )
                raise LimbeckError(
                    f"{server.root} gives at most {cap} log-probabilities of a position and {count} are asked for; set "
                    f"teacher.support_k={cap}, or start it with more (vLLM: --max-logprobs {count})"
                )
            said.append(f"{dialect.name}: {refused}")
            continue
        try:
            rows = dialect.read([reply for reply in replies if not isinstance(reply, Refusal)], text)
        except ValueError as error:
            said.append(f"{dialect.name}: {error}")
            continue
        few = min(len(row) for row in rows)
        if few < count:
            raise LimbeckError(
                f"{server.root} gives {few} log-probabilities of a position where {count} are asked for; set "
                f"teacher.support_k={few}, or serve the teacher with a server that gives more, such as vLLM"
            )
        return dialect
    if text.chosen:
        raise LimbeckError(
            f"{server.root} cannot be asked for tokens that the student chooses ({'; '.join(said)}); serve the teacher "
            "with vLLM on a GPU (VLLM_USE_V2_MODEL_RUNNER=1, --enable-scale-out) or SGLang, or set teacher.student_k=0"
        )
    raise LimbeckError(
        f"{server.root} gives no log-probabilities of given tokens ({'; '.join(said)}); serve the teacher with vLLM, "
        "SGLang or llama.cpp, or set teacher.where=in_process"
    )


def _replies(
    server: Server, dialect: ScoringDialect, text: ScoredText, model: str, count: int
) -> Iterator[Json | Refusal]:
    for body in dialect.requests(text, model, count):
        reply = server.post(dialect.path, body)
        yield reply
        if isinstance(reply, Refusal):
            return


def check_tokenizer(server: Server, model: str, tokenizer: Any, *, named: str = "teacher.model") -> bool:
    """Check that a server reads texts as the same ids as a tokenizer; False where it says of no text how it reads it.

    Args:
        named: whose tokenizer it is, in messages.

    Raises:
        LimbeckError: it reads one otherwise.
    """
    for text in PROBE_TEXTS:
        expected: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        # The words of vLLM and SGLang, and those of llama.cpp.
        body = {"model": model, "prompt": text, "add_special_tokens": False, "content": text, "add_special": False}
        reply = server.post("//tokenize", body)
        found = None if isinstance(reply, Refusal) else reply.get("tokens")
        if not isinstance(found, list):
            return False
        if found != expected:
            place = _first_difference(found, expected)
            raise LimbeckError(
                f"{server.root} has another tokenizer than {named}: it reads {text[:24]!r} ... as {len(found)} "
                f"tokens and {named} as {len(expected)} (the first difference at token {place}); serve "
                f"{named}, or name the model that is served as {named}"
            )
    return True


def _first_difference(some: Sequence[object], others: Sequence[object]) -> int:
    pairs = zip(some, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
