"""A data set of the hub through `datasets`: quiet, and within seconds where there is no network."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from limbeck.models.sources import HUB_TIMEOUT_S, network_errors
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_T = TypeVar("_T")
_OFFLINE = "HF_HUB_OFFLINE"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_hub(name: str, split: str, config: str | None, *, keys: str = "prompts") -> Dataset:
    """A split of a hub data set; without a network from the cache of `datasets`.

    Raises:
        LimbeckError: neither the hub nor the cache gives it.
    """
    from datasets import load_dataset

    return _loaded(lambda: load_dataset(name, config, split=split), name, keys)


def stream_hub(name: str, split: str, config: str | None, *, keys: str = "prompts") -> IterableDataset:
    """The same row by row as it is fetched, of which nothing is kept.

    Raises:
        LimbeckError: the hub does not give it.
    """
    from datasets import load_dataset

    return _loaded(lambda: load_dataset(name, config, split=split, streaming=True), name, keys)


def _loaded(load: Callable[[], _T], name: str, keys: str) -> _T:
    from huggingface_hub import is_offline_mode

    if not _HUB_ID.fullmatch(name):
        raise LimbeckError(f"{name} does not exist and is no hub id (owner/name); give a file or folder, or builtin")
    away = "" if is_offline_mode() else _why_unreachable(name)
    with _quiet(), _offline() if away else contextlib.nullcontext():
        try:
            return load()
        except (OSError, ValueError, RuntimeError) as error:
            said = " ".join((away or str(error)).split())
            raise LimbeckError(
                f"{name} is neither a local file or folder nor a data set the hub gives ({said[:160]}); "
                f"check the name, {keys}.dataset_config, {keys}.dataset_split, and the network or login"
            ) from None


def _why_unreachable(name: str) -> str:
    """One request decides whether there is a hub at all: `datasets` asks six times, over half a minute. Else ''."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except errors.HfHubHTTPError:
        # It answered; what is wrong with the name or the login `datasets` says best.
        return ""
    except network_errors() as error:
        return f"the hub cannot be reached: {error}"
    return ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Set the libraries offline inside the block, as HF_HUB_OFFLINE=1 does, so that no second request is tried."""
    # Where each keeps what it read of the environment when it was imported.
    settings = [import_module(name) for name in ("datasets.config", "huggingface_hub.constants")]
    before = [getattr(module, _OFFLINE) for module in settings]
    try:
        for module in settings:
            setattr(module, _OFFLINE, True)
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            setattr(module, _OFFLINE, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of the libraries; their progress bars only in a terminal, since a download may be long."""
    bars = [import_module(name) for name in ("datasets.utils.tqdm", "huggingface_hub.utils.tqdm")]
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    shown = [] if sys.stderr.isatty() else [module for module in bars if not module.are_progress_bars_disabled()]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        for module in shown:
            module.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module in shown:
            module.enable_progress_bars()
