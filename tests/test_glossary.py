"""One vocabulary: the glossary is short; retired words come back neither in code nor in the documentation."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "limbeck"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

# Identifiers that said nothing to a newcomer, or several things, with what took their place.
IDENTIFIERS = {
    "Alone": "SingleProcess, InProcessPool",
    "Answered": "SampledBatch",
    "Balance": "TokenWeighting",
    "Bill": "CostSummary",
    "Broken": "ConnectionFailed",
    "Clock": "StepCounter, Timer",
    "Crew": "WorkerPool",
    "CostSection": "CostGroup",
    "DiversitySection": "DiversityGroup",
    "Duo": "DraftVerifyPair",
    "EXAMINATION": "STANDALONE_STAGES",
    "Exam": "EvaluationContext",
    "FidelitySection": "FidelityGroup",
    "Finish": "LogitTransform",
    "Fixed": "OfflineSource",
    "Inspector": "RunChecker",
    "JUDGE_ROWS": "SCORING_BATCH_SIZE",
    "JudgeSection": "JudgeGroup",
    "Keeper": "SignalCache",
    "Ledger": "RunTable",
    "Measured": "GroupResult",
    "Moment": "StepSettings",
    "NllSection": "NllGroup",
    "OnPolicySection": "StudentResponses, MixedResponses, ReplayResponses, ...",
    "Own": "StudentSource",
    "Pen": "RolloutConfig",
    "Plate": "Figure",
    "Player": "Executor",
    "Probe": "HealthCheck, LogitProbe",
    "RoundTeacher": "CachedTeacher",
    "RougeSection": "RougeGroup",
    "Said": "ReplyText, ShownResponse",
    "Seen": "SequenceStats",
    "Sheet": "ResampledMetric",
    "Shelf": "ArtifactCache",
    "Shift": "SourceContext",
    "Speaker": "ChatModel",
    "SpeculationSection": "SpeculationGroup",
    "StopWish": "GracefulStop",
    "Story": "RunContext",
    "Supply": "ResponseSource",
    "TONES": "COLORS",
    "Tail": "StreamingPercentile",
    "Tally": "AcceptanceStats",
    "TasksSection": "TasksGroup",
    "Told": "TokenOptions",
    "TwoModels": "SpeculativeSamplerBase",
    "UnheardTeacher": "NullTeacher",
    "Veto": "TopKVeto",
    "Warned": "RaisedAlarm",
    "World": "ProcessGroup",
    "Writer": "DecodingModel",
    "_Conductor": "SweepRunner",
    "_HandOver": "_PrecomputedGrad",
    "_PausedExam": "_PausedEvaluation",
    "_Trouble": "_RetryableError",
    "_propose": "_draft",
    "_refuse_teacher": "_require_teacher",
    "_judge_again": "_score_again",
    "_play_all": "_run_all",
    "_play_stage": "_run_stage",
    "_story": "_facts, _context",
    "author_of": "response_source_of",
    "conductor": "runner",
    "crew": "pool",
    "crew_of": "worker_pool",
    "inspector": "checker",
    "judge_BJV": "verifier_BJV",
    "judge_BKV": "verifier_BKV",
    "judge_all": "verdicts_of",
    "ledger": "table",
    "load_teacher": "RunContext.teacher, whose weights() load when first needed",
    "local_teacher": "RunContext.teacher",
    "moment": "step_settings",
    "play": "run",
    "play_sweep": "run_sweep",
    "player": "executor",
    "story": "run, facts",
    "told": "what was set, such as token_options",
    "wish_s": "retry_after_s",
    "write_together": "decode_speculative",
    "writer_of": "decoding_model",
}

# Files of the package, likewise.
MODULES = {
    "alone": "standalone_evaluation",
    "blank": "untrained",
    "card": "model_card",
    "conduct": "runner",
    "crew": "workers",
    "exam": "evaluation_context",
    "failures": "errors",
    "flow": "types",
    "journal": "jsonl, metrics",
    "judging": "build",
    "ledger": "status",
    "nucleus": "top_p",
    "player": "executor",
    "shelf": "artifact_cache",
    "story": "engine",
    "tail": "percentile",
    "together": "speculative",
    "utils": "the name of what it does",
}

# What documentation, docstrings, comments and messages say otherwise.
PHRASES = {
    r"story": "run",
    r"play(s|ed|ing)?": "run",
    r"told": "set, given",
    # The judge is asked about "whoever asked".
    r"(some|no)body|whoever(?! asked)": "the process, file, user or model that is meant",
    r"the pen": "rollout settings",
    r"(student|code|kernel) of (now|then)": "current, earlier",
    r"speaks?": "generates",
    r"(teacher|weights) (that )?judges?|judged by the teacher": "score; judge is the LLM judge alone",
    r"(nats|bits|bytes?|tokens|responses|values?|numbers?|rows?|lines?|files?|seconds|s|pairs?|one) an? "
    r"(token|step|row|run|example|batch|round|pass|prompt|position|turn|GPU|byte)": "per",
}


def identifiers(source: str) -> Iterator[tuple[str, int]]:
    """Every name that the code defines or uses, with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.keyword(arg=str(name)):
                yield name, node.value.lineno
            case ast.alias(name=name, asname=asname):
                yield asname or name.rpartition(".")[2], node.lineno


def retired(source: str) -> list[str]:
    found = ((name, line) for name, line in identifiers(source) if name in IDENTIFIERS)
    return [f"line {line}: {name} is called {IDENTIFIERS[name]}" for name, line in found]


def phrases(text: str) -> list[str]:
    """Retired words of a page; what stands in code blocks and backticks is the code's."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", " ", text, flags=re.MULTILINE | re.DOTALL)
    spaced = {phrase.replace(" ", r"\s+"): word for phrase, word in PHRASES.items()}
    found = ((match[0], word) for phrase, word in spaced.items() for match in re.finditer(rf"\b({phrase})\b", prose))
    return [f"{' '.join(said.split())!r}: {word}" for said, word in found]


def prose(source: str) -> str:
    """Docstrings, comments and messages of a module; what stands in backticks is code there, too."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT))


def test_the_glossary_is_short() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    words = re.findall(r"^- \*\*([^*]+)\*\*: [A-Z]", page, re.MULTILINE)
    assert words == list(dict.fromkeys(words)) and 20 <= len(words) <= 30
    assert len(words) == page.count("\n- ")


def test_stages_of_the_glossary_are_those_of_the_command_line() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    (entry,) = re.findall(r"^- \*\*stage\*\*: (.*?)\n(?=- |\n|$)", page, re.MULTILINE | re.DOTALL)
    stages = {path.stem for path in (PACKAGE / "pipeline" / "stages").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"`(\w+)`", entry)) == stages


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"))
def test_retired_identifiers_stay_away(room: str) -> None:
    path = PACKAGE / room
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        assert file.stem not in MODULES, f"{file.name} is called {MODULES[file.stem]}"
        if file.suffix == ".py":
            assert retired(file.read_text("utf-8")) == [], file


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_retired_words_stay_away_from_the_documentation(page: Path) -> None:
    assert phrases(page.read_text("utf-8")) == []


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"))
def test_retired_words_stay_away_from_the_code(room: str) -> None:
    path = PACKAGE / room
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        if file.suffix == ".py":
            assert phrases(prose(file.read_text("utf-8"))) == [], file


@pytest.mark.parametrize(
    "source",
    [
        "class Supply: ...",
        "def f(wish_s): ...",
        "from x import Keeper",
        "import a.b as Shelf",
        "self.Pen",
        "f(wish_s=1)",
    ],
)
def test_a_retired_identifier_is_found(source: str) -> None:
    assert len(retired(source)) == 1


@pytest.mark.parametrize("source", ['"""The story."""', "x = 1  # told so", 'raise ValueError(f"nobody reads {x}")'])
def test_a_retired_word_in_code_is_found(source: str) -> None:
    assert len(phrases(prose(source))) == 1


@pytest.mark.parametrize("text", ["One value a\ntoken.", "The story ends.", "3 nats a token", "the teacher judges it"])
def test_a_retired_phrase_is_found(text: str) -> None:
    assert len(phrases(text)) == 1
    assert phrases(f"```\n{text}\n```\n") == []
