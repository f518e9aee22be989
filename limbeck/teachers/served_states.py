"""Hidden states that a server writes into a folder which this machine sees too: the files, and the half of the model
behind them.

vLLM's `extract_hidden_states` caches the output of the last block, before the final norm. Its answer names a
safetensors file with the states of every token of the prompt, and a lock beside that file, held until it is whole.
Final norm and head are applied here, so the teacher's whole distribution is known at every temperature.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from limbeck.client.openai import Refusal, Server
from limbeck.client.replies import short_json
from limbeck.teachers.served_dialects import ScoredText, VllmScoring
from limbeck.types import Head, Json, LimbeckError

if TYPE_CHECKING:
    from torch import Tensor, nn

_PAUSE_S = 0.01
# Mean distance in nats from the server's own log-probabilities that rounding explains; bfloat16 rounds logits near 20
# to steps of an eighth.
_ROUNDING = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15}
_REMEDY = (
    "start vLLM with --speculative-config and --kv-transfer-config, or with --runner pooling, as docs/serving.md has "
    "them"
)


@dataclass(frozen=True, kw_only=True)
class ModelEnding:
    """What a model does behind its last block."""

    norm: nn.Module
    head: Head

    def hidden_states(self, states_ND: Tensor) -> Tensor:
        """The hidden states that the head projects."""
        import torch

        weight_VD = self.head.weight_VD
        with torch.inference_mode():
            hidden_ND = self.norm(states_ND.to(weight_VD.device, weight_VD.dtype))
        return hidden_ND.clone()


@dataclass(frozen=True, kw_only=True)
class VllmStates:
    """vLLM with a connector that writes hidden states.

    Attributes:
        folder: where the server's folder lies on this machine; None is the path that it names.
        patience_s: seconds that a file may take to be whole after the answer.
    """

    folder: Path | None
    patience_s: float

    path = "/completions"
    behind_norm = False

    def requests(self, text: ScoredText, model: str) -> list[Json]:
        """The request for the states of a text; its last token is no input."""
        ids = list(text.ids[:-1])
        return [{"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "kv_transfer_params": {}}]

    def read(self, replies: Sequence[Json], text: ScoredText) -> Tensor:
        """The states (positions, D) that predict the scored tokens; the server's file is deleted.

        Raises:
            ValueError: no file, one of another text, or one that is not finite; says which.
        """
        states_TD = take_states(self._named(replies[0]), text.ids[:-1], patience_s=self.patience_s)
        rows_ND = states_TD[[position - 1 for position in text.positions]]
        if not rows_ND.isfinite().all():
            raise ValueError("hidden states that are not finite")
        return rows_ND

    def _named(self, reply: Json) -> Path:
        params = reply.get("kv_transfer_params")
        named = params.get("hidden_states_path") if isinstance(params, dict) else None
        if not isinstance(named, str) or not named:
            raise ValueError(f"kv_transfer_params {short_json(params)}, expected hidden_states_path")
        return Path(named) if self.folder is None else self.folder / Path(named).name


def take_states(path: Path, ids: Sequence[int], *, patience_s: float) -> Tensor:
    """The hidden states (T, D) in a server's file, which is deleted with its lock: of the last layer that it holds.

    The file is a server's to name and may be anything, so it goes only if it holds the states of the ids that were
    sent.

    Raises:
        ValueError: it is not there, not whole in time, or of other tokens.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    lock = path.with_name(f"{path.name}.lock")
    _wait_for(lock, patience_s)
    if not path.is_file():
        raise ValueError(
            f"hidden states in {path}, which is not on this machine (let the server's shared_storage_path be a folder "
            "that both see, and name its place here as teacher.where.folder where it has another)"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"hidden states in {path}, which cannot be read ({error})") from None
    states, said = tensors.get("hidden_states"), tensors.get("token_ids")
    if states is None or said is None or states.dim() != 3 or len(states) != len(said):
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{path} with {shapes}, expected hidden_states (tokens, layers, width) and token_ids")
    if said.tolist() != list(ids):
        raise ValueError(f"{path} with hidden states of {len(said)} other tokens than the {len(ids)} that were sent")
    # Out of the file's memory, before the file goes.
    states_TD = states[:, -1].clone()
    try:
        path.unlink()
        lock.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path}, which cannot be deleted after reading ({error.strerror})") from None
    return states_TD


def _wait_for(lock: Path, patience_s: float) -> None:
    """Wait until the server has given a lock back.

    Raises:
        ValueError: it has not, in time.
    """
    # Not everywhere, and nowhere without a shared folder.
    import fcntl

    if not lock.is_file():
        return
    end = time.monotonic() + patience_s
    with contextlib.suppress(FileNotFoundError), lock.open("rb") as file:
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(f"hidden states that are not whole after {patience_s:g} s ({lock})") from None
                time.sleep(_PAUSE_S)


def check_states(server: Server, model: str, states: VllmStates, ending: ModelEnding, ids: Sequence[int]) -> None:
    """Compare log-probabilities made of a server's hidden states with its own.

    Args:
        ids: of a short text.

    Raises:
        LimbeckError: the server gives no hidden states, or those of another model, layer or norm.
    """
    from limbeck.models.heads import project

    text = ScoredText(ids=tuple(ids), positions=tuple(range(1, len(ids))))
    own = VllmScoring()
    (asked,), (compared,) = states.requests(text, model), own.requests(text, model, 1)
    reply, said = server.post(states.path, asked), server.post(own.path, compared)
    for refused in (reply, said):
        if isinstance(refused, Refusal):
            raise _lacking(server, str(refused))
    assert not isinstance(reply, Refusal) and not isinstance(said, Refusal)
    try:
        rows_ND = states.read([reply], text)
        rows = own.read([said], text)
        expected = [row[label] for row, label in zip(rows, text.labels, strict=True)]
    except KeyError as error:
        raise LimbeckError(f"{server.root} gives no log-probability of token {error}; {_REMEDY}") from None
    except ValueError as error:
        raise _lacking(server, f"it answers with {error}") from None
    if "kv_transfer_params" in said:
        # Such a server writes the states of every request.
        with contextlib.suppress(ValueError):
            states.read([said], ScoredText(ids=(*text.ids, 0), positions=text.positions))
    width = ending.head.weight_VD.shape[1]
    if rows_ND.shape[1] != width:
        raise _lacking(server, f"it writes states of width {rows_ND.shape[1]} and teacher.model has {width}")
    log_p_NV = project(ending.head, ending.hidden_states(rows_ND)).float().log_softmax(-1)
    label_N1 = log_p_NV.new_tensor(text.labels).long()[:, None]
    gap = (log_p_NV.gather(1, label_N1)[:, 0] - log_p_NV.new_tensor(expected)).abs().mean().item()
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (rows_ND, ending.head.weight_VD)]
    allowed = max(_ROUNDING.get(kind, 1e-3) for kind in kinds)
    if not gap <= allowed:
        raise _lacking(
            server,
            f"with the final norm and head of teacher.model its hidden states give log-probabilities {gap:.3g} nats "
            f"from its own, expected {allowed:g} at most: it extracts another layer than the last, or serves another "
            "model",
        )


def _lacking(server: Server, why: str) -> LimbeckError:
    return LimbeckError(
        f"{server.root} gives no hidden states to learn the whole distribution from ({why}); {_REMEDY}, or set "
        "teacher.support=topk_tail"
    )
