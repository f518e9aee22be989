"""Recipes and overrides as nobody should write them: each is read, or refused in one line.

python -m tests.recipe.test_hostile_recipes 5000 300      # by hand: so many mutants from that number on
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest

import limbeck
from limbeck.recipe import files as recipe_files
from limbeck.recipe.load import known_keys, load_recipe, objective_of, rule_of, to_yaml
from limbeck.sweep.arms import arms_of
from limbeck.sweep.settings import load_sweep
from limbeck.types import LimbeckError
from tests.report.hostile import ODD, ODD_BYTES, ODD_KEYS, changed

PLAIN: dict[str, Any] = {"teacher": {"model": "t"}, "student": {"init": "depth_prune", "layers": 2}}
FOLDER = Path(limbeck.__file__).parent / "recipe" / "shipped"
MUTANTS, BATCH = 300, 50


def read(source: Any, *overrides: str) -> None:
    """Everything that is done with a recipe before models are looked at."""
    try:
        recipe = load_recipe(source, overrides)
        to_yaml(recipe)
        objective_of(recipe)
        rule_of(recipe)
    except LimbeckError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("key", known_keys())
def test_every_key_with_odd_values(key: str) -> None:
    for odd in ODD:
        read(PLAIN, f"{key}={json.dumps(odd)}")
        tree = json.loads(json.dumps(PLAIN))
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = odd
        read(tree)


PAIRS, OWN = {"responses": {"source": "pairs"}}, {"responses": {"source": "student"}}


@pytest.mark.parametrize(
    ("path", "beside"),
    [
        ("contrast.rule.name", PAIRS),
        ("contrast.rule.gamma", OWN | {"contrast": {"rule": {"name": "minillm"}}}),
        ("contrast.student.name", PAIRS),
        ("contrast.student.alpha", PAIRS | {"contrast": {"student": {"name": "srkl"}}}),
        ("sft.objective.name", {}),
        ("objective.parts", {"objective": {"name": "sum"}}),
        ("objective.parts.0.name", {"objective": {"name": "sum", "parts": [{"weight": 1.0}]}}),
        ("objective.alpha", {"objective": {"name": "skl"}}),
        ("objective.schedule.progress", {"objective": {"name": "taid"}}),
        ("responses.source.name", {}),
        ("responses.source.share", {"responses": {"source": {"name": "replay"}}}),
        ("evaluate.groups.0", {"evaluate": {"groups": [""]}}),
        ("evaluate.groups.fidelity.top_k", {}),
        ("student.quantize.format", {}),
        ("student.lora.target_modules", {}),
    ],
)
def test_options_of_members_with_odd_values(path: str, beside: dict[str, Any]) -> None:
    """What stands below the keys of the schema: names of members and their options."""
    for odd in ODD:
        tree: Any = json.loads(json.dumps(PLAIN | beside))
        keys: list[Any] = [int(part) if part.isdigit() else part for part in path.split(".")]
        *parents, leaf = keys
        node = tree
        for parent in parents:
            node = node[parent] if isinstance(node, list) else node.setdefault(parent, {})
        node[leaf] = odd
        read(tree)


def mutant(seed: int) -> bytes:
    """A shipped recipe or sweep with one thing wrong."""
    rng = random.Random(seed)
    names = sorted([*recipe_files.shipped_recipes(), *recipe_files.shipped_sweeps()])
    whole = (FOLDER / f"{rng.choice(names)}.yaml").read_bytes()
    kind = rng.randrange(5)
    if kind == 0:
        other = bytearray(whole)
        for _ in range(rng.choice((1, 3, 40))):
            other[rng.randrange(len(other))] = rng.randrange(256)
        return bytes(other)
    if kind == 1:
        return whole[: rng.randrange(len(whole))]
    if kind == 2:
        return rng.choice((b"", whole + b"\n")) + rng.choice(ODD_BYTES)
    import yaml

    deep, way, odd, key = rng.randrange(1, 5), rng.randrange(6), rng.choice(ODD), rng.choice(ODD_KEYS)
    tree, _ = changed(yaml.safe_load(whole), rng, deep, way, odd, key)
    return json.dumps(tree).encode()


def play(number: int, path: Path) -> None:
    """A mutant as a recipe, then as a sweep."""
    path.write_bytes(mutant(number))
    read(path)
    try:
        arms_of(load_sweep(path))
    except LimbeckError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("first", range(0, MUTANTS, BATCH))
def test_mutants(tmp_path: Path, first: int) -> None:
    for number in range(first, first + BATCH):
        play(number, tmp_path / "mine.yaml")


def main() -> None:
    count, first = int(sys.argv[1]), int(sys.argv[2])
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            try:
                play(number, Path(folder) / "mine.yaml")
            except Exception:
                wrong += 1
                print(number, traceback.format_exc()[-1500:], flush=True)
    print(f"{count} mutants, {wrong} wrong")


if __name__ == "__main__":
    main()
