"""Images at the door of a model: placeholders become its own image tokens, and these the features of its vision tower.

The ids of prompts and responses hold one placeholder for each image, the same for teacher and student. Here each of
the two makes its own input of them: other numbers of image tokens, other pixels, other positions. What lies behind,
the hidden states of response tokens, is addressed by these alone. The naive line it replaces is the model's own
forward pass on what its processor makes of the prompt; `verify_images` compares the two.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck.models.heads import causal_model, decoder_of, tolerance
from limbeck.models.image_features import ExpandedRow, ImageReader, vision_tower
from limbeck.models.images import ImageFolder
from limbeck.models.processors import plain_inputs
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from limbeck.types import TokenBatch

_READER = "limbeck_image_reader"


def attach_reader(model: nn.Module, reader: ImageReader) -> None:
    """Let an image-text model know how it reads images."""
    setattr(causal_model(model), _READER, reader)


def reader_of(model: nn.Module) -> ImageReader | None:
    """How a model reads images; None for one that reads text alone."""
    return getattr(causal_model(model), _READER, None)


def bind_images(model: nn.Module, folder: Path) -> None:
    """Give an image-text model the folder with the images of a run; others are left as they are."""
    if (reader := reader_of(model)) is not None:
        reader.folder = ImageFolder(folder)


def require_reader(model: nn.Module) -> ImageReader:
    """How a model that is asked about images reads them.

    Raises:
        LimbeckError: it reads text alone.
    """
    reader = reader_of(model)
    if reader is None:
        raise LimbeckError(
            f"{type(causal_model(model)).__name__} reads text alone and was asked about images; choose an image-text "
            "model, or leave the images out: prompts.ignore_columns=[images]"
        )
    return reader


def embedded(model: nn.Module, ids_BT: Tensor, from_image_BT: Tensor, images: Sequence[str]) -> Tensor:
    """The input embeddings of rows, image tokens replaced by the features of their images: (B, T, D)."""
    inner, reader = causal_model(model), require_reader(model)
    embeddings_BTD = inner.get_input_embeddings()(ids_BT)
    if not images:
        return embeddings_BTD
    see_first(model, images[0])
    features_ID = reader.features(inner, images).to(embeddings_BTD.device, embeddings_BTD.dtype)
    return embeddings_BTD.masked_scatter(from_image_BT[..., None], features_ID)


def positions(model: nn.Module, row: ExpandedRow) -> Tensor | None:
    """The positions of a row's tokens (3, T) in models that place images by height and width (M-RoPE); else None."""
    inner, reader = causal_model(model), require_reader(model)
    place = getattr(inner.base_model, "get_rope_index", None)
    if place is None:
        return None
    if not row.images:
        return torch.arange(len(row.ids)).expand(3, -1)
    grid = torch.cat([reader.input(name).inputs["image_grid_thw"] for name in row.images])
    asked: dict[str, Any] = {"input_ids": torch.tensor([row.ids]), "image_grid_thw": grid}
    if "mm_token_type_ids" in inspect.signature(place).parameters:
        asked["mm_token_type_ids"] = torch.tensor([row.from_image]).int()
    return place(**asked)[0][:, 0]


def image_hidden_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Final hidden states at the loss positions of a batch with images, row by row: (N, D)."""
    reader, device = require_reader(model), batch.input_ids_BT.device
    rows, kept = [], []
    for ids_T, mask_T, loss_T, images in zip(
        batch.input_ids_BT.tolist(),
        batch.attention_mask_BT.sum(1).tolist(),
        batch.loss_mask_BT.tolist(),
        batch.images,
        strict=True,
    ):
        # A position in the loss predicts the next token, which the author of the answer wrote.
        written = [False, *loss_T[: mask_T - 1]]
        row = reader.expand(ids_T[:mask_T], images, written)
        rows.append(row)
        kept.append([row.last[t] for t in range(mask_T) if loss_T[t]])
    width = max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    from_image_BT, loss_mask_BT = torch.zeros(2, len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
        from_image_BT[b, : len(row.ids)] = torch.tensor(row.from_image)
        loss_mask_BT[b, kept[b]] = True
    embeddings_BTD = embedded(
        model, ids_BT.to(device), from_image_BT.to(device), [name for row in rows for name in row.images]
    )
    placed = _padded_positions(model, rows, width)
    output = decoder_of(model)(
        inputs_embeds=embeddings_BTD,
        use_cache=False,
        **({} if placed is None else {"position_ids": placed.to(device)}),
    )
    return output.last_hidden_state[loss_mask_BT.to(device)]


def see_first(model: nn.Module, name: str, where: str = "") -> None:
    """Verify the images of a model on the first that it reads.

    Args:
        where: names its place in messages.

    Raises:
        LimbeckError: as `verify_images`.
    """
    reader = require_reader(model)
    if not reader.verified:
        reader.verified = True
        # What the processor refuses is refused here, by its place.
        reader.input(name, where)
        verify_images(causal_model(model), reader, name)


@torch.no_grad()
def verify_images(model: Any, reader: ImageReader, name: str) -> None:
    """Compare the hidden states of an image with those of the model's own forward pass on what its processor makes.

    Raises:
        LimbeckError: they are others: the model does something with images that is not known here. Or it takes others
            than its processor makes.
    """
    assert reader.folder is not None
    # As many as there are tokens for: the model's own pass would say so in its own words.
    reader.features(model, [name])
    base, device = model.base_model, model.get_input_embeddings().weight.device
    made = plain_inputs(reader.processor, [reader.placeholder.token], [reader.folder.open(name)])
    weight = next(vision_tower(model).parameters())
    given = {key: v.to(device, weight.dtype if v.is_floating_point() else None) for key, v in made.items()}
    with reader.fitting():
        expected_TD = base(**given, use_cache=False).last_hidden_state[0].float()
    if getattr(base, "rope_deltas", None) is not None:
        base.rope_deltas = None
    row = reader.expand((reader.placeholder.id,), (name,))
    placed = _padded_positions(model, [row], len(row.ids))
    embeddings = embedded(model, torch.tensor([row.ids]).to(device), torch.tensor([row.from_image]).to(device), [name])
    got_TD = (
        base(
            inputs_embeds=embeddings,
            use_cache=False,
            **({} if placed is None else {"position_ids": placed.to(device)}),
        )
        .last_hidden_state[0]
        .float()
    )
    largest = expected_TD.abs().max().item()
    same = got_TD.shape == expected_TD.shape
    if not same or not (got_TD - expected_TD).abs().max().item() <= tolerance(weight.dtype) * max(largest, 1e-6):
        raise LimbeckError(
            f"{type(model).__name__} reads images in a way that is not known here: its own forward pass on one gives "
            "other hidden states; this architecture is not supported with images"
        )


def _padded_positions(model: nn.Module, rows: Sequence[ExpandedRow], width: int) -> Tensor | None:
    """The positions of rows (3, B, T), padded on the right; None in models that count tokens."""
    every = [positions(model, row) for row in rows]
    found = [placed for placed in every if placed is not None]
    if not found:
        return None
    return torch.stack([torch.nn.functional.pad(placed, (0, width - placed.shape[1])) for placed in found], dim=1)
