"""Cost of a model: parameters, memory, and the seconds of reading a prompt and of writing token by token.

Seconds are of this process, this machine and plain transformers; two models are timed in turns, so that whatever else
the machine does meets both alike. No time is reproducible bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from limbeck.models.heads import causal_model
from limbeck.types import LimbeckError

Timer = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One repeat.

    Attributes:
        prefill_s: seconds to read the whole prompt.
        step_s: seconds for each token written after it, the mean over the tokens.
    """

    prefill_s: float
    step_s: float


def parameters(model: nn.Module) -> int:
    """Parameters, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory; what two modules share counts once."""
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    held |= {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.buffers()}
    return sum(held.values())


def timed_in_turns(
    models: Mapping[str, tuple[nn.Module, Sequence[int]]],
    *,
    new_tokens: int,
    repeats: int,
    clock: Timer = time.perf_counter,
) -> dict[str, list[Timing]]:
    """Time models on a prompt each, one after the other, `repeats` times over; a first round is not counted.

    Args:
        models: name to model and the ids of its prompt.
        new_tokens: tokens written greedily; an end of sequence does not end them.

    Raises:
        LimbeckError: prompt and new tokens do not fit a model's window.
    """
    for name, (model, ids) in models.items():
        require_window(name, causal_model(model).config.get_text_config().to_dict(), len(ids) + new_tokens)
    found: dict[str, list[Timing]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, (model, ids) in models.items():
            timing = _once(causal_model(model), ids, new_tokens, clock)
            if repeat:
                found[name].append(timing)
    return found


@torch.inference_mode()
def timed_passes(
    model: nn.Module,
    ids: Sequence[int],
    *,
    widths: Sequence[int],
    repeats: int,
    clock: Timer = time.perf_counter,
) -> dict[int, list[float]]:
    """Seconds of passes over several tokens at once behind a context, by width, in turns; a first round is not counted.

    Args:
        ids: the context; a pass reads its last tokens once more.
    """
    model = causal_model(model)
    device = next(model.parameters()).device
    read = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=True, logits_to_keep=1)
    found: dict[int, list[float]] = {width: [] for width in widths}
    for repeat in range(repeats + 1):
        for width in widths:
            cache = copy.deepcopy(read.past_key_values)
            ids_1W = torch.tensor([(list(ids) * width)[-width:]], device=device)
            settle(device)
            started = clock()
            model(input_ids=ids_1W, past_key_values=cache, use_cache=True).logits.argmax(-1)
            settle(device)
            if repeat:
                found[width].append(clock() - started)
    return found


def require_window(name: str, config: Mapping[str, object], tokens: int) -> None:
    """See that so many tokens fit.

    Raises:
        LimbeckError: they do not.
    """
    window = config.get("max_position_embeddings")
    if isinstance(window, int) and tokens > window:
        raise LimbeckError(
            f"evaluate.groups.cost times {tokens} tokens (prompt_tokens + new_tokens), expected at most {window}, "
            f"the window of the {name}; lower evaluate.groups.cost.prompt_tokens"
        )


@torch.inference_mode()
def _once(model: nn.Module, ids: Sequence[int], new_tokens: int, clock: Timer) -> Timing:
    device = next(model.parameters()).device
    ids_1T = torch.tensor([list(ids)], device=device)
    settle(device)
    started = clock()
    seen = model(input_ids=ids_1T, use_cache=True, logits_to_keep=1)
    next_11 = seen.logits[:, -1:].argmax(-1)
    settle(device)
    read = clock()
    for _ in range(new_tokens):
        seen = model(input_ids=next_11, past_key_values=seen.past_key_values, use_cache=True, logits_to_keep=1)
        next_11 = seen.logits[:, -1:].argmax(-1)
    settle(device)
    return Timing(prefill_s=read - started, step_s=(clock() - read) / new_tokens)


def settle(device: torch.device) -> None:
    """Wait for what an accelerator has still to do: its clock is not the host's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
