"""Run directories as nobody should find them: one seeded mutation of a good one, from a cut file to a number of 400
digits, and what every reader of a run directory says to it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.compare import write_comparison
from limbeck.report import write_report
from limbeck.report.model_card import write_card
from limbeck.report.outcome import harm
from limbeck.report.read_run import read_run
from limbeck.report.svg import write_picture
from limbeck.types import LimbeckError

ODD: Sequence[Any] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 10**400, 1e308, -1e308, 1.7e308, 5e-324, -5e-324, 1e-310),
    *(float("nan"), float("inf"), float("-inf"), -0.0, 1e15, 1e22, "", " ", "x", "\ud800", "a\udfffb", "\x00\x1b[2J"),
    *("\u2028", "\u0085", "a" * 20_000, "../../x", "T=0.7", "=1+1", "`|<b>*_[x](y)", "2026-01-31", "1e400", "日本"),
    *([], {}, [[]], [None], {"a": {}}, {"": None}, [1, "x", None, {}], {"mean": "x"}, {"mean": 1e308, "n": 10**400}),
    *({"mean": float("nan")}, [{}] * 50, list(range(300)), {"label": [], "unit": {}, "better": 3, "teacher": []}),
)
ODD_KEYS = ("", ".", "a.b", "\ud800", "x" * 5_000, "mean", "T=0.7", "@", "forward_kl@", "__class__", "\x00")
ODD_BYTES = (
    *(b"", b"\x00", b"\xff\xfe\x00", b"\xef\xbb\xbf{}", b"null", b"[]", b"3", b'"x"', b"NaN", b"{", b"}{", b"\n\n\n"),
    *(b"[" * 100_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000, b"1" * 5_000, b'{"a": ' + b"9" * 5_000 + b"}"),
    *(b'{"a": 1e999}', b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", b"a: &a {b: *a}\n", b"- a\n- b\n"),
    *(b"a: !!python/object:x.y {}\n", b"{" * 3_000, b"a: [" * 3_000, b"? [a]\n: b\n", b"a: 2026-13-45\n", b"a: .nan\n"),
    b"teacher: 3\nstudent: []\ntrain: x\n",
)


def readers(run_dir: Path, other: Path | None) -> Iterator[Callable[[], object]]:
    """Everything that reads a run directory and needs no models; the comparison where there is something beside it."""
    yield lambda: write_report(run_dir)
    yield lambda: write_picture(run_dir, run_dir / "report.svg")
    yield lambda: write_card(run_dir)
    yield lambda: harm(read_run(run_dir))
    if other is not None:
        yield lambda: write_comparison([run_dir, other], run_dir.parent / "compare.html", title="x")


def complaints(run_dir: Path, other: Path | None) -> list[BaseException]:
    """What the readers raise that is no refusal in one line."""
    found: list[BaseException] = []
    for read in readers(run_dir, other):
        try:
            read()
        except LimbeckError as error:
            if "\n" in str(error) or len(str(error)) > 2_000:
                found.append(error)
        except Exception as error:
            found.append(error)
    return found


def mutated(good: Path, folder: Path, seed: int) -> tuple[Path, str]:
    """A copy of a run with one thing wrong, and what it is."""
    rng = random.Random(seed)
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(good, run_dir)
    files = sorted(
        path
        for path in run_dir.rglob("*")
        if path.suffix in (".json", ".jsonl", ".yaml") and "tokenizer" not in path.name
    )
    path = rng.choice(files)
    way = rng.choice((_bytes, _tree, _tree, _tree, _tree))
    said = way(path, rng)
    return run_dir, f"seed {seed}, {path.relative_to(run_dir)}: {said}"


def _bytes(path: Path, rng: random.Random) -> str:
    """A file that is gone, cut, another kind of thing, or has other bytes."""
    whole = path.read_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        path.unlink()
        return "gone"
    if kind == 1:
        path.unlink()
        path.mkdir()
        return "a folder"
    if kind == 2:
        end = rng.randrange(len(whole) + 1)
        path.write_bytes(whole[:end])
        return f"cut at {end}"
    if kind == 3:
        places = [rng.randrange(max(1, len(whole))) for _ in range(rng.choice((1, 3, 30)))]
        other = bytearray(whole)
        for place in places:
            other[place : place + 1] = bytes([rng.randrange(256)])
        path.write_bytes(other)
        return f"other bytes at {places[:3]}"
    odd = rng.choice(ODD_BYTES)
    path.write_bytes(odd if kind == 4 else whole + odd)
    return f"{'is' if kind == 4 else 'ends with'} {odd[:40]!r}"


def _tree(path: Path, rng: random.Random) -> str:
    """A value, a key or a line that is another one."""
    import yaml

    if path.suffix == ".yaml":
        trees = [yaml.safe_load(path.read_text("utf-8"))]
    else:
        text = path.read_text("utf-8")
        trees = (
            [json.loads(line) for line in text.split("\n") if line] if path.suffix == ".jsonl" else [json.loads(text)]
        )
    numbers = [rng.randrange(len(trees))] if rng.random() < 0.5 else range(len(trees))
    odd, key, where = rng.choice(ODD), rng.choice(ODD_KEYS), rng.random()
    deep, kind = rng.randrange(1, 6), rng.randrange(8)
    said = ""
    for number in numbers:
        trees[number], said = changed(trees[number], random.Random(where), deep, kind, odd, key)
    if path.suffix == ".yaml":
        # As somebody would write it who does not quote half characters away.
        path.write_text(json.dumps(trees[0]), "utf-8")
    else:
        path.write_text("".join(json.dumps(tree) + "\n" for tree in trees), "utf-8")
    return said


def changed(tree: Any, rng: random.Random, deep: int, kind: int, odd: Any, key: str) -> tuple[Any, str]:
    """The tree with one change some levels down."""
    if deep and isinstance(tree, dict | list) and tree:
        places = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        place = rng.choice(places)
        last = deep == 1 or not isinstance(tree[place], dict | list) or not tree[place]
        if last and kind == 0:
            del tree[place]
            return tree, f"without {place!r}"
        if last and kind == 1 and isinstance(tree, dict):
            tree[key] = tree.pop(place)
            return tree, f"{place!r} called {key[:20]!r}"
        if last and kind == 2:
            tree[place] = [tree[place]]
            return tree, f"{place!r} in a list"
        tree[place], said = changed(tree[place], rng, deep - 1, kind, odd, key)
        return tree, f"{place!r} / {said}"
    return odd, repr(odd)[:60]
