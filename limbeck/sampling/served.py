"""The sampler that asks OpenAI-compatible servers, with exact token ids where they give them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from limbeck.client.concurrency import concurrently
from limbeck.client.openai import Refusal, Server
from limbeck.client.pool import ServerPool
from limbeck.sampling.batching import check_prompts
from limbeck.sampling.decoding import row_seed
from limbeck.sampling.local import SamplingProgress
from limbeck.sampling.server_choices import prompt_name
from limbeck.sampling.server_dialects import Api, CompletionRequest, Dialect, dialects
from limbeck.sampling.server_replies import Reading, ReplyReader
from limbeck.types import Author, Json, LimbeckError, Response, Sampling, TokenPrompt, as_asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTurns = Sequence[Mapping[str, str]]
# The largest seed that all servers take; llama.cpp draws its own at 2^32 - 1.
_SEEDS = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A finished response.

    Attributes:
        index: where its prompt stands in the list the sampler was given.
        api: which of the server's two endpoints it came from.
        reencoded: the server gave text alone; the ids are the tokenizer's of that text, not those that were drawn.
        prompt_differs: the server read the prompt as other tokens than `prompt_ids` (its chat template, not ours).
    """

    index: int
    response: Response
    api: Api
    reencoded: bool
    prompt_differs: bool


@dataclass
class _Way:
    """How a server is asked, or why it cannot be; found by the first prompt that it gets, while others wait."""

    known: Dialect | LimbeckError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def found(self, agree: Callable[[], tuple[Dialect, Json]]) -> tuple[Dialect, Json | None]:
        """The dialect, and the answer by which it was found, if that was now.

        Raises:
            LimbeckError: what `agree` raised when it was tried.
        """
        with self.lock:
            if isinstance(self.known, LimbeckError):
                raise self.known
            if self.known is not None:
                return self.known, None
            try:
                self.known, reply = agree()
            except LimbeckError as error:
                self.known = error
                raise
            return self.known, reply


@dataclass(frozen=True, kw_only=True)
class ServedSampler:
    """Samples from servers of one model (`limbeck.types.Sampler`).

    A response depends on the server's model and settings, the prompt and the `Sampling`; its seed is a function of
    `Sampling.seed`, author and prompt id, so that it does not depend on what is asked beside it, nor on which server is
    asked, as far as servers keep to seeds.

    Attributes:
        pool: the servers, which share the prompts.
        model: the servers' name of the model.
        eos_token_ids: any of them ends a response and stays in its ids.
        end_id: the one that is put at the end where the server left it out.
        vocab_size: number of real token ids.
        api: "auto" takes the most exact way the server knows.
        turns: the conversation of each prompt by its id, for chat completions; without them only completions are used.
        chat_options: variables of the chat template.
        concurrency: prompts asked at a time, of each server.
        keep_logp: keep the log-probability at temperature 1 of each id in `Response.logp`, as the server says it.
        on_progress: called after every response.
    """

    pool: ServerPool
    model: str
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    end_id: int
    vocab_size: int
    author: Author
    api: Literal["auto", "completions", "chat"] = "auto"
    concurrency: int = 8
    turns: Mapping[str, ChatTurns] = field(default_factory=dict)
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    keep_logp: bool = False
    on_progress: Callable[[SamplingProgress], None] | None = None
    # A tokenizer serves one thread at a time.
    _reading: threading.Lock = field(default_factory=threading.Lock)

    def respond(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        """Answer every prompt, in the order given.

        Raises:
            LimbeckError: see `respond_as_they_come`.
        """
        served = self.respond_as_they_come(prompts, sampling)
        return [one.response for one in sorted(served, key=lambda one: one.index)]

    def respond_as_they_come(
        self, prompts: Sequence[TokenPrompt], sampling: Sampling, *, done: Collection[int] = ()
    ) -> Iterator[Served]:
        """Answer the prompts, each handed over once it is there.

        The first prompt goes alone: a server that cannot answer it is asked no others. The first prompt that a server
        gets finds the dialect that it understands.

        Args:
            done: indices of prompts answered before; they are not asked again.

        Raises:
            LimbeckError: an empty prompt, ids outside the vocabulary, impossible sampling settings, whatever `Server`
                raises of the last server that is left, one that declines, an answer that cannot be read, or
                log-probabilities that were wanted and are not there. Answers that were under way are handed over
                first.
        """
        check_prompts(prompts, sampling, models=(), vocab_size=self.vocab_size, tokenizer=self.tokenizer)
        skipped = set(done)
        left = [index for index in range(len(prompts)) if index not in skipped]
        if not left:
            return
        self.pool.take_back()
        ways = {server.base_url: _Way() for server in self.pool.servers}

        def answer(index: int) -> Served:
            return self._answer(index, prompts[index], sampling, ways)

        first = answer(left[0])
        rest = concurrently(answer, left[1:], min(self.concurrency * len(self.pool.left), len(left) - 1))
        tokens = 0
        for number, served in enumerate(chain((first,), rest), start=1):
            tokens += len(served.response.response_ids)
            if self.on_progress is not None:
                self.on_progress(SamplingProgress(responses_done=number, responses_total=len(left), tokens=tokens))
            yield served

    def _answer(self, index: int, prompt: TokenPrompt, sampling: Sampling, ways: Mapping[str, _Way]) -> Served:
        def ask(server: Server) -> tuple[Server, Dialect, Json | Refusal | None]:
            dialect, reply = ways[server.base_url].found(lambda: self._agree(server, prompt, sampling))
            if reply is None and (content := self._content(dialect, prompt)) is not None:
                reply = server.post(dialect.path, self.request(dialect, content, prompt, sampling))
            return server, dialect, reply

        server, dialect, reply = self.pool.of_any(ask)
        if reply is None:
            raise LimbeckError(
                f"{prompt_name(prompt)} cannot be written as a text that the tokenizer reads as the same ids, and "
                "the server takes text alone; set responses.server.api=chat, or use a server that takes ids (vLLM)"
            )
        if isinstance(reply, Refusal):
            raise LimbeckError(
                f"{prompt_name(prompt)}: {server.root} declines ({reply}); shorten or drop it, or look at the "
                "server's log"
            )
        return self.read(index, prompt, reply, dialect, sampling, server)

    def _agree(self, server: Server, prompt: TokenPrompt, sampling: Sampling) -> tuple[Dialect, Json]:
        """The first dialect in which a server answers, with its answer."""
        refusals: dict[str, None] = {}
        for dialect in dialects(self.api, chat=bool(self.turns)):
            if not dialect.speaks(sampling, self.chat_options):
                continue
            content = self._content(dialect, prompt)
            if content is None:
                continue
            reply = server.post(dialect.path, self.request(dialect, content, prompt, sampling))
            if not isinstance(reply, Refusal):
                with self._reading:
                    source = self._reader.read(reply, prompt, sampling).source
                # What gives nothing is not asked for again: log-probabilities cost the server time.
                return replace(dialect, logprobs=self.keep_logp or source == "logprobs"), reply
            refusals[str(reply)] = None
        said = "; ".join(list(refusals)[:3]) or "no dialect of it has words for this prompt and these settings"
        raise LimbeckError(
            f"{server.root} declines to answer {prompt_name(prompt)} ({said}); "
            "correct responses.server.model, the prompt or the sampling, or set responses.server.api"
        )

    def _content(self, dialect: Dialect, prompt: TokenPrompt) -> Any:
        """The prompt as the dialect sends it; None where it cannot be sent so."""
        if dialect.wire == "ids":
            return prompt.ids
        if dialect.wire == "messages":
            return self.turns.get(prompt.id)
        with self._reading:
            for ids in (prompt.ids, prompt.ids[1:]):
                # The server's tokenizer puts its own beginning-of-sequence token before a text.
                text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
                if tuple(self.tokenizer(text, verbose=False)["input_ids"]) == prompt.ids:  # type: ignore[arg-type]
                    return text
        return None

    def request(self, dialect: Dialect, content: Any, prompt: TokenPrompt, sampling: Sampling) -> Json:
        """The body of the request for an answer to a prompt, which `content` stands for."""
        return dialect.request(
            CompletionRequest(
                model=self.model,
                content=content,
                sampling=sampling,
                seed=row_seed(sampling, self.author, prompt.id) % _SEEDS,
                eos_token_ids=self.eos_token_ids,
                chat_options=self.chat_options,
            )
        )

    def read(
        self, index: int, prompt: TokenPrompt, reply: Json, dialect: Dialect, sampling: Sampling, server: Server
    ) -> Served:
        """The response in a server's answer to the prompt at a place of the list; several threads may ask.

        Raises:
            LimbeckError: it cannot be read, is one to another prompt, or lacks log-probabilities that were wanted.
        """
        with self._reading:
            reading = self._reader.read(reply, prompt, sampling)
        if self.keep_logp and reading.logp is None:
            raise LimbeckError(
                f"{prompt_name(prompt)}: {server.root} gives no log-probabilities of the ids it drew, "
                "which keep_logp asks for; use a server that returns both, such as vLLM, or do without them"
            )
        return Served(
            index=index,
            response=Response(
                prompt_id=prompt.id,
                author=self.author,
                prompt_ids=as_asked(prompt).ids,
                response_ids=reading.ids,
                stop=reading.stop,
                sampling=sampling,
                split=prompt.split,
                logp=reading.logp if self.keep_logp else None,
            ),
            api=dialect.api,
            reencoded=reading.source == "text",
            prompt_differs=self._prompt_differs(reading, prompt, dialect, server),
        )

    def _prompt_differs(self, reading: Reading, prompt: TokenPrompt, dialect: Dialect, server: Server) -> bool:
        differs = False
        if reading.prompt_ids is not None:
            differs = reading.prompt_ids != prompt.ids
        elif dialect.wire != "ids" and reading.prompt_tokens is not None:
            differs = reading.prompt_tokens != len(prompt.ids)
        if differs and dialect.api == "completions":
            count = reading.prompt_tokens if reading.prompt_ids is None else len(reading.prompt_ids)
            raise LimbeckError(
                f"{prompt_name(prompt)}: {server.root} read its {len(prompt.ids)} tokens as {count} "
                f"others, so that it answers another prompt; serve the {self.author} with the {self.author}'s own "
                "tokenizer"
            )
        return differs

    @property
    def _reader(self) -> ReplyReader:
        return ReplyReader(
            tokenizer=self.tokenizer,
            eos_token_ids=frozenset(self.eos_token_ids),
            end_id=self.end_id,
            vocab_size=self.vocab_size,
            author=self.author,
        )
