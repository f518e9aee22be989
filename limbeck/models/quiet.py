"""Transformers without its progress bars and log lines, for the length of one call."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers, huggingface_hub and bare tqdm bars inside the block; the old settings come back after it.

    What the user configured is only ever made quieter, never louder. Exceptions pass through.
    """
    import logging as levels

    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(max(verbosity, levels.ERROR))
    if bars:
        logging.disable_progress_bar()
    try:
        # The GGUF converter's bar obeys no switch of transformers; tqdm looks sys.stderr up when it starts.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first telling line of an error's message, for a one-line message of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Validators name the field first and the fault on the next line.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
