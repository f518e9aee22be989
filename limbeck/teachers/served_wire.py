"""Hidden states in the answers of a server: vLLM's pooling runner, which gives the final norm's output of each token.

Such a server has no log-probabilities of its own to compare with. What its states are is seen in them: behind the gain
of the final norm each has the same size. What the head makes of a short text by them is said.
"""

from __future__ import annotations

import base64
import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from limbeck.client.openai import Refusal, Server
from limbeck.client.replies import short_json
from limbeck.teachers.served_dialects import ScoredText
from limbeck.teachers.served_states import ModelEnding, VllmStates, check_states
from limbeck.types import Json, LimbeckError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from limbeck.models.assets import DownloadProgress

NumberFormat = Literal["float32", "bfloat16", "float16"]
# Distance of a state's size from 1 that rounding explains, behind the gain of the norm.
_ROUNDING = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}
_REMEDY = (
    'start vLLM with --runner pooling --convert embed --pooler-config \'{"task": "token_embed"}\' and teacher.model, '
    "as docs/serving.md has it, or set teacher.support=topk_tail"
)


@dataclass(frozen=True, kw_only=True)
class WireStates:
    """vLLM's pooling runner, asked for the state of every token.

    Attributes:
        width: numbers of a state.
        numbers: their format on the way.
    """

    width: int
    numbers: NumberFormat = "float32"

    path = "//pooling"
    behind_norm = True

    def requests(self, text: ScoredText, model: str) -> list[Json]:
        """The request for the states of a text; its last token is no input."""
        body = {"model": model, "input": list(text.ids[:-1]), "task": "token_embed", "use_activation": False}
        body |= {"encoding_format": "base64", "embed_dtype": self.numbers, "endianness": sys.byteorder}
        return [body]

    def read(self, replies: Sequence[Json], text: ScoredText) -> Tensor:
        """The states (positions, D) that predict the scored tokens.

        Raises:
            ValueError: none, another number of them, of another width, or not finite; says which.
        """
        import torch

        rows = replies[0].get("data")
        first = rows[0] if isinstance(rows, list) and len(rows) == 1 else None
        coded = first.get("data") if isinstance(first, dict) else None
        if not isinstance(coded, str):
            raise ValueError(f"{short_json(replies[0])}, expected data with one text's states in base64")
        raw = bytearray(base64.b64decode(coded, validate=True))
        dtype: torch.dtype = getattr(torch, self.numbers)
        tokens, numbers = len(text.ids) - 1, len(raw) // dtype.itemsize
        if len(raw) != tokens * self.width * dtype.itemsize:
            found = f"{numbers / tokens:g} numbers per token" if tokens > 1 else f"{numbers} numbers"
            if tokens > 1 and numbers == self.width:
                found = "one state for the whole text, which it pools"
            raise ValueError(f"{found}, expected a state of {self.width} for each of {tokens} tokens")
        states_TD = torch.frombuffer(raw, dtype=dtype).view(tokens, self.width)
        rows_ND = states_TD[[position - 1 for position in text.positions]]
        if not rows_ND.isfinite().all():
            raise ValueError("hidden states that are not finite")
        return rows_ND


def find_states(
    server: Server,
    model: str,
    ending: ModelEnding,
    ids: Sequence[int],
    *,
    folder: VllmStates,
    progress: DownloadProgress | None = None,
) -> VllmStates | WireStates:
    """The way in which a server gives hidden states, tried on a short text: in its answers, or in a folder.

    Args:
        ids: of the text.
        folder: the second way, which alone is tried where the place of the folder is known.

    Raises:
        LimbeckError: it gives none, or those of another model, layer or norm.
    """
    text = ScoredText(ids=tuple(ids), positions=tuple(range(1, len(ids))))
    wire = WireStates(width=ending.head.weight_VD.shape[1])
    reply = Refusal(status=404, message="not asked")
    if folder.folder is None:
        (asked,) = wire.requests(text, model)
        reply = server.post(wire.path, asked)
    if isinstance(reply, Refusal):
        if reply.status != 404:
            raise _lacking(server, str(reply))
        check_states(server, model, folder, ending, ids)
        return folder
    try:
        rows_ND = wire.read([reply], text)
    except ValueError as error:
        raise _lacking(server, f"it answers with {error}") from None
    numbers = _exact_in(rows_ND)
    _check_sizes(server, rows_ND, numbers, ending)
    if progress is not None:
        nats, chance = _nats(rows_ND, ending, text), math.log(ending.head.vocab_size)
        doubt = "" if nats <= chance else f", where equal chances give {chance:.2f}: is teacher.model what it serves?"
        progress(
            f"{server.root} gives hidden states in its answers, in {numbers}: they fit the final norm of "
            f"teacher.model, and its head makes of them {nats:.2f} nats per token of a short text{doubt}"
        )
    return replace(wire, numbers=numbers)


def _exact_in(rows_ND: Tensor) -> NumberFormat:
    """The shortest format that holds some float32 numbers as they are: that which the server computes in."""
    import torch

    halves: tuple[tuple[NumberFormat, torch.dtype], ...] = (("bfloat16", torch.bfloat16), ("float16", torch.float16))
    for name, dtype in halves:
        if torch.equal(rows_ND.to(dtype).float(), rows_ND):
            return name
    return "float32"


def _check_sizes(server: Server, rows_ND: Tensor, numbers: str, ending: ModelEnding) -> None:
    """Check that states are what the final norm gives.

    Raises:
        LimbeckError: they are not.
    """
    kinds = numbers, str(ending.head.weight_VD.dtype).removeprefix("torch.")
    allowed = max(_ROUNDING.get(kind, 1e-3) for kind in kinds)
    sizes_N = sizes_behind(ending.norm, rows_ND)
    lowest, highest = sizes_N.min().item(), sizes_N.max().item()
    # A norm adds a little to what it divides by, so that small states come out smaller.
    if not 0.9 <= lowest <= highest <= 1 + allowed:
        raise _lacking(
            server,
            f"behind the gain of teacher.model's final norm its states have sizes of {lowest:.3g} to {highest:.3g}, "
            "expected 1: it normalises them, takes another layer than the last, or serves another model",
        )


def _nats(rows_ND: Tensor, ending: ModelEnding, text: ScoredText) -> float:
    """Nats per token that a text has by its states: that of a language model, where the head is of the same model."""
    from limbeck.models.heads import project

    weight_VD = ending.head.weight_VD
    log_p_NV = project(ending.head, rows_ND.to(weight_VD.device, weight_VD.dtype)).float().log_softmax(-1)
    label_N1 = log_p_NV.new_tensor(text.labels).long()[:, None]
    return -log_p_NV.gather(1, label_N1).mean().item()


def sizes_behind(norm: nn.Module, hidden_ND: Tensor) -> Tensor:
    """The root mean square of what a norm has multiplied by its gain, row by row: 1 for what the norm gives.

    Gain and bias are read off two rows whose mean is 0 and whose mean square is 1, so that any norm will do: with the
    mean taken off or not, with a bias or not, with a gain that is stored less one.
    """
    import torch

    exact = copy.deepcopy(norm).float().cpu()
    one_D = torch.ones(hidden_ND.shape[1])
    one_D[::2] = -1
    one_D -= one_D.mean()
    one_D /= one_D.square().mean().sqrt()
    with torch.inference_mode():
        up_D, down_D = exact(one_D), exact(-one_D)
        gain_D, bias_D = (up_D - down_D) / (2 * one_D), (up_D + down_D) / 2
        counts = gain_D != 0
        return ((hidden_ND.float() - bias_D)[:, counts] / gain_D[counts]).square().mean(1).sqrt()


def _lacking(server: Server, why: str) -> LimbeckError:
    return LimbeckError(f"{server.root} gives no hidden states of every token ({why}); {_REMEDY}")
