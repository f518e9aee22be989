"""Tasks of lm-evaluation-harness (Gao et al.) with a model that is loaded already. The package is not installed with
limbeck: `pip install lm-eval`. Its data sets come from the hub.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.types import Json, LimbeckError, ScoredRow

# Per-example metrics that say whether an answer is right, the first one that a task has counts.
_RIGHT = ("exact_match", "acc", "prompt_level_strict_acc")


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessResult:
    """Result of the harness.

    Attributes:
        tables: task to rows with `accuracy`, one per example, for tasks that grade each example.
        results: the harness's own figures: task to metric ("acc", "acc_stderr", with ",FILTER" behind) to value.
        version: of the package.
    """

    tables: Mapping[str, Sequence[ScoredRow]]
    results: Json
    version: str


def require_lm_eval() -> None:
    """
    Raises:
        LimbeckError: the package is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise LimbeckError(
            "evaluate.groups.tasks.lm_eval names tasks of lm-evaluation-harness, which is not installed; "
            "pip install lm-eval, or leave the key out"
        )


def run_lm_eval(
    tasks: Sequence[str],
    model: Any,
    tokenizer: Any,
    *,
    chat: bool,
    batch_size: int,
    limit: int | None,
    seed: int,
) -> HarnessResult:
    """Run tasks of the harness.

    Args:
        chat: wrap the requests in the tokenizer's chat template.
        limit: only so many examples of each task.

    Raises:
        LimbeckError: the package is missing, or has no such task.
    """
    require_lm_eval()
    lm_eval = importlib.import_module("lm_eval")
    HFLM = importlib.import_module("lm_eval.models.huggingface").HFLM
    manager = importlib.import_module("lm_eval.tasks").TaskManager()
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise LimbeckError(
            f"lm-evaluation-harness {lm_eval.__version__} has no task {unknown[0]!r}; expected one that "
            "`lm_eval ls tasks` prints: correct evaluate.groups.tasks.lm_eval"
        )
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    results = {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
    tables = {task: rows for task, samples in found.get("samples", {}).items() if (rows := _rows(task, samples))}
    return HarnessResult(tables=tables, results=results, version=str(lm_eval.__version__))


def _rows(task: str, samples: Sequence[Mapping[str, Any]]) -> list[ScoredRow]:
    """One row per example; of several filters of the answers (GSM8K has two) the first one."""
    rows: dict[str, ScoredRow] = {}
    for sample in samples:
        metric = next((name for name in _RIGHT if isinstance(sample.get(name), bool | int | float)), None)
        id = f"{task}/{sample['doc_id']}"
        if metric is not None and id not in rows:
            rows[id] = ScoredRow(id=id, weight=1.0, values={"accuracy": float(sample[metric])})
    return list(rows.values())
