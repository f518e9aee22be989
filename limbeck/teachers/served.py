"""A teacher that a server scores with, by one of two signals.

"hidden": its hidden states, in the server's answers (behind the final norm) or in files that it writes (before it);
final norm and head are here, so that the whole distribution is known at every temperature.

"topk": log-probabilities at temperature 1, normalised over the whole vocabulary, of `support_k` tokens per position:
the likeliest ones with the token that followed among them (and `student_k` that are chosen for each position, where the
server can be asked for given tokens), so that the mass of all others is known exactly. At other temperatures it is not:
what the rest of the vocabulary adds up to is not said. Nothing of the teacher is here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from limbeck.client.concurrency import concurrently
from limbeck.client.http import MAX_BYTES
from limbeck.client.openai import Refusal, Server
from limbeck.client.pool import ServerPool
from limbeck.teachers.base import Provision, Teacher
from limbeck.teachers.likeliest import at_temperature_one, vocabulary_alone
from limbeck.teachers.served_answers import Answer, KeptAnswers
from limbeck.teachers.served_dialects import DIALECTS, ScoredText, ScoringDialect
from limbeck.teachers.served_options import SECTION, OnServer
from limbeck.teachers.served_probe import PROBE_TEXTS, check_tokenizer, find_dialect
from limbeck.teachers.served_states import ModelEnding, VllmStates
from limbeck.teachers.served_support import kept_tokens
from limbeck.teachers.served_texts import texts_of
from limbeck.teachers.served_wire import WireStates, find_states
from limbeck.types import DenseSignal, Head, Json, LimbeckError, Signal, TokenBatch

# The two ways to hidden states.
States = VllmStates | WireStates


@dataclass(kw_only=True)
class ServedTeacher(Teacher):
    """A teacher behind a server. What it answered is kept in the folder `asked`, where that is set."""

    where: OnServer
    _found: dict[str, tuple[str, ScoringDialect | States]] = field(default_factory=dict)
    _windows: dict[str, int | None] = field(default_factory=dict)
    _agreeing: Any = field(default_factory=threading.RLock)

    @property
    def provides(self) -> frozenset[Provision]:
        """What it is asked for; whether the server can is asked by `reach`."""
        return frozenset({self.where.signal_for(self.support)})

    @property
    def elsewhere(self) -> bool:
        return True

    @property
    def _of_states(self) -> bool:
        return self.where.signal_for(self.support) == "hidden"

    @property
    def head(self) -> Head:
        """Its head; without hidden states the vocabulary alone."""
        if self._of_states:
            return self._ending.head
        return vocabulary_alone(self.vocabulary.vocab_size, self.device)

    @cached_property
    def _ending(self) -> ModelEnding:
        """Final norm and head, all of its weights that are here."""
        from limbeck.models.loading import as_dtype
        from limbeck.models.skeleton import stored_ending
        from limbeck.models.vocabulary import real_vocab_size

        dtype, vocab_size = as_dtype(self.model.dtype), real_vocab_size(self.tokenizer)
        norm, head = stored_ending(self._source(), self.skeleton, vocab_size, dtype)
        bias_V = None if head.bias_V is None else head.bias_V.to(self.device)
        head = replace(head, weight_VD=head.weight_VD.to(self.device), bias_V=bias_V)
        return ModelEnding(norm=norm.to(self.device), head=head)

    @cached_property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A hash of the small files of its model: its weights are elsewhere, under the name that the server has."""
        from limbeck.models.fingerprints import description_fingerprint

        return description_fingerprint(self._source())

    @property
    def bytes_on_disk(self) -> int:
        """Size of its weights in the precision that its configuration names."""
        import torch

        dtype = getattr(torch, self.vocabulary.dtype, torch.float32)
        return (self.size or 0) * dtype.itemsize

    def reach(self) -> None:
        """Ask every server what it can do, and compare its tokenizer.

        Raises:
            LimbeckError: all are down, or one lacks the model, has another tokenizer, or says too little of a token.
        """
        if self._of_states:
            # What is missing here is said before anything is asked.
            _ = self._ending
        for server in self._pool.servers:
            asked = server.hurried
            try:
                asked.models()
            except LimbeckError as error:
                self._pool.leave_out(server, error)
                continue
            self._agree(asked)

    def signal(self, batch: TokenBatch) -> Signal:
        """What the server says of the batch, or has said before."""
        import torch

        texts = [text for text in texts_of(batch) if text is not None]
        answers = dict(self._answers(texts))
        if self._of_states:
            head = self._ending.head
            hidden = [answers[i]["hidden"] for i in range(len(texts))]
            hidden_ND = torch.cat([torch.empty(0, head.weight_VD.shape[1]), *hidden])
            return DenseSignal(hidden_ND=hidden_ND.to(head.weight_VD.device, head.weight_VD.dtype), head=head)
        ids_NK = torch.empty(0, self._kept, dtype=torch.int64)
        logp_NK = torch.empty(0, self._kept)
        ids_NK = torch.cat([ids_NK, *(answers[i]["ids"].long() for i in range(len(texts)))]).to(self.device)
        logp_NK = torch.cat([logp_NK, *(answers[i]["logp"] for i in range(len(texts)))]).to(self.device)
        return at_temperature_one(ids_NK, logp_NK)

    @property
    def _kept(self) -> int:
        """Tokens that are kept of each position, chosen ones among them."""
        return self.support_k + self.student_k

    def fetch_ahead(self, batches: Iterable[TokenBatch], done: Callable[[int], None]) -> None:
        """Ask about all batches at once and keep the answers, so that no batch waits for another."""
        if self.asked is None:
            return
        waiting = [text for batch in batches for text in texts_of(batch) if text is not None]
        for number, _ in self._answers(waiting):
            done(len(waiting[number].positions))

    def settled(self, batches: Iterable[TokenBatch] | None = None) -> None:
        kept = KeptAnswers(self.asked)
        if batches is None:
            kept.forget_all()
            return
        for text in (text for batch in batches for text in texts_of(batch) if text is not None):
            kept.forget(self._question(text))

    @cached_property
    def _pool(self) -> ServerPool:
        servers = self.where.servers()
        if self._of_states:
            # Each token of a text brings as many numbers of 4 bytes as a state has, in base64.
            longest = (self.window or 0) * self.state_width * 6
            servers = tuple(replace(server, max_bytes=max(MAX_BYTES, longest)) for server in servers)
        return ServerPool(servers=servers, warn=self.progress or (lambda line: None))

    def _answers(self, texts: Sequence[ScoredText]) -> Iterator[tuple[int, Answer]]:
        """The answer to each text with its place in the list, in any order; those on disk first."""
        kept = KeptAnswers(self.asked)
        missing: dict[ScoredText, list[int]] = {}
        for number, text in enumerate(texts):
            if text in missing or (answer := kept.get(self._question(text))) is None:
                missing.setdefault(text, []).append(number)
            else:
                yield number, answer

        self._require_room(missing)

        def ask(text: ScoredText) -> tuple[ScoredText, Answer]:
            server, replies = self._pool.post(lambda server: self._requests(server, text))
            answer = self._read(server, replies, text)
            kept.put(self._question(text), answer)
            return text, answer

        workers = min(self.where.concurrency * len(self._pool.servers), len(missing))
        for text, answer in concurrently(ask, missing, workers):
            yield from ((number, answer) for number in missing[text])

    def _require_room(self, texts: Iterable[ScoredText]) -> None:
        """Check that texts are not longer than what a server that was reached reads.

        Raises:
            LimbeckError: one is.
        """
        longest = max((len(text.ids) - 1 for text in texts), default=0)
        for server in self._pool.left:
            window = self._windows.get(server.root)
            if window is not None and longest > window:
                raise LimbeckError(
                    f"{server.root} reads {window} tokens at most, and a prompt and its response have {longest}; serve "
                    f"the teacher with a longer window (vLLM: --max-model-len {longest + 1})"
                )

    def _requests(self, server: Server, text: ScoredText) -> tuple[str, list[Json]]:
        model, dialect = self._way(server, text)
        if isinstance(dialect, States):
            return dialect.path, dialect.requests(text, model)
        # Where a chosen token is among the likeliest, the next one is kept in its place.
        return dialect.path, dialect.requests(text, model, self._kept)

    def _way(self, server: Server, text: ScoredText) -> tuple[str, ScoringDialect | States]:
        """The server's name of the model and the way to ask it about a text, which may have no chosen tokens."""
        model, dialect = self._agree(server)
        if self.student_k and not text.chosen and not isinstance(dialect, States):
            return model, next(one for one in DIALECTS if one.name == dialect.name)
        return model, dialect

    def _question(self, text: ScoredText) -> Json:
        """Everything that an answer depends on."""
        wanted = "hidden" if self._of_states else self._kept
        chosen = {"chosen": text.chosen} if text.chosen else {}
        return {"ids": text.ids, "positions": text.positions, "k": wanted} | chosen | self._asked

    @property
    def _asked(self) -> Json:
        """What all questions have in common."""
        return {"model": self.where.model, "api": self.where.api, "teacher": self.fingerprint}

    def _agree(self, server: Server) -> tuple[str, ScoringDialect | States]:
        """The server's name of the model and the way to ask it."""
        with self._agreeing:
            if server.base_url not in self._found:
                model = server.model(self.where.model)
                KeptAnswers(self.asked).require_same(self._asked, model)
                if not check_tokenizer(server, model, self.tokenizer) and self.progress is not None:
                    self.progress(f"{server.root} does not say how it reads texts: its tokenizer is not compared")
                self._found[server.base_url] = model, self._dialect(server, model)
                self._windows[server.root] = server.window(model)
            return self._found[server.base_url]

    def _dialect(self, server: Server, model: str) -> ScoringDialect | States:
        """The way to ask a server, tried on a short text."""
        ids = tuple(self.tokenizer(PROBE_TEXTS[0], verbose=False)["input_ids"])
        if not self._of_states:
            if self._kept > self.vocabulary.vocab_size:
                more = f" and teacher.student_k {self.student_k}" if self.student_k else ""
                raise LimbeckError(
                    f"teacher.support_k is {self.support_k}{more}, but the teacher has {self.vocabulary.vocab_size} "
                    "tokens; lower it"
                )
            chosen = (tuple(range(self.student_k)),) if self.student_k else ()
            text = ScoredText(ids=ids[:4], positions=(len(ids[:4]) - 1,), chosen=chosen)
            return find_dialect(server, model, self.where.api, text, self._kept)
        if self.where.api not in ("auto", "vllm"):
            raise LimbeckError(
                f"{SECTION}.api={self.where.api} gives no hidden states; set {SECTION}.api=vllm, or "
                "teacher.support=topk_tail"
            )
        folder = None if self.where.folder is None else Path(self.where.folder).expanduser()
        states = VllmStates(folder=folder, patience_s=self.where.timeout_s)
        return find_states(server, model, self._ending, ids, folder=states, progress=self.progress)

    def _read(self, server: Server, replies: Sequence[Json | Refusal], text: ScoredText) -> Answer:
        name = f"a response of {len(text.positions)} tokens"
        if refused := next((reply for reply in replies if isinstance(reply, Refusal)), None):
            raise LimbeckError(
                f"{server.root} declines {name} behind {text.positions[0]} others ({refused}); serve "
                "the teacher with a longer window, or look at the server's log"
            )
        _, dialect = self._way(server, text)
        answered = [reply for reply in replies if not isinstance(reply, Refusal)]
        try:
            if isinstance(dialect, States):
                rows_ND = dialect.read(answered, text)
                return {"hidden": rows_ND if dialect.behind_norm else self._ending.hidden_states(rows_ND).cpu()}
            return kept_tokens(
                dialect.read(answered, text),
                text,
                k=self._kept,
                vocab_size=self.vocabulary.vocab_size,
                rows_of_head=max(self.vocabulary.head_rows, self.vocabulary.vocab_size),
                scored=dialect.scores_labels,
            )
        except ValueError as error:
            raise LimbeckError(
                f"{server.root} answers {name} with {error}; look at the server's log, or serve the teacher anew"
            ) from None
