"""Responses of the teacher from a server instead of a model in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from limbeck.client.openai import Server
from limbeck.client.pool import ServerPool, servers_at
from limbeck.models.vocabulary import real_vocab_size
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.served_log import ServedLog
from limbeck.prompts.chat import beyond_text, sent_turns
from limbeck.prompts.labels import prompt_label
from limbeck.prompts.templates import TemplateName
from limbeck.sampling.in_batches import InBatches
from limbeck.sampling.served import ServedSampler
from limbeck.student.endings import answer_ends
from limbeck.types import Json, LimbeckError, Prompt, Response, Sampling, TokenPrompt, as_asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from limbeck.recipe.responses import ServerSection


def check_server(context: RunContext) -> None:
    """Check that a server is up, and that those which are have the model.

    Raises:
        LimbeckError: none is, or one has it not.
    """
    section = context.recipe.responses.server
    if section is None:
        return
    source = context.recipe.responses.source
    asking = {"respond"} if context.recipe.base_author == "teacher" else set[str]()
    asking |= {"train"} if source.paired and source.samples_teacher else set[str]()
    asking -= {stage for stage in asking if context.run.done(stage)}
    if not asking & (asking if context.wanted is None else context.wanted):
        # Nothing that is asked for needs the server: no request, and no key, leaves this machine.
        return
    if section.api == "chat" and context.recipe.prompts.template in ("alpaca", "plain"):
        raise LimbeckError(
            f"responses.server.api=chat has the server write its chat template, but prompts.template is "
            f"{context.recipe.prompts.template}; use api=completions or template chat"
        )
    _name_of_model(
        section, ServerPool(servers=[server.hurried for server in _servers(section)], warn=context.console.warn)
    )


def ask_server(
    context: RunContext,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    asked: Sequence[TokenPrompt],
    template: TemplateName,
    sampling: Sampling,
    folder: str,
) -> tuple[list[Response], Json]:
    """The answers to `asked`, in order, and the server's record for the manifest; answers on disk are not asked for.

    Args:
        prompts: what `asked` was made of, for a server that writes its own chat template.
        folder: name of that of the answers.
    """
    section = context.recipe.responses.server
    assert section is not None
    sampler = _sampler(context, section, tokenizer, prompts, template)
    log = ServedLog.open(context.run.responses / folder / "served.jsonl", model=sampler.model)
    for row, response in log.rows.items():
        assert response.prompt_ids == as_asked(asked[row]).ids
    started, tokens = time.monotonic(), 0
    with context.console.meter("respond", len(asked), "answers", len(log.rows)) as meter:
        for served in sampler.respond_as_they_come(asked, sampling, done=log.rows.keys()):
            with context.stop.deferred():
                log.add(served)
            tokens += len(served.response.response_ids)
            meter.advance(1, f"{tokens / max(time.monotonic() - started, 1e-9):,.0f} tokens/s")
            context.stop.raise_if_requested()
    record = log.record()
    if record["reencoded_from_text"]:
        context.console.warn(
            f"the server gave text alone for {record['reencoded_from_text']} of {len(asked)} answers, whose ids are "
            "the tokenizer's and not those that were drawn"
        )
    if record["prompts_read_otherwise"]:
        context.console.warn(
            f"the server read {record['prompts_read_otherwise']} of {len(asked)} prompts as other tokens than the "
            "teacher's chat template gives"
        )
    return [log.rows[row] for row in range(len(asked))], {"server": record}


def round_sampler(context: RunContext, template: TemplateName) -> InBatches:
    """The sampler that asks the server for the teacher's answers of a round."""
    section = context.recipe.responses.server
    assert section is not None
    prompts = list(context.known_prompts.values())
    prompts = prompts if context.seen is None else list(context.seen.prompts(prompts))
    return InBatches(
        answers=_sampler(context, section, context.teacher.tokenizer, prompts, template),
        batch_size=context.recipe.responses.batch_size,
    )


def _servers(section: ServerSection) -> tuple[Server, ...]:
    return servers_at(section.base_url, section, "responses.server", "the teacher")


def _name_of_model(section: ServerSection, pool: ServerPool) -> str:
    """The servers' name of the teacher; those that are down are left out of the pool.

    Raises:
        LimbeckError: none is up, one has it not, or each has one of another name.
    """
    names: dict[str, str] = {}
    for server in pool.servers:
        try:
            server.get("/models")
        except LimbeckError as error:
            pool.leave_out(server, error)
        else:
            names.setdefault(server.model(section.model), server.root)
    if len(names) > 1:
        offered = ", ".join(f"{root} has {name!r}" for name, root in names.items())
        raise LimbeckError(
            f"the servers of responses.server.base_url have unlike models ({offered}); serve the teacher by one name, "
            "or give that which all have with responses.server.model"
        )
    return next(iter(names))


def _sampler(
    context: RunContext,
    section: ServerSection,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    template: TemplateName,
) -> ServedSampler:
    options = context.recipe.prompts.chat_options
    pool = ServerPool(servers=_servers(section), warn=context.console.warn)
    ends = answer_ends(context.teacher.skeleton, tokenizer, template, options)
    if not ends:
        raise LimbeckError(
            f"{tokenizer.name_or_path} has no end-of-sequence token to end an answer with; set eos_token"
        )
    beyond = next(((prompt, what) for prompt in prompts if (what := beyond_text(prompt))), None)
    if beyond is not None and section.api == "chat":
        raise LimbeckError(
            f"prompt {prompt_label(beyond[0])} has {beyond[1]}, which only completions take as the template writes it; "
            "set responses.server.api=completions"
        )
    plain = template == "chat" and beyond is None
    turns: dict[str, Any] = {prompt.id: sent_turns(prompt) for prompt in prompts} if plain else {}
    return ServedSampler(
        pool=pool,
        model=_name_of_model(section, pool),
        tokenizer=tokenizer,
        eos_token_ids=ends,
        # Where the chat template ends its turns with a token of its own, that one ends an answer.
        end_id=next((token for token in ends if token != tokenizer.eos_token_id), ends[0]),
        vocab_size=real_vocab_size(tokenizer),
        author="teacher",
        api=section.api,
        concurrency=section.concurrency,
        turns=turns,
        chat_options=options,
    )
