"""Who may import whom, over the syntax tree: imports at the top, inside functions, and for type checkers alike."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "limbeck"

# The library, from below: no part of it knows the pipeline, what plays it, or the command line.
LIBRARY: dict[str, set[str]] = {
    "types": set(),
    "fields": set(),
    "registry": {"types"},
    "runtime": {"types"},
    "ops": set(),
    "client": {"types"},
    "objectives": {"types", "registry", "ops"},
    # Who writes the responses of a step; a recipe holds the options of a source.
    "rollouts": {"types", "fields", "registry", "runtime"},
    "models": {"types", "registry", "runtime", "ops"},
    "prompts": {"types", "runtime", "models"},
    "teachers": {"types", "fields", "registry", "runtime", "ops", "client", "models"},
    "sampling": {"types", "ops", "client", "models"},
    "student": {"types", "runtime", "ops", "models", "prompts"},
    # A group asks for models and answers by a protocol; what runs know of both is in the pipeline.
    "evaluation": {"types", "fields", "registry", "runtime", "client", "objectives", "models", "prompts"}
    | {"rollouts", "sampling"},
    # Of objectives, sources, teachers and groups their options, for the schema and to refuse wrong ones.
    "recipe": {"types", "fields", "registry", "objectives", "rollouts", "teachers", "evaluation"},
    # A teacher is handed in, never imported.
    "training": {"types", "runtime", "ops", "objectives", "recipe", "models", "rollouts"},
    # Reads what a run wrote; of the rollouts the words of the alarms, which need no torch.
    "report": {"types", "runtime", "recipe", "rollouts"},
    "compare": {"types", "runtime", "recipe", "evaluation", "report"},
    "export": {"types", "runtime", "recipe", "models", "prompts", "student"},
}
# What joins the parts by a recipe in a run directory, and what plays it.
ABOVE: dict[str, set[str]] = {
    "pipeline": set(LIBRARY) - {"compare", "export", "ops"},
    "api": {"types", "recipe", "runtime", "pipeline"},
    "sweep": {"types", "fields", "runtime", "recipe", "evaluation", "compare", "pipeline"},
    "__init__": {"types", "recipe", "objectives", "api"},
    "cli": {"types", "teachers", "recipe", "runtime", "models", "objectives", "rollouts", "report", "compare", "export"}
    | {"evaluation", "pipeline", "api", "sweep"},
    "__main__": {"cli"},
}
ALLOWED: dict[str, set[str]] = LIBRARY | ABOVE
ROOMS, ARROWS = 25, 115


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """limbeck/training/loop.py -> training; limbeck/types.py -> types."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path, source: str) -> set[tuple[str, int]]:
    """The parts of limbeck a module imports anywhere in it, with line numbers."""
    found: set[tuple[str, int]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            root, _, rest = (node.module or "").partition(".")
            if root == "limbeck":
                found |= {(rest.partition(".")[0] or alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                root, _, rest = alias.name.partition(".")
                if root == "limbeck":
                    found.add((rest.partition(".")[0] or "__init__", node.lineno))
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_rules(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import and who may import it"
    wrong = [
        f"{path.name}:{line} imports {other}"
        for other, line in sorted(imported_parts(path, path.read_text("utf-8")))
        if other != part and other not in ALLOWED[part]
    ]
    assert not wrong, "; ".join(wrong)


def test_the_rules_themselves_go_one_way():
    """Each part may import only what stands above it in the tables, so that no circle can be allowed."""
    order = list(ALLOWED)
    wrong = [(part, other) for part in ALLOWED for other in ALLOWED[part] if order.index(other) >= order.index(part)]
    # The package's face and the command are listed where they are read.
    assert not [pair for pair in wrong if pair[0] not in ("__init__",)]
    assert "teachers" not in ALLOWED["training"] and "student" not in ALLOWED["evaluation"]


def test_the_house_stays_small():
    """One screen of parts, and no more ways between them than one can keep in mind."""
    arrows = {
        (part_of(path), other)
        for path in modules()
        for other, _ in imported_parts(path, path.read_text("utf-8"))
        if other != part_of(path)
    }
    assert len(ALLOWED) <= ROOMS and len(arrows) <= ARROWS
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__" and path.suffix != ".typed"]
    assert len([path for path in entries if path.is_file()]) <= 7
    assert len([path for path in entries if path.is_dir()]) <= 18


def test_every_rule_is_of_a_part_that_exists():
    assert set(ALLOWED) == {part_of(path) for path in modules()}


def test_a_forbidden_import_would_be_seen():
    source = (
        "def f():\n    from limbeck.student import loop\n"
        "if TYPE_CHECKING:\n    import limbeck.cli\nfrom limbeck import api\n"
    )
    assert imported_parts(Path("x.py"), source) == {("student", 2), ("cli", 4), ("api", 5)}


def test_types_and_objectives_need_torch_at_most():
    """What a training loop outside limbeck imports, no more."""
    for path in [PACKAGE / "types.py", *sorted((PACKAGE / "objectives").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for root in {name.partition(".")[0] for name in names}:
                assert root in sys.stdlib_module_names | {"torch", "limbeck"}, f"{path.name} imports {root}"


def best_of_three(*command: str) -> float:
    """Seconds of the fastest of three tries: other work on the machine only ever adds."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


HEAVY = ("torch", "transformers", "numpy", "datasets", "peft", "accelerate", "rouge_score")


@pytest.mark.parametrize("module", ["limbeck", "limbeck.cli", "limbeck.recipe.load", "limbeck.api", "limbeck.types"])
def test_looking_around_loads_nothing_heavy(module):
    code = f"import {module}, sys; print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    end = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert end.stdout.strip() == "[]"


def test_import_takes_less_than_a_second():
    assert best_of_three("-c", "import limbeck") < 1


def test_help_takes_less_than_two_seconds():
    assert best_of_three("-m", "limbeck", "--help") < 2
