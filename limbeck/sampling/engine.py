"""The sampler that asks servers which have taken the student's weights: no answer is by others.

A server that is started anew has its first weights again, and another client may give it others. So its version is
asked before and after each answer, and an answer between two unlike ones does not count: its prompt is asked of another
server. A server that failed so is asked nothing until it has taken weights again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from limbeck.client.concurrency import concurrently
from limbeck.client.openai import Refusal, Server
from limbeck.client.pool import ServerPool
from limbeck.sampling.batching import check_prompts, require_text
from limbeck.sampling.served import Served, ServedSampler
from limbeck.sampling.server_choices import prompt_name
from limbeck.sampling.server_dialects import Dialect
from limbeck.sampling.weights import hand_over, require_version
from limbeck.types import Json, LimbeckError, Sampling, TokenPrompt

# Ids in, ids out, with the log-probability of each.
_DIALECT = Dialect(api="completions", name="engine", logprobs=True)


@dataclass(kw_only=True)
class EngineSampler:
    """Samples from servers that have one version of the student's weights.

    Attributes:
        pool: the servers, which share the prompts.
        sampler: how one of them is asked and its answer read; the model it names is not.
        model: the servers' name of the student; None is the only one that each offers.
        version: of the weights that answers must be by.
    """

    pool: ServerPool
    sampler: ServedSampler
    model: str | None = None
    version: str = ""
    _models: dict[str, str] = field(default_factory=dict)

    def model_of(self, server: Server) -> str:
        """The name of the student at a server, which is asked once."""
        if server.base_url not in self._models:
            self._models[server.base_url] = server.model(self.model)
        return self._models[server.base_url]

    def hand_over(self, folder: str, version: str, check: Callable[[Server], None]) -> tuple[Server, ...]:
        """Give all servers the weights in a folder; those that were left out before too.

        Args:
            folder: as the servers see it.
            check: refuses a server that has other weights all the same.

        Returns:
            The servers that have them. The others are left out.

        Raises:
            LimbeckError: no server took them; the failure of the last one.
        """
        self.version = version
        self.pool.take_back()

        def give(server: Server) -> None:
            try:
                hand_over(server, folder, version)
                check(server)
            except LimbeckError as error:
                self.pool.leave_out(server, error)

        for _ in concurrently(give, self.pool.servers, len(self.pool.servers)):
            continue
        return self.pool.left

    def use(self, version: str, addresses: Collection[str]) -> None:
        """Rely on the servers at some addresses, which another rank has given the weights of a version."""
        self.version = version
        self.pool.take_back()
        self.pool.keep(addresses)

    def respond_as_they_come(
        self, prompts: Sequence[TokenPrompt], sampling: Sampling, *, done: Collection[int] = ()
    ) -> Iterator[Served]:
        """Answer the prompts, each handed over once it is there.

        Args:
            done: indices of prompts answered before; they are not asked again.

        Raises:
            LimbeckError: an empty prompt, ids outside the vocabulary, impossible sampling settings, a prompt that a
                server declines, an answer that cannot be read, or no server left that has the weights. Answers that
                were under way are handed over first.
        """
        vocab_size, tokenizer = self.sampler.vocab_size, self.sampler.tokenizer
        check_prompts(prompts, sampling, models=(), vocab_size=vocab_size, tokenizer=tokenizer)
        require_text(prompts)
        skipped = set(done)
        rows = [(index, prompt) for index, prompt in enumerate(prompts) if index not in skipped]
        workers = min(self.sampler.concurrency * len(self.pool.servers), len(rows))
        yield from concurrently(lambda row: self._answer(*row, sampling), rows, workers)

    def _answer(self, index: int, prompt: TokenPrompt, sampling: Sampling) -> Served:
        def ask(server: Server) -> tuple[Server, Json | Refusal]:
            asking = replace(self.sampler, model=self.model_of(server))
            return server, self._with_these_weights(server, asking.request(_DIALECT, prompt.ids, prompt, sampling))

        server, reply = self.pool.of_any(ask)
        if isinstance(reply, Refusal):
            raise LimbeckError(
                f"{prompt_name(prompt)}: {server.root} declines ({reply}); start the server with a longer "
                "--max-model-len, or shorten or drop the prompt"
            )
        return self.sampler.read(index, prompt, reply, _DIALECT, sampling, server)

    def _with_these_weights(self, server: Server, body: Json) -> Json | Refusal:
        """A server's answer, by the version of its weights that is wanted.

        Each try is between two looks at the version: a server that comes back between two tries has others.
        """
        once = replace(server, retries=0)
        for number in range(server.retries + 1):
            require_version(server, self.version)
            try:
                reply = once.post(_DIALECT.path, body)
            except LimbeckError:
                if number == server.retries:
                    raise
                time.sleep(server.backoff_s * 2**number)
                continue
            require_version(server, self.version)
            return reply
        raise AssertionError("the last try returns or raises")
