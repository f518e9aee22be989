"""Work beside a training: a checkpoint is written, or a server asked about what comes next, while steps are computed.

For a checkpoint on an accelerator the weights and moments are copied to the host first, which is all that the training
waits for. On CPUs nothing is copied: they change only where an optimizer step ends, and the training waits there for
what still reads them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# After an error in the training, for what was begun before it: a rank that is gone is waited for in vain.
_LAST_WAIT_S = 60.0


class Background:
    """One piece of work at a time in a thread, on each rank; an error in it is raised where the training waits for it.

        with Background() as background:
            ...
            background.begin(write, reads_weights=True)   # waits for what was begun before; calls write(read)
            ...
            background.before_update()                    # of the weights
            ...
            background.finish()                           # where it must be on disk

    At the end of the block everything that was begun has ended, but for a block that a signal ends at once.

    Attributes:
        ending: the block is at its end, which work that prepares what comes next need not do any more.
    """

    def __init__(self) -> None:
        self.ending = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Set when the weights may change.
        self._read = threading.Event()
        self._group: ProcessGroup | None = None

    @property
    def group(self) -> ProcessGroup | None:
        """Process group of the threads of all ranks, on the host, apart from that of the training; None of one process.

        All ranks ask for it at the same place of the training.
        """
        if self._group is None and torch.distributed.is_initialized():
            group = torch.distributed.new_group(backend="gloo")
            assert not isinstance(group, int), "all ranks are in it"
            self._group = group
        return self._group

    def begin(self, work: Callable[[Callable[[], None]], object], *, reads_weights: bool) -> None:
        """Begin a piece of work, once the one before has ended.

        Args:
            work: called with a function that it calls when it has read what the training updates.
            reads_weights: it reads what the training updates, and no copy.
        """
        self.finish()
        self._read.clear()
        if not reads_weights:
            self._read.set()
        # Not waited for at the end of the process, which a second signal ends at once.
        self._thread = threading.Thread(target=self._run, args=(work,), name="limbeck-background", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Callable[[], None]], object]) -> None:
        try:
            work(self._read.set)
        except BaseException as error:
            self._error = error
        finally:
            self._read.set()

    def before_update(self) -> None:
        """Wait for work that reads the weights; raise the error of work that has ended with one."""
        if self._thread is not None:
            self._read.wait()
        if self._error is not None:
            self.finish()

    def finish(self) -> bool:
        """Wait for the work that was begun, and raise its error.

        Returns:
            Whether any was begun since the last time.
        """
        begun = self._thread is not None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return begun

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del error, traceback
        self.ending = True
        if kind is None:
            self.finish()
        elif issubclass(kind, Exception) and self._thread is not None:
            # The training's own error is the one to hear of.
            self._thread.join(_LAST_WAIT_S)


def begin_or_do(
    work: Callable[[Callable[[], None]], object], background: Background | None, *, reads_weights: bool
) -> None:
    """Begin a piece of work in the background, where there is one; else do it before this returns."""
    if background is None:
        work(lambda: None)
    else:
        background.begin(work, reads_weights=reads_weights)


def on_host(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copies of tensors on the host, of sharded ones this rank's part."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    plain = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(plain)
    copied: Any = stager.stage(tensors)
    return copied
