"""Loading a causal language model and its tokenizer, quietly, from safetensors, with its provenance."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from limbeck.models import few_bits
from limbeck.models.assets import DownloadProgress
from limbeck.models.few_bits import Bits
from limbeck.models.fingerprints import model_fingerprint, tokenizer_fingerprint
from limbeck.models.folders import refuse_adapter, require_fitting
from limbeck.models.gguf import gguf_config, gguf_model, gguf_tokenizer
from limbeck.models.processors import (
    auto_class,
    give_placeholder,
    placeholder_of,
    reads_images,
    source_processor,
)
from limbeck.models.quiet import one_line, quiet_transformers
from limbeck.models.slices import unread_model
from limbeck.models.sources import Source, resolve
from limbeck.runtime.records import flatten
from limbeck.types import LimbeckError, is_unicode, short_repr

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "*.tiktoken")
# Ids a tokenizer may have for each of its tokens: some leave gaps, and libraries make lists as long as the highest id.
_WIDEST = 1000
_DROPOUT = re.compile(r"(^|_)(dropout|pdrop|layerdrop|drop)(_|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Origin of a model: name, files, revision.

    Attributes:
        location: resolved path, or the hub id.
        revision: the hub's commit.
        fingerprint: sha256 of configuration and weights as they lay on disk.
        parameters: tied weights counted once.
    """

    name: str
    kind: str
    location: str
    revision: str | None
    fingerprint: str
    tokenizer_fingerprint: str
    architecture: str
    parameters: int
    license: str | None

    def record(self) -> dict[str, str | int | None]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready for use: eval mode, no dropout anywhere."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    provenance: Provenance


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: DownloadProgress | None = None,
    device_map: Mapping[str, int | str] | None = None,
    bits: Bits | None = None,
    unread: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer by asset name, local directory, GGUF file or hub id, on the CPU.

    Args:
        device_map: the device of each part, or "disk", of a model that is read from safetensors; None is the CPU.
        bits: of the weights of its linear layers, of a model that is read from safetensors; None keeps them as they
            are.
        unread: leave the weights in their files for `limbeck.models.slices.read_parts`, where they can be read by
            slices; `limbeck.models.slices.is_unread` says whether.

    Raises:
        LimbeckError: one line for everything that is wrong with the name, the files or the options.
    """
    kind = as_dtype(dtype)
    source = resolve(name, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    config = source_config(source, trust_remote_code=trust_remote_code)
    tokenizer = source_tokenizer(source, trust_remote_code=trust_remote_code)
    if source.gguf is not None:
        model = gguf_model(source.gguf, dtype=kind, attn_implementation=attn_implementation)
        without_dropout(model.config)
    else:
        placing: dict[str, Any] = {} if device_map is None else {"device_map": dict(device_map)}
        config = without_dropout(config)
        found = _unread(source, config, kind, attn_implementation, trust_remote_code) if unread else None
        with nullcontext() if bits is None else few_bits.quiet_libraries():
            if bits is not None:
                placing["quantization_config"] = few_bits.quantization_config(bits, kind)
            model = found or _from_safetensors(source, config, kind, attn_implementation, trust_remote_code, **placing)
        if bits is not None:
            few_bits.require_whole_head(model, kind)
    silence_dropout(model)
    if reads_images(config):
        let_read_images(model, source, config, tokenizer)
    provenance = Provenance(
        name=source.name,
        kind=source.kind,
        location=source.name.removeprefix("hub:") if source.kind == "hub" else str(source.gguf or source.directory),
        revision=source.revision,
        fingerprint=model_fingerprint(source),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        architecture=type(model).__name__,
        # Some of a model in few bits lie two in a byte.
        parameters=model.num_parameters(),
        license=source.license,
    )
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, provenance=provenance)


def let_read_images(
    model: PreTrainedModel, source: Source, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Give an image-text model the processor that lies beside it, and freeze its vision tower.

    Raises:
        LimbeckError: the processor is not there, or belongs to another model.
    """
    from limbeck.models.image_features import ImageReader, vision_tower
    from limbeck.models.vision import attach_reader

    vision_tower(model).requires_grad_(False)
    processor, placeholder = source_processor(source, config, tokenizer), placeholder_of(tokenizer)
    assert placeholder is not None, "what has a processor has a placeholder"
    attach_reader(model, ImageReader(processor=processor, placeholder=placeholder, files=source.directory))


def load_tokenizer(
    name: str | Path,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: DownloadProgress | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer alone. Fetches no weights from the hub.

    Raises:
        LimbeckError: as `load_model`.
    """
    source = resolve(name, revision=revision, weights=False, trust_remote_code=trust_remote_code, progress=progress)
    return source_tokenizer(source, trust_remote_code=trust_remote_code)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name.

    Raises:
        LimbeckError: a name that is none of float32, bfloat16, float16.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise LimbeckError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def source_config(source: Source, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration, checked to be a causal language model's.

    Raises:
        LimbeckError: unknown architecture, encoder, encoder-decoder, or custom code that was not allowed.
    """
    from transformers import AutoConfig

    refuse_adapter(source.name, source.directory)
    if source.gguf is not None:
        config = gguf_config(source.gguf)
    else:
        with _in_one_line(source, "its config.json cannot be read"), quiet_transformers():
            config = AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
            # What everybody asks of it; a nested configuration may be of another kind than its name says.
            config.get_text_config().to_dict()
            _ = config.get_text_config().vocab_size, config.get_text_config().num_hidden_layers
    with _in_one_line(source, "its config.json cannot be read"):
        _require_causal(source, config)
    return config


def _require_causal(source: Source, config: PretrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = list(config.architectures or [])
    known = {cls for cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(cls, str)}
    if reads_images(config) and not config.is_encoder_decoder:
        return
    custom = "auto_map" in config.__dict__ and "AutoModelForCausalLM" in config.__dict__["auto_map"]
    # BERT-like encoders have a causal class too, of use only where the configuration says decoder.
    encoder = config.model_type in ("bert", "roberta", "xlm-roberta", "electra", "camembert", "data2vec-text", "ernie")
    if (
        config.is_encoder_decoder
        or (named and not custom and not known & set(named))
        or (encoder and not config.to_dict().get("is_decoder", False))
    ):
        what = " ".join(str(named[0] if named else config.model_type).split())[:80]
        raise LimbeckError(
            f"{source.name} is a {what}, not a causal language model; teacher and student must predict the next token"
        )


def source_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model.

    Raises:
        LimbeckError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if source.gguf is not None:
        return gguf_tokenizer(source.gguf)
    custom = trust_remote_code and any(source.directory.glob("*.py"))
    if not custom and not any(any(source.directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise LimbeckError(
            f"{source.name} has no tokenizer ({source.directory / 'tokenizer.json'} is missing); "
            "save one there with tokenizer.save_pretrained"
        )
    try:
        with _in_one_line(source, "its tokenizer cannot be read"), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source.directory, trust_remote_code=trust_remote_code)
            _require_usable(source, tokenizer)
    except LimbeckError:
        # transformers reads the configuration, too, to find the tokenizer's class.
        if (source.directory / "config.json").is_file():
            source_config(source, trust_remote_code=trust_remote_code)
        raise
    give_placeholder(tokenizer, source)
    return tokenizer


def _require_usable(source: Source, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what a damaged file may hold and only the first use would show."""
    vocabulary, window = tokenizer.get_vocab(), tokenizer.model_max_length
    where = source.directory / "tokenizer_config.json"
    if not vocabulary or not all(type(index) is int and index >= 0 for index in vocabulary.values()):
        raise LimbeckError(f"{source.name} has a tokenizer without tokens, or without their ids; download it again")
    if max(vocabulary.values()) > _WIDEST * len(vocabulary):
        raise LimbeckError(
            f"{source.name} has a tokenizer of {len(vocabulary)} tokens with ids up to {max(vocabulary.values())}, "
            "expected few gaps between them; download it again"
        )
    if isinstance(window, bool) or not isinstance(window, int | float) or not window > 0:
        raise LimbeckError(f"{where}: model_max_length is {str(window)[:60]!r}, expected a number; correct it")
    templates = tokenizer.chat_template
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    if not all(text is None or (isinstance(text, str) and is_unicode(text)) for text in texts):
        raise LimbeckError(f"{where}: the chat template is no Unicode text; download it again")
    for token in tokenizer.special_tokens_map.values():
        if isinstance(token, str) and token not in vocabulary:
            raise LimbeckError(f"{where} names the token {token[:60]!r}, which the vocabulary lacks; correct it")
    tokenizer("A text.")


def _unread(
    source: Source, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str, trust_remote_code: bool
) -> PreTrainedModel | None:
    with _in_one_line(source, "it cannot be loaded"), quiet_transformers():
        require_fitting(source.directory, config.get_text_config())
        return unread_model(
            source, config, dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
        )


def _from_safetensors(
    source: Source,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str,
    trust_remote_code: bool,
    **placing: Any,
) -> PreTrainedModel:
    try:
        require_fitting(source.directory, config.get_text_config())
    except LimbeckError as error:
        raise LimbeckError(f"{source.name}: it cannot be loaded: {error}") from error
    with _in_one_line(source, "it cannot be loaded"), quiet_transformers():
        loaded: Any = auto_class(config).from_pretrained(
            source.directory,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **placing,
        )
    model, info = loaded
    # transformers fills gaps with random weights and goes on; a teacher must not be partly random.
    if missing := sorted(info["missing_keys"]):
        raise LimbeckError(
            f"{source.name} lacks {len(missing)} of its weights ({missing[0]}, ...); "
            "download it again, or check that config.json belongs to these weights"
        )
    return model


@contextmanager
def _in_one_line(source: Source, what: str) -> Iterator[None]:
    """Turn whatever a library raises over the files of a model into a `LimbeckError`; our own pass unchanged.

    Nothing narrower would do: over damaged files transformers raises what Python raises, and the Rust tokenizers panic
    with an exception that is no `Exception`. Memory and disk have a remedy of their own.
    """
    try:
        yield
    except (LimbeckError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EIO):
            raise
        raise _explained(source, error, what) from error


def _explained(source: Source, error: BaseException, what: str) -> LimbeckError:
    # A validator quotes the value that it refuses, however long.
    said = one_line(error)[:400]
    if "ignore_mismatched_sizes" in str(error):
        said = "its weights have other shapes than config.json says (hidden_size, number of heads, ...)"
    if "trust_remote_code" in str(error):
        return LimbeckError(
            f"{source.name} brings its own Python code, which is not run unless you trust it; "
            "read it, then set trust_remote_code=true (limbeck doctor: --trust-remote-code)"
        )
    if "attention implementation" in said:
        return LimbeckError(f"{source.name}: {said.split('. ')[0]}; set attn_implementation=eager")
    if isinstance(error, ImportError):
        return LimbeckError(
            f"{source.name}: {what}: {said}; install what is missing or choose attn_implementation=sdpa"
        )
    return LimbeckError(f"{source.name}: {what}: {said}; check the files or download them again")


def unbuildable(config: PretrainedConfig, error: BaseException) -> LimbeckError:
    """The line for a configuration that no model can be built from, with its file where that is known."""
    folder, said = config.name_or_path, one_line(error)
    if isinstance(error, KeyError) and error.args:
        # A table of activations or the like, which says no more than the name that it lacks.
        key = next((key for key, value in flatten(config.to_dict()).items() if value == error.args[0]), None)
        said = said if key is None else f"{key} is {short_repr(error.args[0])}, which transformers does not know"
    path = Path(folder) / "config.json" if folder else None
    where = str(path) if path is not None and path.is_file() else "the model's config.json"
    return LimbeckError(f"no model can be built from {where}: {said}; correct it, or download the file again")


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """Set every dropout probability of a configuration (and those nested in it) to 0, in place."""
    for key, value in list(config.__dict__.items()):
        if isinstance(value, float | int) and not isinstance(value, bool) and _DROPOUT.search(key):
            setattr(config, key, type(value)(0))
    for nested in {id(part): part for part in _nested_configs(config)}.values():
        without_dropout(nested)
    return config


def _nested_configs(config: PretrainedConfig) -> list[Any]:
    return [config.__dict__[name] for name in config.sub_configs if config.__dict__.get(name) is not None]


def silence_dropout(model: torch.nn.Module) -> None:
    """Set the probability of every dropout module to 0: distillation compares two deterministic functions."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
