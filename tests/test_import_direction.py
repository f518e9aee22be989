"""Who may import whom, over the syntax tree: imports at the top, inside functions, and for type checkers alike."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "limbeck"

# Parts that everybody may import, and what little they need themselves.
LEAVES = {
    "flow": set(),
    "console": set(),
    "onednn": set(),
    "jsonlines": set(),
    "folders": set(),
    "hashing": set(),
    "rundir": {"flow", "folders"},
    "outputs": {"hashing", "rundir"},
    "failures": {"flow"},
    "launched": {"flow"},
    "heartbeat": {"flow"},
    "shelf": {"outputs", "rundir"},
    "journal": {"flow", "rundir"},
    "recipe_mistakes": set(),
    "recipe_text": {"flow", "recipe_mistakes"},
    "recipe_files": {"flow", "recipe_mistakes", "recipe_text"},
    "recipe_values": set(),
    "recipe_evaluation": {"recipe_values"},
    "recipe_sections": {"recipe_evaluation", "recipe_values"},
    "recipe_keys": {"recipe_sections", "recipe_values"},
    "recipe_checks": {"flow", "recipe_sections"},
    # Only to build objectives and rules and to list the objectives' options in the schema, inside functions.
    "config": {
        *("flow", "recipe_checks", "recipe_files", "recipe_mistakes", "recipe_sections", "recipe_text"),
        "objectives",
    },
}
USABLE = {
    "flow",
    "jsonlines",
    "config",
    "recipe_evaluation",
    "recipe_sections",
    "rundir",
    "folders",
    "hashing",
    "console",
    "onednn",
}
PARTS = {
    "models": USABLE,
    "objectives": {"flow", "onednn"},
    "prompts": USABLE | {"models"},
    "teachers": USABLE | {"models"},
    "server": {"flow", "rundir"},
    "responses": USABLE | {"models", "prompts", "server", "journal"},
    # A teacher is handed in, never imported.
    "student": USABLE | {"launched", "objectives", "models", "responses", "prompts"},
    "evaluation": {"flow", "jsonlines", "rundir", "objectives", "models", "server", "journal"},
    # Of responses the words of the alarms and what a loop is, which need no torch.
    "report": {"flow", "jsonlines", "rundir", "recipe_keys", "recipe_text", "evaluation", "responses"},
    "card": {"flow", "rundir", "report"},
    # Reads what a run wrote, and writes it for others; adapters are merged as the student is saved.
    "export": {"flow", "outputs", "recipe_text", "rundir", "models", "prompts", "student"},
}
# What plays the story may import every part; the stages are handed to it.
STORY = USABLE | set(PARTS) | {"shelf", "recipe_keys", "recipe_text"}
TOP = {
    # Of the story what a stage is.
    "integrity": {"console", "flow", "outputs", "rundir", "story"},
    "story": STORY | {"failures", "heartbeat", "integrity", "launched", "outputs"},
    "stages": STORY | {"story", "recipe_mistakes"},
    "api": {"flow", "config", "console", "stages", "story"},
    "sweep": STORY
    | {"api", "failures", "launched", "recipe_files", "recipe_mistakes", "recipe_text", "recipe_values"}
    | {"stages", "story"},
    "__init__": {"api", "config", "flow", "objectives"},
    "cli": STORY | set(LEAVES) | {"api", "stages", "story", "sweep"},
    "__main__": {"cli"},
}
ALLOWED: dict[str, set[str]] = LEAVES | PARTS | TOP


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """limbeck/student/loop.py -> student; limbeck/flow.py -> flow."""
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
def test_imports_follow_the_story(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import and who may import it"
    wrong = [
        f"{path.name}:{line} imports {other}"
        for other, line in sorted(imported_parts(path, path.read_text("utf-8")))
        if other != part and other not in ALLOWED[part]
    ]
    assert not wrong, "; ".join(wrong)


def test_the_rules_themselves_go_one_way():
    assert not [part for part, others in ALLOWED.items() if "cli" in others and part != "__main__"]
    assert not ALLOWED["flow"]
    for part in PARTS:
        assert not {"stages", "story", "api"} & ALLOWED[part]
    assert "teachers" not in ALLOWED["student"] and "student" not in ALLOWED["evaluation"]


def test_every_rule_is_of_a_part_that_exists():
    assert set(ALLOWED) == {part_of(path) for path in modules()}


def test_a_forbidden_import_would_be_seen():
    source = (
        "def f():\n    from limbeck.student import loop\n"
        "if TYPE_CHECKING:\n    import limbeck.cli\nfrom limbeck import api\n"
    )
    assert imported_parts(Path("x.py"), source) == {("student", 2), ("cli", 4), ("api", 5)}


def test_flow_and_objectives_need_torch_at_most():
    """What a training loop of somebody else imports, no more."""
    for path in [PACKAGE / "flow.py", *sorted((PACKAGE / "objectives").glob("*.py"))]:
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


@pytest.mark.parametrize("module", ["limbeck", "limbeck.cli", "limbeck.config", "limbeck.api", "limbeck.flow"])
def test_looking_around_loads_nothing_heavy(module):
    code = f"import {module}, sys; print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    end = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert end.stdout.strip() == "[]"


def test_import_takes_less_than_a_second():
    assert best_of_three("-c", "import limbeck") < 1


def test_help_takes_less_than_two_seconds():
    assert best_of_three("-m", "limbeck", "--help") < 2
