"""Damaged and hostile model folders: `doctor`, the checks of `run` and `export` answer in one line, and soon.

python -m tests.models.test_folder_mutants 3000 7      # by hand: so many mutants from that seed
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest

from limbeck.export import export_model
from limbeck.models.doctor import doctor, doctor_table
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.student_endings import doctor_says
from limbeck.recipe.load import load_recipe
from limbeck.types import LimbeckError
from tests.models.folder_mutants import fresh_copy, mutate
from tests.tiny_pair import TinyPair, write_model, write_prompts

# A whole case takes about a second; what waits for anything waits for ever.
LIMIT_S = 60


class TooLong(BaseException):
    """No `Exception`, so that nothing on the way takes it for an error of its own."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def examined(pair: TinyPair, mutant: Path) -> None:
    for teacher, student in ((pair.teacher, mutant), (mutant, pair.teacher)):
        found = doctor(str(teacher), str(student))
        tree = {"teacher": {"model": str(teacher)}, "student": {"model": str(student)}}
        doctor_table(found, doctor_says(found.teacher, found.student, tree))


def checked(pair: TinyPair, mutant: Path, *, as_teacher: bool) -> None:
    tree = pair.tree(mutant.parent / "run", responses={"source": "student"})
    if as_teacher:
        tree["teacher"] = {"model": str(mutant)}
    else:
        tree["student"] = {"model": str(mutant)}
    context = RunContext(load_recipe(tree))
    for stage in STAGES:
        stage.check(context)


def exported(mutant: Path, format: str) -> None:
    out = mutant.parent / "out"
    done = export_model(str(mutant), out, format=format)
    for path in sorted(done.folder.rglob("*"), reverse=True):
        path.unlink()
    out.rmdir()


def doors(pair: TinyPair, mutant: Path, draw: random.Random) -> dict[str, Callable[[], None]]:
    return {
        "doctor": lambda: examined(pair, mutant),
        "run, as the teacher": lambda: checked(pair, mutant, as_teacher=True),
        "run, as the student": lambda: checked(pair, mutant, as_teacher=False),
        "export": lambda: exported(mutant, draw.choice(("safetensors", "gguf"))),
    }


def play(
    pair: TinyPair, model: Path, folder: Path, count: int, seed: int, log: TextIO | None = None
) -> tuple[Counter[str], list[str]]:
    """How often each door refused or not, and every traceback and hang.

    Args:
        log: told of each mutant beforehand, for the one that ends the process.
    """
    counts: Counter[str] = Counter()
    wrong = []
    for number in range(count):
        draw = random.Random(f"{seed}.{number}")
        mutant = fresh_copy(model, folder / "mutant")
        what = mutate(mutant, draw)
        if log is not None:
            print(number, what, file=log, flush=True)
        for name, door in doors(pair, mutant, draw).items():
            try:
                with at_most(LIMIT_S):
                    door()
                counts[f"{name}: taken"] += 1
            except LimbeckError as error:
                counts[f"{name}: refused"] += 1
                if "\n" in str(error).strip() or len(str(error)) > 2000:
                    wrong.append(f"{number}, {what}, {name}: not one line: {str(error)[:300]}")
            except TooLong:
                wrong.append(f"{number}, {what}, {name}: more than {LIMIT_S} s")
            except BaseException:
                if sys.exc_info()[0] is KeyboardInterrupt:
                    raise
                wrong.append(f"{number}, {what}, {name}: {traceback.format_exc()[-1500:]}")
    return counts, wrong


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return written(tmp_path_factory.mktemp("pair"))


def written(folder: Path) -> TinyPair:
    return TinyPair(teacher=write_model(folder / "model", width=16), prompts=write_prompts(folder / "prompts.jsonl"))


def test_mutants_are_answered_in_one_line_and_soon(pair: TinyPair, tmp_path: Path) -> None:
    counts, wrong = play(pair, pair.teacher, pair.teacher.parent, 120, seed=1)
    assert not wrong, "\n\n".join(wrong)
    for name in doors(pair, tmp_path, random.Random(0)):
        assert counts[f"{name}: refused"] > 20 and counts[f"{name}: taken"] > 5


def main() -> None:
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        pair: Any = written(Path(folder))
        counts, wrong = play(pair, pair.teacher, pair.teacher.parent, count, seed, sys.stderr)
    print("\n\n".join(wrong))
    calls = sum(counts.values()) + len(wrong)
    print(f"{count} mutants, {calls} calls, {len(wrong)} wrong: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
