"""Pieces of an evaluation group that the ranks of a launch compute together, as files beside the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from limbeck.evaluation.context import EvaluationContext
from limbeck.evaluation.group import GroupInPieces
from limbeck.evaluation.pieces import Piece, read_piece, write_piece
from limbeck.runtime.folders import remove
from limbeck.runtime.shared_work import Share


def write_pieces(
    evaluation: EvaluationContext,
    group: GroupInPieces,
    of: str,
    count: int,
    folder: Path,
    share: Share,
    *,
    attend: Callable[[], None],
) -> None:
    """Write this rank's share of a group's pieces; those that are there stay.

    Args:
        attend: called when none is left, for a teacher that the ranks pass through together.
    """
    own: list[int] = []

    def mine() -> Iterator[int]:
        for number in range(count):
            if not _path(folder, number).exists() and share.take(number):
                own.append(number)
                yield number

    for piece in group.pieces(evaluation, of, mine()):
        write_piece(_path(folder, own[-1]), piece)
        share.finish(own[-1])
    attend()


def joined_pieces(
    evaluation: EvaluationContext,
    group: GroupInPieces,
    of: str,
    count: int,
    folder: Path,
    share: Share,
    *,
    attend: Callable[[], None],
) -> Iterator[Piece]:
    """All pieces, in order, on the first rank.

    Raises:
        LimbeckError: another rank has ended or hangs; names it.
    """
    write_pieces(evaluation, group, of, count, folder, share, attend=attend)
    share.wait()
    for number in range(count):
        yield read_piece(_path(folder, number))
    remove(folder)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"
