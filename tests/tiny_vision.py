"""Tiny image-text models of six families, pictures that a program draws, and questions whose answers it knows.

A picture shows one to three shapes of one kind and colour on a grid of cells. Nothing is downloaded: tokenizers,
processors and models are made here.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image

Family = Literal["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm"]
FAMILIES: tuple[Family, ...] = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")
QWEN: tuple[Family, ...] = ("qwen2_vl", "qwen2_5_vl")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
SHAPES = ("square", "disc", "bar")
NUMBERS = ("one", "two", "three")
SIDE = 32
QUESTIONS = ("What colour?", "What shape?", "How many?")
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<fake_token_around_image>", "<global-img>")
_SPECIAL += ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>", "<end_of_utterance>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    colour: str
    shape: str
    count: int
    seed: int

    def answer(self, question: str) -> str:
        """The right answer to one of `QUESTIONS`."""
        return {"What colour?": self.colour, "What shape?": self.shape, "How many?": NUMBERS[self.count - 1]}[question]

    def draw(self, side: int = SIDE) -> Image.Image:
        """The picture: shapes in different cells of a grid of two by two, a little moved."""
        from PIL import Image, ImageDraw

        draw = random.Random(f"{self.colour} {self.shape} {self.count} {self.seed}")
        picture = Image.new("RGB", (side, side), (245, 245, 245))
        pen, cell = ImageDraw.Draw(picture), side // 2
        for place in draw.sample(range(4), self.count):
            left, top = place % 2 * cell + draw.randint(1, 3), place // 2 * cell + draw.randint(1, 3)
            size = cell - 5
            box = (left, top, left + size, top + size)
            if self.shape == "bar":
                box = (left, top + size // 3, left + size, top + 2 * size // 3)
            (pen.ellipse if self.shape == "disc" else pen.rectangle)(box, fill=COLOURS[self.colour])
        return picture


def scenes(count: int, *, seed: int = 0) -> list[Scene]:
    """Different scenes, drawn by chance."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        scene = Scene(draw.choice(list(COLOURS)), draw.choice(SHAPES), draw.randint(1, 3), draw.randint(0, 10**6))
        found[scene] = None
    return list(found)


def write_questions(folder: Path, count: int, *, seed: int = 0, answered: bool = True) -> Path:
    """A JSONL of questions about pictures that lie beside it, a question and an answer each."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(scenes(count, seed=seed)):
        question = QUESTIONS[number % len(QUESTIONS)]
        scene.draw().save(pictures / f"{seed}-{number}.png")
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        if answered:
            turns.append({"role": "assistant", "content": scene.answer(question)})
        rows.append({"messages": turns, "images": [f"pictures/{seed}-{number}.png"]})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_tokenizer(folder: Path, family: Family = "llava", *, extra: tuple[str, ...] = ()) -> Any:
    """A tokenizer of words, with the control tokens of the families."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*"abcdefghijklmnopqrstuvwxyz?!.", "\n", "user", "assistant", "system", *COLOURS, *SHAPES, *NUMBERS]
    words += [word for question in QUESTIONS for word in question.removesuffix("?").split()]
    words += [" " + word for word in dict.fromkeys(words) if len(word) > 1]
    ids = {token: index for index, token in enumerate(dict.fromkeys(["<unk>", *words, *extra]))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    from tokenizers import Regex

    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\w\s]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=160,
        clean_up_tokenization_spaces=False,
    )
    special: Any = [AddedToken(token, special=True) for token in _SPECIAL]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    shown = "<|vision_start|><|image_pad|><|vision_end|>" if family in QWEN else "<image>"
    tokenizer.chat_template = _TEMPLATE.replace("IMAGE", shown)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_vision_model(
    folder: Path,
    family: Family = "llava",
    *,
    width: int = 32,
    layers: int = 2,
    patch: int = 8,
    seed: int = 0,
    window: int = 160,
    spread: float = 0.2,
    eyes: int | None = None,
) -> Path:
    """A model directory in the ecosystem's form, with its processor.

    Args:
        patch: side of a patch in pixels; another one gives another number of image tokens.
        eyes: width of the vision tower; None takes that of the language model.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder, family)
    eyes = eyes or width
    config = _config(
        family, tokenizer, width=width, eyes=eyes, layers=layers, patch=patch, window=window, spread=spread
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
    write_processor(folder, family, patch=patch)
    return folder


def write_processor(folder: Path, family: Family, *, patch: int = 8) -> None:
    """The files of a processor as published folders have them."""
    common: dict[str, Any] = {"do_rescale": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    kind: dict[str, Any]
    if family in ("llava", "llava_next"):
        tiles = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]} if family == "llava_next" else {}
        pixels = common | {
            **tiles,
            "image_processor_type": "LlavaNextImageProcessor" if tiles else "CLIPImageProcessor",
            "size": {"shortest_edge": SIDE},
            "crop_size": {"height": SIDE, "width": SIDE},
        }
        kind = {
            "processor_class": "LlavaNextProcessor" if tiles else "LlavaProcessor",
            "patch_size": patch,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
            "image_token": "<image>",
        }
    elif family in QWEN:
        pixels = common | {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": patch,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "min_pixels": (2 * patch) ** 2,
            "max_pixels": 4 * SIDE**2,
        }
        kind = {"processor_class": "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"}
    else:
        maker = "Idefics3" if family == "idefics3" else "SmolVLM"
        pixels = common | {
            "image_processor_type": f"{maker}ImageProcessor",
            "size": {"longest_edge": 2 * SIDE},
            "max_image_size": {"longest_edge": SIDE},
            "do_image_splitting": True,
        }
        kind = {"processor_class": f"{maker}Processor", "image_seq_len": (SIDE // patch) ** 2 // 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels | {"processor_class": kind["processor_class"]}))
    (folder / "processor_config.json").write_text(json.dumps(kind))


def _config(
    family: Family, tokenizer: Any, *, width: int, eyes: int, layers: int, patch: int, window: int, spread: float
) -> Any:
    from transformers import AutoConfig

    text: dict[str, Any] = {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": window,
        "initializer_range": spread,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>" if family in QWEN else "<image>")
    tower: dict[str, Any] = {
        "hidden_size": eyes,
        "intermediate_size": 2 * eyes,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": patch,
        "initializer_range": spread,
    }
    if family in ("llava", "llava_next"):
        tiles = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]} if family == "llava_next" else {}
        return AutoConfig.for_model(
            family,
            **tiles,
            text_config=text | {"model_type": "llama"},
            vision_config=tower | {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_token_index=image,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=False,
        )
    if family in QWEN:
        sizes = {"embed_dim": eyes, "hidden_size": width, "mlp_ratio": 2}
        if family == "qwen2_5_vl":
            sizes = {"hidden_size": eyes, "out_hidden_size": width, "intermediate_size": 2 * eyes}
            sizes |= {"window_size": 4 * patch, "fullatt_block_indexes": [1]}
        visual = sizes | {
            "depth": 2,
            "num_heads": 4,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": spread,
        }
        sections = [width // 4 // 2 - 2 * (width // 4 // 6), width // 4 // 6, width // 4 // 6]
        rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
        return AutoConfig.for_model(
            family,
            text_config=text | {"rope_parameters": rope},
            vision_config=visual,
            image_token_id=image,
            video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
            tie_word_embeddings=False,
        )
    return AutoConfig.for_model(
        family,
        text_config=text | {"model_type": "llama"},
        vision_config=tower,
        image_token_id=image,
        scale_factor=2,
        tie_word_embeddings=False,
    )
