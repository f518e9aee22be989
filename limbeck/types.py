"""The data that a run's stages hand to each other, and the protocols of samplers and teachers. Read this file first.

    prompts ──► responses ──► teachers ──► objectives ──► student ──► evaluation ──► report
     Prompt      Response      Signal       (N,) values    weights     Scores        report.html

Shape suffixes, used throughout the package:

    N  tokens that enter the loss      B  rows of a batch     T  time steps of a row
    V  vocabulary                      K  support of a row    D  hidden size (student and teacher may differ)

This module imports nothing else of limbeck, and torch only for type checkers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Json = dict[str, Any]
Split = Literal["train", "heldout"]
Author = Literal["data", "teacher", "student"]
StopReason = Literal["eos", "stop", "length"]

# `Response.round` of answers that the evaluation after training asks for; training never sees them.
AFTER_TRAINING = -1

_IDS: dict[int, int] = {}


def shared_ids(ids: Sequence[int]) -> tuple[int, ...]:
    """The ids with one Python object for each distinct one: an integer takes 28 bytes, and a run holds millions."""
    return tuple([_IDS.setdefault(i, i) for i in ids])


class LimbeckError(ValueError):
    """An error that the caller can correct. Its message is one line: what was got, what was expected, the remedy."""


class SaidElsewhere(LimbeckError):
    """An error that another rank of the launch says, so that this one ends without a line of its own."""


class Interrupted(Exception):
    """A stage that stopped on request; everything it finished is on disk."""


def short_repr(value: object) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no tokenizer and no UTF-8 file can hold."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """An image inside a turn, by name: the pixels are on disk.

    Attributes:
        id: a hash of the bytes of its file.
    """

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation, in the ecosystem's form.

    Attributes:
        content: its text; of a turn with images, the texts between them.
        fields: further fields for the chat template: tool_calls, tool_call_id, name, reasoning_content.
        parts: of a turn with images, its texts and images in order; else empty.
    """

    role: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    parts: tuple[str | ImageRef, ...] = ()

    def as_turn(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        content: str | list[dict[str, str]] = self.content
        if self.parts:
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.id}
                for part in self.parts
            ]
        return {"role": self.role, "content": content, **self.fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt. Exactly one of `messages` (a conversation to be answered) and `text` (raw text) is set.

    Attributes:
        id: stable name within its source; a hash of the content.
        instruction: of instruction data, (instruction, input) as the source had them, beside the `text` of both; for
            templates that place the two apart (Alpaca). The input may be empty.
        completion: the reference answer, where the data has one; the first where it has several.
        references: all of them where the data has several; else empty. See `known_answers`.
        answer: the reference answer as a turn, where it is more than text: with calls of tools, or a thought.
        tools: schemas of the tools that the prompt offers.
        columns: further columns of its row that the teacher sees, by name.
        split: training or held-out, decided by a hash of the content so that it never depends on order or neighbours.
        where: place in the source ("data.jsonl, line 7"), for messages; not compared.
    """

    id: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    instruction: tuple[str, str] | None = None
    completion: str | None = None
    references: tuple[str, ...] = ()
    answer: Message | None = None
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    split: Split = "train"
    category: str | None = None
    where: str | None = field(default=None, compare=False)

    @property
    def known_answers(self) -> tuple[str, ...]:
        """The reference answers, however many the data has."""
        return self.references or (() if self.completion is None else (self.completion,))

    @property
    def answered(self) -> bool:
        """Whether the data has an answer, as text or as a turn."""
        return self.completion is not None or self.answer is not None

    @property
    def images(self) -> tuple[str, ...]:
        """The ids of its images in order."""
        return tuple(p.id for turn in self.messages or () for p in turn.parts if isinstance(p, ImageRef))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings of a response. `temperature` 0 is greedy decoding. This temperature never enters a loss.

    Attributes:
        top_p: nucleus mass in (0, 1]; 1 keeps the whole vocabulary.
        top_k: 0 keeps the whole vocabulary.
        seed: the seed of the stage; each row derives its own from it and its prompt, so a response does not depend
            on the rows sampled beside it.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """A prompt as the model reads it: the ids of the chat template, ending where the answer begins.

    Attributes:
        label: its name in messages.
        images: ids of its images. Each stands in `ids` as one placeholder; how many tokens it becomes each model
            decides for itself (`limbeck.models.vision`).
    """

    id: str
    ids: tuple[int, ...]
    split: Split = "train"
    label: str = field(default="", compare=False)
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenPrompt(TokenPrompt):
    """A prompt as a model reads it in the place of another one, under which its response is kept.

    Attributes:
        asked: that other prompt.
    """

    asked: TokenPrompt


def as_asked(prompt: TokenPrompt) -> TokenPrompt:
    """The prompt that a response is kept under."""
    while isinstance(asked := getattr(prompt, "asked", None), TokenPrompt):
        prompt = asked
    return prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer, as the token ids that were sampled (or tokenised once, for data). Training uses exactly these ids.

    Attributes:
        response_ids: include the end-of-sequence token when `stop` is "eos".
        spans: of a conversation, the parts of `response_ids` that the assistant wrote, ascending, as (start, end): the
            loss is on these alone, the rest is context. Empty where that is all of them.
        sampling: how it was drawn; None for data.
        logp: log-probability at temperature 1 of every response id, where the sampler was asked to keep it.
        sampled_logp: log-probability of every response id under the distribution it was drawn from, where that is of
            neither model alone (MiniLLM's mixture).
        replaced: number of tokens in which the teacher replaced the student's, where both models sample; not compared.
        round: rollout round in which it was written, from 1; 0 is before training, `AFTER_TRAINING` in the evaluation
            after it.
        images: ids of the images of its conversation, one for each placeholder outside of the loss.
    """

    prompt_id: str
    author: Author
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    stop: StopReason
    sampling: Sampling | None = None
    split: Split = "train"
    logp: tuple[float, ...] | None = None
    sampled_logp: tuple[float, ...] | None = None
    replaced: int | None = field(default=None, compare=False)
    spans: tuple[tuple[int, int], ...] = ()
    round: int = 0
    images: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The one address of a response in signals, caches and logs: a hash of prompt, author and round."""
        address = f"{self.prompt_id}\0{self.author}\0{self.round}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(address).hexdigest()[:16]

    @property
    def label_ids(self) -> tuple[int, ...]:
        """The response ids that enter the loss."""
        if not self.spans:
            return self.response_ids
        return tuple(i for start, end in self.spans for i in self.response_ids[start:end])

    @property
    def tokens(self) -> int:
        """Number of response ids that enter the loss."""
        return sum(end - start for start, end in self.spans) if self.spans else len(self.response_ids)

    @property
    def length(self) -> int:
        """Tokens of prompt and response together."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows padded on the right, ready for a model.

    Attributes:
        input_ids_BT: prompt and response ids, int64.
        attention_mask_BT: 1 on real tokens, int64.
        loss_mask_BT: True where the hidden state predicts a response token (position t predicts token t + 1), bool.
        labels_N: the response tokens those positions predict, row by row, int64.
        rows: number of each row's response, as the caller of `collate` numbered them.
        ids: `Response.id` of each row.
        prompts: `Response.prompt_id` of each row.
        by_student_B: whether the student wrote the response of each row, bool.
        partners: for each row, the row with the other author's response to the same prompt; -1 for none.
        drawn_logp_N: log-probability the response tokens were drawn with; NaN where it was not kept, float32.
        images: ids of the images of each row; empty where no row has any.
        chosen_NS: tokens of each position whose log-probabilities a teacher is asked for beside its own likeliest, such
            as the student's, different ones, int64; None asks for none.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    loss_mask_BT: Tensor
    labels_N: Tensor
    rows: tuple[int, ...]
    ids: tuple[str, ...]
    by_student_B: Tensor
    partners: tuple[int, ...]
    drawn_logp_N: Tensor
    images: tuple[tuple[str, ...], ...] = ()
    prompts: tuple[str, ...] = ()
    chosen_NS: Tensor | None = None

    @property
    def sequence_N(self) -> Tensor:
        """The row of the batch that each position of the loss belongs to, int64."""
        return self.loss_mask_BT.nonzero()[:, 0]

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device),
            attention_mask_BT=self.attention_mask_BT.to(device),
            loss_mask_BT=self.loss_mask_BT.to(device),
            labels_N=self.labels_N.to(device),
            by_student_B=self.by_student_B.to(device),
            drawn_logp_N=self.drawn_logp_N.to(device),
            chosen_NS=None if self.chosen_NS is None else self.chosen_NS.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The map from hidden states to logits: ``softcap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight_VD: output embedding, tied or not.
        bias_V: None for most models.
        scale: factor on the logits (Cohere's logit_scale, the inverse of Granite's logits_scaling).
        softcap: c in ``c * tanh(logits / c)`` (Gemma 2), None for no cap.
        vocab_size: number of real token ids. Rows of `weight_VD` from there on are padding and never get mass.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSignal:
    """The teacher's full distribution as hidden states and head: N*D numbers instead of N*V."""

    hidden_ND: Tensor
    head: Head


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKSignal:
    """The teacher's k most likely tokens (or a sample of them) with log-probabilities at temperature 1.

    Attributes:
        ids_NK: token ids, int64.
        logp_NK: log-probabilities at temperature 1, normalised over the whole vocabulary.
        temperatures: the declared grid G of temperatures the cache is exact for.
        log_z_NG: log sum_v p_v^(1/tau) over the whole vocabulary, one column per temperature of the grid.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    temperatures: tuple[float, ...]
    log_z_NG: Tensor

    def rows(self, keep_N: Tensor | slice) -> TopKSignal:
        """The signal at some of the positions."""
        return replace(self, ids_NK=self.ids_NK[keep_N], logp_NK=self.logp_NK[keep_N], log_z_NG=self.log_z_NG[keep_N])


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSignal:
    """An unbiased sample of the teacher's distribution: tokens drawn from a proposal, and their weights (RS-KD).

    Attributes:
        ids_NK: the distinct tokens drawn, int64; unused places hold any id with a count of zero.
        count_NK: how often each was drawn.
        logp_NK: the teacher's log-probabilities at temperature 1, normalised over the whole vocabulary.
        log_proposal_NK: the log-probabilities they were drawn with.
        temperatures, log_z_NG: as in `TopKSignal`.
    """

    ids_NK: Tensor
    count_NK: Tensor
    logp_NK: Tensor
    log_proposal_NK: Tensor
    temperatures: tuple[float, ...]
    log_z_NG: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSignal:
    """The full distribution of a teacher with other tokens, where its tokens and the student's coincide.

    Attributes:
        hidden_ND: its hidden states at the student's positions; any numbers where the two are not aligned.
        head: its head, rows in another order: first those of the tokens that both have, as `student_ids_S` lists them,
            then those that the student lacks.
        student_ids_S: the student's ids of the tokens that both have, ascending, int64.
        aligned_N: where the two can be compared, bool.
        group_N: elsewhere the group of tokens that each position belongs to, numbered from 0; -1 for none. None where
            groups are left out.
        group_logp_G: the teacher's log-probability of each group.
    """

    hidden_ND: Tensor
    head: Head
    student_ids_S: Tensor
    aligned_N: Tensor
    group_N: Tensor | None = None
    group_logp_G: Tensor | None = None

    @property
    def compared_N(self) -> Tensor:
        """Positions that are compared, alone or in a group, bool."""
        return self.aligned_N if self.group_N is None else self.aligned_N | (self.group_N >= 0)

    def rows(self, keep_N: Tensor | slice) -> SharedSignal:
        """The signal at some of the positions; of a group all or none."""
        group_N = None if self.group_N is None else self.group_N[keep_N]
        return replace(self, hidden_ND=self.hidden_ND[keep_N], aligned_N=self.aligned_N[keep_N], group_N=group_N)


Signal = DenseSignal | TopKSignal | SampledSignal | SharedSignal
Support = Literal["full", "topk_renorm", "topk_tail", "sampled", "shared_tail", "shared_renorm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRow:
    """Metrics of one held-out example. A metric of the run is a mean over such rows, or a function of their sums.

    Attributes:
        id: names the example; rows of two models with the same id are compared as a pair.
        weight: weight of the example in the mean: its tokens for per-token metrics, 1 for whole answers.
        values: metric name to the example's own mean.
        sums: name of a metric of the whole corpus, such as a calibration error, to the example's part of the sums it is
            made of (`limbeck.evaluation.scores.pooled`).
    """

    id: str
    weight: float
    values: Mapping[str, float]
    sums: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric's weighted mean over `n` examples with its 95 % interval (bootstrap over examples, never over tokens).

    Attributes:
        low, high: None when only one example was measured, which has no spread.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Result of the evaluation: metric name to score, before and after training, and the paired change per example.

    A part that was not measured is empty.
    """

    before: Mapping[str, Score]
    after: Mapping[str, Score]
    change: Mapping[str, Score]


@runtime_checkable
class Sampler(Protocol):
    """Writes responses."""

    def respond(self, prompts: Sequence[TokenPrompt], sampling: Sampling) -> list[Response]:
        """Answer every prompt, in the order given."""
        ...


@runtime_checkable
class SignalSource(Protocol):
    """Scores tokens: a teacher, or its stored signals.

    A batch has N loss positions (`loss_mask_BT`, row by row); the signal has one row for each.
    """

    def signal(self, batch: TokenBatch) -> Signal: ...


@runtime_checkable
class StoredSource(SignalSource, Protocol):
    """A source some of whose signals are on disk, so that they can be read while the student computes."""

    def read_stored(self, batch: TokenBatch) -> Signal | None:
        """The signal of a batch with its tensors on the host, the same as of `signal`; None where it is not on disk.

        No model is asked and nothing random is drawn. Called in one thread at a time, which may be another one.
        """
        ...
