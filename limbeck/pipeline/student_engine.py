"""The student's responses written by servers that take its weights before each round, and how far their numbers are
from ours.

    engine/003/                 the student as it begins round 4, for the servers to read
    rounds/003/engine.json      the hash of its weights, and the distance of log-probabilities once it is measured

The hash is on disk before the first answer of a round, so that a round that was interrupted goes on with the same
weights or is written anew. With it the servers name the version that they have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.client.openai import Refusal, Server
from limbeck.client.pool import ServerPool, servers_at
from limbeck.evaluation.likelihood import token_logp
from limbeck.models.forward import evaluating
from limbeck.models.heads import head_of
from limbeck.models.vocabulary import real_vocab_size
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.text_only import load_student_tokenizer
from limbeck.prompts.templates import TemplateName
from limbeck.rollouts.alarms import ENGINE_GAP, ENGINE_GAP_LIMIT, ENGINE_GAP_MOST
from limbeck.rollouts.engines import ENGINE_KEY, Vllm
from limbeck.rollouts.rounds import ProcessGroup
from limbeck.rollouts.table import answer_lengths_of
from limbeck.runtime.files import write_json
from limbeck.runtime.folders import remove
from limbeck.runtime.hashing import sha256_of
from limbeck.runtime.records import fingerprint, read_sealed, sealed
from limbeck.sampling.engine import EngineSampler
from limbeck.sampling.in_batches import InBatches
from limbeck.sampling.served import ServedSampler
from limbeck.sampling.weights import dtype_of, require_endpoints
from limbeck.student.endings import answer_ends
from limbeck.student.saving import save_student
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.served_dialects import ScoredText, VllmScoring
from limbeck.teachers.served_probe import PROBE_TEXTS, check_tokenizer
from limbeck.types import Json, LimbeckError, Response

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Mean distance in nats of a token's log-probability that rounding explains, by the coarser of the two precisions.
GAP_LIMITS = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.1}
# Beyond so many times that distance on a short text the weights are others, whatever the server says.
OTHER_WEIGHTS = 10.0
# Answers of a round that are read again here: of a few thousand tokens the mean is known to a few percent.
COMPARED = 64
_ROWS = 8
# Tokens of a short text: enough to tell weights apart, fewer than any window.
_PROBED = 64


def check_engine(context: RunContext) -> None:
    """Check that the servers that are to write the student's responses can be given weights, and read its tokens.

    One that is down is left to the rounds, where another is up.

    Raises:
        LimbeckError: none is up, or one takes no weights, has other tokens or no model of the name.
    """
    engine = context.recipe.responses.engine
    if not isinstance(engine, Vllm) or context.run.done("train"):
        return
    if not context.wants("train"):
        return
    tokenizer = load_student_tokenizer(context) if context.recipe.student.model else context.teacher.tokenizer
    down: list[LimbeckError] = []
    for server in servers_of(engine):
        try:
            server.hurried.get("/models")
        except LimbeckError as error:
            down.append(error)
            continue
        require_endpoints(server.hurried)
        check_tokenizer(server.hurried, server.hurried.model(engine.model), tokenizer, named="the student")
    if len(down) == len(engine.addresses):
        raise down[0]
    for error in down:
        context.console.warn(f"{error}; the other servers write meanwhile")


def servers_of(engine: Vllm) -> tuple[Server, ...]:
    """The servers, not asked anything yet."""
    return servers_at(engine.base_url, engine, ENGINE_KEY, "the student")


@dataclass(frozen=True, kw_only=True)
class StudentEngine(InBatches):
    """A sampler of the student's responses whose servers have its weights (`limbeck.rollouts.student.TakesWeights`).

    Attributes:
        answers: asks the servers.
        engine: its options in the recipe.
        model: the student as it is, whole.
        folder: where its weights are written for the servers; they see it as `seen_as`.
    """

    answers: EngineSampler
    context: RunContext
    engine: Vllm
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    seen_as: Path
    _dtypes: dict[str, str | None] = field(default_factory=dict)

    def take(self, number: int, world: ProcessGroup) -> None:
        """Give the servers the student's weights as they are now, for a round; the first rank does it for all.

        Raises:
            LimbeckError: on all ranks: no server took them.
        """
        given: tuple[str, str, tuple[str, ...]] = ("", "", ())
        if world.rank == 0:
            try:
                given = ("", *self._give(number))
            except LimbeckError as error:
                # All ranks end with it, or the others would wait for this one.
                given = (str(error), "", ())
        failure, version, addresses = world.gather([given])[0]
        if failure:
            raise LimbeckError(failure)
        if world.rank:
            self.answers.use(version, addresses)

    def compare(self, number: int, responses: Sequence[Response], world: ProcessGroup) -> Mapping[str, float]:
        """How far the log-probabilities that the servers gave of their tokens are from the student's here, as metrics.

        Measured once a round, on some of its responses, by the weights that wrote them.
        """
        known = self._record(number)
        if "limit" not in known:
            # Not of a round whose record was deleted: the weights may be later ones.
            return {}
        if "gap" not in known:
            said = np.flatnonzero(answer_lengths_of(responses))
            chosen = [responses[place] for place in said[:: max(1, -(-len(said) // COMPARED))].tolist()]
            parts = world.gather([self._distances(chosen[world.rank :: world.ranks])])
            total, tokens, most = sum(p[0] for p in parts), sum(p[1] for p in parts), max(p[2] for p in parts)
            known = {**known, "gap": total / max(tokens, 1), "most": most}
            # All ranks have read it: they have met.
            if world.rank == 0:
                write_json(self._path(number), sealed(known))
        return {ENGINE_GAP: known["gap"], ENGINE_GAP_MOST: known["most"], ENGINE_GAP_LIMIT: known["limit"]}

    def _give(self, number: int) -> tuple[str, tuple[str, ...]]:
        """Write the weights and have the servers load them: their version, and the addresses of those that have."""
        name, before = f"{number:03d}", {server.base_url for server in self.answers.pool.left}
        save_student(self.model, self.tokenizer, self.folder / name)
        weights = _hash_of(self.folder / name)
        self._go_on_with(number, weights)
        version = f"{self.context.recipe.name}, round {number + 1}, {weights}"
        (expected,) = self._logp([self._probe])
        left = self.answers.hand_over(
            str(self.seen_as / name), version, lambda server: self._require_ours(server, expected)
        )
        write_json(self._path(number), sealed({"weights": weights, "limit": self._limit}))
        for server in left:
            if server.base_url not in before:
                self.context.console.say(f"write: {server.root} is back, with the weights of round {number + 1}")
        for older in self.folder.iterdir():
            if older.name != name:
                remove(older)
        return version, tuple(server.base_url for server in left)

    def _go_on_with(self, number: int, weights: str) -> None:
        """Note the weights of a round before its first answer, and drop answers that others wrote."""
        known = self._record(number).get("weights", weights)
        if known != weights:
            self.context.console.warn(
                f"{self._path(number).parent} was begun with other weights ({known}); its answers are written anew"
            )
            remove(self._path(number).parent / "student")
        write_json(self._path(number), sealed({"weights": weights}))

    def _path(self, number: int) -> Path:
        return self.context.run.rounds / f"{number:03d}" / "engine.json"

    def _record(self, number: int) -> Json:
        path = self._path(number)
        return read_sealed(path) if path.exists() else {}

    @cached_property
    def _probe(self) -> Response:
        """A short text, as a response to its first token."""
        ids: Any = self.tokenizer(" ".join(PROBE_TEXTS), add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids[:_PROBED]
        return Response(
            prompt_id="probe", author="data", prompt_ids=tuple(ids[:1]), response_ids=tuple(ids[1:]), stop="length"
        )

    def _require_ours(self, server: Server, expected: Sequence[float]) -> None:
        """Check that a server's log-probabilities of a short text are those of the student here."""
        ids = (*self._probe.prompt_ids, *self._probe.response_ids)
        text, scoring = ScoredText(ids=ids, positions=tuple(range(1, len(ids)))), VllmScoring()
        (body,) = scoring.requests(text, self.answers.model_of(server), 1)
        reply = server.post(scoring.path, body)
        try:
            rows = scoring.read([] if isinstance(reply, Refusal) else [reply], text)
            found = [row[label] for row, label in zip(rows, text.labels, strict=True)]
        except (ValueError, LookupError):
            raise LimbeckError(
                f"{server.root} gives no log-probabilities of given tokens ({reply!s:.200}); start it without "
                "--max-logprobs 0, or leave it out"
            ) from None
        gap = sum(abs(one - other) for one, other in zip(found, expected, strict=True)) / len(expected)
        if server.base_url not in self._dtypes:
            self._dtypes[server.base_url] = dtype_of(server)
        allowed = OTHER_WEIGHTS * self._limit
        if not gap <= allowed:
            raise LimbeckError(
                f"{server.root} says that it has the student's weights, and gives a short text log-probabilities "
                f"{gap:.3g} nats from the student's here on average, expected {allowed:g} at most: it serves another "
                f"model, or sees another folder than {self.folder} as {self.seen_as}"
            )

    @property
    def _limit(self) -> float:
        """The mean distance that rounding explains, by the coarsest precision there is."""
        kinds = [*self._dtypes.values(), str(next(self.model.parameters()).dtype).removeprefix("torch.")]
        return max(GAP_LIMITS.get(kind or "", GAP_LIMITS["float32"]) for kind in kinds)

    def _distances(self, responses: Sequence[Response]) -> tuple[float, int, float]:
        """Sum, number and largest of the distances between the log-probabilities of the servers and those here."""
        total, tokens, most = 0.0, 0, 0.0
        for response, ours in zip(responses, self._logp(responses), strict=True):
            assert response.logp is not None, "the sampler keeps them"
            gaps = [abs(one - other) for one, other in zip(response.logp, ours, strict=True)]
            total, tokens, most = total + sum(gaps), tokens + len(gaps), max(most, *gaps)
        return total, tokens, most

    def _logp(self, responses: Sequence[Response]) -> list[list[float]]:
        """The student's log-probabilities at temperature 1 of the tokens of responses."""
        model: Any = self.model
        reader = LocalTeacher(model, head_of(model, real_vocab_size(self.tokenizer), verify=False))
        with evaluating(model):
            found = dict(token_logp(reader, responses, batch_size=_ROWS, device=self.context.device))
        return [found[place].tolist() for place in range(len(responses))]


def student_engine(
    context: RunContext, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, template: TemplateName
) -> StudentEngine:
    """The sampler of a student that servers write for; they are not asked anything yet."""
    recipe, engine = context.recipe, context.recipe.responses.engine
    assert isinstance(engine, Vllm)
    pool = ServerPool(servers=servers_of(engine), warn=context.console.warn)
    ends = answer_ends(model, tokenizer, template, recipe.prompts.chat_options)
    sampler = ServedSampler(
        pool=pool,
        model="",
        tokenizer=tokenizer,
        eos_token_ids=ends,
        end_id=ends[0],
        vocab_size=real_vocab_size(tokenizer),
        author="student",
        concurrency=engine.concurrency,
        keep_logp=True,
    )
    folder = engine_folder(context)
    return StudentEngine(
        answers=EngineSampler(pool=pool, sampler=sampler, model=engine.model),
        batch_size=recipe.responses.batch_size,
        context=context,
        engine=engine,
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        seen_as=folder if engine.seen_as is None else Path(engine.seen_as) / folder.name,
    )


def engine_folder(context: RunContext) -> Path:
    """Where the student's weights are written for the servers: of each run a folder of its own."""
    engine, root = context.recipe.responses.engine, context.run.root.resolve()
    if not isinstance(engine, Vllm) or engine.folder is None:
        return context.run.engine.resolve()
    return Path(engine.folder).expanduser().resolve() / f"{root.name}-{fingerprint(str(root))[:8]}"


def _hash_of(folder: Path) -> str:
    """A hash of the weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]
