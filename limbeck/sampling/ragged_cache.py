"""A key-value cache whose rows have lengths of their own and can be taken back.

Where two models write together, each row keeps another number of the drafted tokens. Here a token's slot is its
position in its own row: a forward pass says where its tokens go, overwrites the slots, and attention gets
by a mask of its own which slots a token sees (those up to its position, within the layer's window). Taking tokens back
is forgetting that they are there. Nothing is shifted, and a row ends where it ends.

Shape suffixes: R rows of a pass, Q tokens of a pass, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from limbeck.models.heads import causal_model, project
from limbeck.sampling.decoding import DecodingModel, SequenceState, prefill_groups
from limbeck.sampling.kv_cache import BufferLayer
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PROBE_TOKENS = 8
# As far as rounding goes in half precision, relative to the largest logit; a wrong mask is off by much more.
_PROBE_TOLERANCE = 0.05


@dataclass
class Place:
    """Slots that the next forward pass writes, shared by all layers.

    Attributes:
        first: row of the cache that the first row of the pass is.
        positions_RQ: position of each token in its row, which is its slot; int64.
        reach: slots that the pass looks at.
    """

    first: int
    positions_RQ: Tensor
    reach: int


class RaggedLayer(BufferLayer):
    """A layer whose rows hold different numbers of tokens."""

    def __init__(self, rows: int, capacity: int, cache: RaggedCache):
        BufferLayer.__init__(self, rows, capacity)
        self.cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new states at their places and return a view of all slots in reach."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        place = self.cache.place
        rows = slice(place.first, place.first + len(key_states))
        row_R1 = torch.arange(rows.start, rows.stop, device=key_states.device)[:, None]
        # The layers of a placed model are on several devices.
        positions_RQ = place.positions_RQ.to(key_states.device)
        self.keys[row_R1, :, positions_RQ] = key_states.transpose(1, 2)
        self.values[row_R1, :, positions_RQ] = value_states.transpose(1, 2)
        return self.keys[rows, :, : place.reach], self.values[rows, :, : place.reach]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.place.reach, 0

    def get_seq_length(self) -> int:
        place = self.cache.place
        return place.reach - place.positions_RQ.shape[1]

    def copy_row(self, source: int, target: int) -> None:
        """Overwrite one row by another."""
        if self.keys is not None and self.values is not None:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]


class RaggedCache(Cache):
    """The cache of one batch.

    Attributes:
        place: set before every forward pass.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, capacity: int):
        """`capacity` is the number of slots: the tokens of the longest row.

        Raises:
            LimbeckError: layers that keep a running state instead of keys and values, which cannot be taken back.
        """
        layers = DynamicCache(config=config).layers
        config = config.get_text_config(decoder=True)
        kinds = list(getattr(config, "layer_types", None) or ())
        strange = [type(layer).__name__ for layer in layers if type(layer) not in _ATTENTION]
        strange += [kind for kind in kinds if kind not in _KINDS]
        if strange:
            raise LimbeckError(
                f"a {config.model_type} model keeps {strange[0]} in its cache, expected keys and values of full or "
                "sliding attention: tokens cannot be taken back from it, so let it write alone (LocalSampler)"
            )
        windows = [layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None for layer in layers]
        self._windows: dict[str, int | None] = dict(zip(kinds or [""] * len(windows), windows, strict=False))
        self.place = Place(0, torch.zeros(rows, 0, dtype=torch.int64), 0)
        Cache.__init__(self, layers=[RaggedLayer(rows, capacity, self) for _ in layers])

    def masks(self, attention: str, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Mask of what tokens of the pass see, in the form that the attention takes: (R, 1, Q, S), by kind of layer."""
        positions_RQ1 = self.place.positions_RQ[..., None]
        slots_S = torch.arange(self.place.reach, device=positions_RQ1.device)
        masks = {}
        for kind, window in self._windows.items():
            seen_RQS = slots_S <= positions_RQ1
            if window is not None:
                seen_RQS &= slots_S > positions_RQ1 - window
            mask_R1QS = seen_RQS[:, None]
            if attention == "eager":
                hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=slots_S.device)
                mask_R1QS = torch.where(mask_R1QS, torch.zeros_like(hidden), hidden)
            masks[kind] = mask_R1QS
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def keep(self, order: list[int]) -> None:
        """Drop rows: afterwards row i is what row `order[i]` was. Rows already in place cost nothing."""
        for target, source in enumerate(order):
            if target != source:
                for layer in self.layers:
                    assert isinstance(layer, RaggedLayer)
                    layer.copy_row(source, target)


_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
_KINDS = ("full_attention", "sliding_attention")


@dataclass(kw_only=True, eq=False)
class CacheReader:
    """A model that reads tokens at places of their own."""

    writer: DecodingModel
    cache: RaggedCache

    @classmethod
    def of(cls, writer: DecodingModel, *, rows: int, capacity: int) -> CacheReader:
        return cls(writer=writer, cache=RaggedCache(writer.config, rows, capacity))

    def read(self, ids_RQ: Tensor, positions_RQ: Tensor, reach: int) -> Tensor:
        """Hidden states of all tokens: (R, Q, D). The rows are the first R of the cache."""
        self.cache.place = Place(0, positions_RQ, reach)
        mask = self.cache.masks(self.writer.config._attn_implementation or "eager", self.writer.head.weight_VD.dtype)
        return self._pass(ids_RQ, positions_RQ, mask)

    def prefill(self, drafts: Sequence[SequenceState]) -> None:
        """Read every prompt but for its last token. Rows are padded on the right, where nothing before sees it."""
        device = self.writer.device
        for first, group in prefill_groups(drafts, whole=False):
            width = max(len(draft.prompt.ids) for draft in group) - 1
            if not width:
                continue
            ids_RT = torch.full((len(group), width), self.writer.pad_token_id)
            for row, draft in enumerate(group):
                ids_RT[row, : len(draft.prompt.ids) - 1] = torch.tensor(draft.prompt.ids[:-1], dtype=torch.int64)
            positions_RT = torch.arange(width, device=device).expand(len(group), -1)
            self.cache.place = Place(first, positions_RT, width)
            # Without a mask attention takes its own causal kernel.
            self._pass(ids_RT.to(device), positions_RT, None)

    def _pass(self, ids_RQ: Tensor, positions_RQ: Tensor, mask: Tensor | dict[str, Tensor] | None) -> Tensor:
        return self.writer.decoder(
            input_ids=ids_RQ,
            position_ids=positions_RQ,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


@torch.inference_mode()
def require_ragged(model: nn.Module, writer: DecodingModel, role: str) -> None:
    """See whether a model bears rows of different lengths: a few tokens, some of them taken back and read anew.

    Raises:
        LimbeckError: its logits are not those of a plain pass, or its attention takes no masks.
    """
    name = type(causal_model(model)).__name__
    if (attention := writer.config._attn_implementation) not in ("sdpa", "eager"):
        raise LimbeckError(
            f"the {role} ({name}) runs on {attention}, expected sdpa or eager where two models write together: "
            "load it with attn_implementation=sdpa"
        )
    if writer.config.model_type == "bloom" or writer.config.to_dict().get("alibi"):
        raise LimbeckError(
            f"the {role} ({name}) knows positions by ALiBi, expected rotary or learned ones where two models write "
            "together: let it write alone (LocalSampler)"
        )
    draws = torch.Generator().manual_seed(0)
    ids_RT = torch.randint(0, writer.head.vocab_size, (2, _PROBE_TOKENS), generator=draws).to(writer.device)
    plain = writer.decoder(input_ids=ids_RT, attention_mask=torch.ones_like(ids_RT), use_cache=False)
    plain_RTV = project(writer.head, plain.last_hidden_state)
    reader = CacheReader.of(writer, rows=2, capacity=_PROBE_TOKENS)
    every_RT = torch.arange(_PROBE_TOKENS, device=writer.device).expand(2, -1)
    reader.read(ids_RT.flip(1), every_RT, _PROBE_TOKENS)
    reader.read(ids_RT[:, :-3], every_RT[:, :-3], _PROBE_TOKENS - 3)
    # The first row goes on where it is, the second from two tokens before.
    at_R2 = torch.tensor([[5, 6], [3, 4]], device=writer.device)
    got_R2V = project(writer.head, reader.read(ids_RT.gather(1, at_R2), at_R2, _PROBE_TOKENS - 1))
    expected_R2V = plain_RTV.gather(1, at_R2[..., None].expand(-1, -1, plain_RTV.shape[-1]))
    if not expected_R2V.isfinite().all():
        raise LimbeckError(
            f"the {role} ({name}) gives NaN or infinite logits on plain tokens, expected finite numbers: check the "
            "weights, or sample in float32"
        )
    gap = (got_R2V.float() - expected_R2V.float()).abs().max().item()
    if not gap <= _PROBE_TOLERANCE * expected_R2V.abs().max().item():
        raise LimbeckError(
            f"the {role} ({name}) gives other logits when its rows have different lengths (off by {gap:.3g}), expected "
            "the same: let it write alone (LocalSampler)"
        )
