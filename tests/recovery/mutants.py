"""Damage to files of a run directory, by a seed: truncated, flipped, changed, emptied, deleted, swapped for another.

    python -m tests.recovery.mutants 2000 --seed 1

After a mutation the same command is given again. It may end well with the very weights and scores that an undamaged run
has, or refuse in one line; whatever that line asks for is then done to the letter, and must work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.limbeck_command import CommandServer, Finished, KillAt
from tests.tiny_pair import TinyPair

RESULTS = ("student/model.safetensors", "scores.json")
REMEDIES = 4
# How far the run has come when it is damaged: to its end, to the training, into it.
MOMENTS = {"finished": None, "before": "checkpoints/step-000002", "within": "checkpoints/step-000010"}


@dataclass(frozen=True)
class Bases:
    """Runs to damage, by how far they have come, and what an undamaged one ends with."""

    recipe: Path
    place: Path
    runs: dict[str, Path]
    expected: dict[str, bytes]

    @classmethod
    def make(cls, limbeck: CommandServer, root: Path) -> Bases:
        """Play the runs. All are played, and later continued, at one place."""
        root.mkdir(parents=True, exist_ok=True)
        pair, place = TinyPair.write(root), root / "run"
        recipe = pair.recipe(
            place,
            sft={"num_train_epochs": 1.0},
            train={"save_total_limit": 3, "eval_steps": 4, "per_device_train_batch_size": 8},
        )
        runs = {}
        for moment, name in MOMENTS.items():
            ended = limbeck.run("run", recipe, killed=None if name is None else KillAt(place, name))
            assert ended.code == (0 if name is None else -signal.SIGKILL), ended.stderr
            runs[moment] = place.rename(root / moment)
        expected = {name: (runs["finished"] / name).read_bytes() for name in RESULTS}
        return cls(recipe, place, runs, expected)

    def fresh(self, moment: str) -> Path:
        """A copy at the place where the command looks, with second names where the original has them."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.runs[moment], self.place)
        for shard in (self.place / "signal").glob("[0-9]*.safetensors"):
            shard.unlink()
            os.link(self.place / "responses/batches" / shard.name[1:], shard)
        return self.place


def _lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def without_last_line(path: Path, draw: random.Random) -> None:
    del draw
    path.write_bytes(b"".join(_lines(path.read_bytes())[:-1]))


def without_a_line(path: Path, draw: random.Random) -> None:
    lines = _lines(path.read_bytes())
    if lines:
        lines.pop(draw.randrange(len(lines)))
    path.write_bytes(b"".join(lines))


def a_line_twice(path: Path, draw: random.Random) -> None:
    lines = _lines(path.read_bytes())
    if lines:
        lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    path.write_bytes(b"".join(lines))


def cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data) + 1)])


def bits(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(3 if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def a_digit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    if places:
        place = draw.choice(places)
        data[place] = 48 + (data[place] - 48 + draw.randrange(1, 10)) % 10
    path.write_bytes(bytes(data))


def empty(path: Path, draw: random.Random) -> None:
    del draw
    path.write_bytes(b"")


def delete(path: Path, draw: random.Random) -> None:
    del draw
    path.unlink()


def junk(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 40)) + draw.choice((b"", b"\n")))


def a_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "file").write_text("x")


def a_dangling_link(path: Path, draw: random.Random) -> None:
    del draw
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield value, key
        yield from _places(below)


def another_type(path: Path, draw: random.Random) -> None:
    """Some value of a JSON file, or of one of its lines, or the whole."""
    text = path.read_text("utf-8")
    whole = path.suffix == ".json"
    parts = [text] if whole else [line for line in text.split("\n") if line]
    if not parts:
        return
    at, other = draw.randrange(len(parts)), draw.choice([None, [], {}, "x", 3, -1, True, 1e308, [[]]])
    value = json.loads(parts[at])
    places = list(_places(value))
    if places and draw.random() < 0.8:
        owner, key = draw.choice(places)
        owner[key] = other
    else:
        value = other
    parts[at] = json.dumps(value)
    path.write_text("\n".join(parts) + "\n", "utf-8")


def other_tensors(path: Path, draw: random.Random) -> None:
    """Another valid file in its place: of the same run, with a tensor of its own, or with a number or name changed."""
    import torch
    from safetensors.torch import load_file, save_file

    kind = draw.choice(("other", "strange", "changed", "renamed"))
    root = next(parent for parent in path.parents if (parent / "recipe.resolved.yaml").exists())
    if kind == "other":
        data = draw.choice([p for p in sorted(root.rglob("*.safetensors")) if p != path]).read_bytes()
        path.unlink()
        path.write_bytes(data)
        return
    tensors = load_file(path)
    if kind == "strange" or not tensors:
        tensors = {"zzz": torch.zeros(3)}
    elif kind == "changed":
        chosen = tensors[draw.choice(sorted(tensors))].view(-1)
        chosen[draw.randrange(len(chosen))] += 1
    else:
        name = draw.choice(sorted(tensors))
        tensors[f"{name}2"] = tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})


Mutation = Callable[[Path, random.Random], None]
ANY: tuple[Mutation, ...] = (cut, bits, a_digit, empty, delete, junk, a_folder, a_dangling_link)
OF_LINES: tuple[Mutation, ...] = (without_last_line, without_a_line, a_line_twice, another_type)


def mutations_of(path: Path) -> tuple[Mutation, ...]:
    """What may happen to a file of this kind."""
    more = {".json": (another_type, another_type), ".jsonl": OF_LINES, ".safetensors": (other_tensors, other_tensors)}
    return ANY + more.get(path.suffix, ())


@dataclass(frozen=True)
class Mutant:
    """What was done to which file, and how the command then ended: "", or what was wrong."""

    number: int
    moment: str
    name: str
    mutation: str
    end: str
    wrong: str = ""


class Unworkable(Exception):
    """The remedy of a refusal cannot be followed, or does not help."""


def follow(line: str, place: Path) -> tuple[str, ...]:
    """Do to the letter what a refusal asks for; returns what is to be added to the command."""
    if "delete the line and run the same command again" in line:
        found = re.search(r"(/\S+):(\d+) is damaged", line)
        assert found is not None, line
        path, number = Path(found[1]), int(found[2])
        lines = path.read_bytes().split(b"\n")
        lines.pop(number - 1)
        path.write_bytes(b"\n".join(lines))
        return ()
    if "add --update" in line:
        return ("--update",)
    asked = re.search(r"[;:,] (?:.* or )?delete (.*?)(?: to [a-z ]+)?(?: and run the same command again|$)", line)
    if asked is None:
        raise Unworkable(line)
    named = re.findall(r"/[^\s,;:()']+", asked[1]) if asked[1] != "it" else re.findall(r"/[^\s,;:()']+", line)[:1]
    if not named:
        raise Unworkable(line)
    for path in map(Path, named):
        assert path.is_relative_to(place), f"deleting {path} would be no remedy: {line}"
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return ()


def play(limbeck: CommandServer, bases: Bases, number: int, seed: int) -> Mutant:
    """One mutant: damage, the same command, and its remedies."""
    draw = random.Random(f"{seed} {number}")
    moment = draw.choice(sorted(bases.runs))
    place = bases.fresh(moment)
    files = [p for p in sorted(place.rglob("*")) if p.is_file()]
    # Each kind of file as often as any other, however many there are of it.
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(re.sub(r"\d+|[0-9a-f]{12}", "N", path.relative_to(place).as_posix()), []).append(path)
    path = draw.choice(kinds[draw.choice(sorted(kinds))])
    name, mutation = path.relative_to(place).as_posix(), draw.choice(mutations_of(path))
    mutation(path, draw)
    more: tuple[str, ...] = ()
    ends: list[str] = []
    for _ in range(REMEDIES):
        ended = limbeck.run("run", bases.recipe, *more)
        ends.append(ended.stderr.splitlines()[-1] if ended.code else "done")
        wrong = _judge(ended, bases)
        if wrong is None:
            try:
                more = follow(ended.error_line, place)
                continue
            except (Unworkable, AssertionError) as error:
                wrong = f"unworkable: {error}"
        return Mutant(number, moment, name, mutation.__name__, " | ".join(ends), wrong)
    return Mutant(number, moment, name, mutation.__name__, " | ".join(ends), "no end of refusals")


def _judge(ended: Finished, bases: Bases) -> str | None:
    """What is wrong with an end; "" where nothing is, None where it is a refusal whose remedy is to be followed."""
    if "Traceback" in ended.stderr:
        return f"traceback: {ended.stderr[-1500:]}"
    if ended.code == 2:
        return None if ended.stderr.count("limbeck: ") == 1 else f"more than one line: {ended.stderr}"
    if ended.code:
        return f"exit code {ended.code}: {ended.stderr}"
    other = [name for name, content in bases.expected.items() if (bases.place / name).read_bytes() != content]
    return f"silently different: {', '.join(other)}" if other else ""


def main() -> None:
    """Play mutants and say how they ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        limbeck = CommandServer(Path(folder) / "commands")
        bases = Bases.make(limbeck, Path(folder) / "runs")
        ends: Counter[str] = Counter()
        for number in range(given.first, given.first + given.count):
            mutant = play(limbeck, bases, number, given.seed)
            well = "refused, remedied" if "|" in mutant.end else "done"
            ends[mutant.wrong.partition(":")[0] or well] += 1
            if mutant.wrong:
                print(mutant, flush=True)
            if sum(ends.values()) % 50 == 0:
                print(dict(ends), file=sys.stderr, flush=True)
            shutil.rmtree(limbeck.folder, ignore_errors=True)
        print(dict(ends))
        limbeck.close()


if __name__ == "__main__":
    main()
