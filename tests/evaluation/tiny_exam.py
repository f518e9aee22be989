"""An exam outside of a run: two tiny models with different tokenizers, and prompts with one or two references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from limbeck.evaluation.context import Who
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.evaluation_context import RunEvaluation
from limbeck.prompts.io import write_prompts
from limbeck.prompts.sources import load_prompts
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.types import Prompt, Response, Sampling
from tests.tiny_pair import questions, write_model
from tests.tiny_pair import write_prompts as write_rows

SEEDS = (3, 4)
# Random models say hardly more than single letters.
FRAGMENTS = "b a c of r the use th i y ke u e three m s and n at"
EVALUATE = {
    "groups": {
        "rouge": {"against": ["teacher", "references"], "seeds": list(SEEDS)},
        "diversity": {"temperatures": [0.0, 0.7, 1.0], "samples": 3, "prompts": 4, "seed": 5},
    },
    "max_new_tokens": 8,
}


@dataclass(frozen=True)
class Tiny:
    """Two models with different tokenizers, and prompts with one or two references."""

    student: Path
    teacher: Path
    prompts: Path

    @classmethod
    def write(cls, folder: Path) -> Tiny:
        rows = [
            {"instruction": text, "output": [FRAGMENTS, FRAGMENTS[::-1]] if i % 2 else FRAGMENTS}
            for i, text in enumerate(questions(6))
        ]
        return cls(
            student=write_model(folder / "student", layers=2, seed=1, extra=["other words make other tokens"] * 9),
            teacher=write_model(folder / "teacher"),
            prompts=write_rows(folder / "prompts.jsonl", rows),
        )

    def evaluation(
        self,
        folder: Path,
        evaluate: dict[str, Any],
        *,
        teacher: Path | None = None,
        where: str = "in_process",
        answered: bool = True,
    ) -> RunEvaluation:
        """An evaluation outside of a run, on all prompts; keys of `evaluate` are put over EVALUATE."""
        tree = {
            "name": "tiny",
            "output_dir": str(folder),
            "teacher": {"model": str(teacher or self.teacher), "where": where},
            "student": {"model": str(self.student), "init": "pretrained"},
            "prompts": {"source": str(self.prompts)},
            "evaluate": EVALUATE | evaluate,
        }
        context = RunContext(load_recipe(tree))
        prompts = [replace(p, split="heldout") for p in prompts_of(self.prompts)]
        if not answered:
            prompts = [replace(p, completion=None, references=()) for p in prompts]
        write_prompts(context.run.prompts, prompts)
        return RunEvaluation(context=context, part="after")


def prompts_of(path: Path) -> Sequence[Prompt]:
    return load_prompts(str(path), heldout_fraction=0.5).prompts


def written(
    evaluation: RunEvaluation, who: Who, sampling: Sampling, *, logp: bool = False
) -> dict[str, list[Response]]:
    """Answers on disk that were drawn like this, by prompt id, found by what they say of themselves."""
    name = who if who == "teacher" else "after"
    files = [read_responses(path) for path in sorted((evaluation.folder / "answers").glob(f"{name}-*.jsonl"))]
    chosen = [
        response
        for responses in files
        for response in responses
        if response.sampling == sampling and (response.logp is not None) == logp
    ]
    return {r.prompt_id: [other for other in chosen if other.prompt_id == r.prompt_id] for r in chosen}


def tokenizer_of(pair: Tiny, who: Who) -> Any:
    return AutoTokenizer.from_pretrained(pair.student if who == "student" else pair.teacher)
