"""Run directories and a sweep to compare, written from a seed: effects of arms, seeds and examples are known."""

import json
from pathlib import Path

import numpy as np
import yaml

from limbeck.evaluation.scores.files import write_scores
from limbeck.types import ScoredRow
from tests.report.synthetic import RECIPE, SAMPLES, STAGES

EXAMPLES = 60


def write_arm_run(
    folder: Path,
    *,
    objective="fkl",
    temperature=1.0,
    seed=0,
    kl=0.8,
    examples=EXAMPLES,
    diversity=(),
    recipe=None,
    name=None,
    shared=False,
    steps=60,
    tables=None,
) -> Path:
    """A finished run. `kl` is its true forward KL; `recipe` are dotted changes of the resolved recipe called `name`;
    `tables` are more rows by table."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = yaml.safe_load(RECIPE)
    tree["name"] = name or folder.name
    tree["objective"] |= {"name": objective, "temperature": temperature}
    tree["train"]["seed"] = seed
    tree["evaluate"] = {"groups": {"fidelity": {"top_k": 5}, "rouge": {}}, "max_new_tokens": 64}
    for key, value in (recipe or {}).items():
        section, _, leaf = key.partition(".")
        tree[section][leaf] = value
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    rng = np.random.default_rng([seed, round(1000 * kl), len(objective)])
    shift = 0.02 * rng.normal()
    tables = {
        **(tables or {}),
        "fidelity": _fidelity(rng, kl + shift, examples),
        "rouge": _rouge(rng, 0.7 - 0.3 * kl - shift, examples),
    }
    for tau in diversity:
        tables[f"diversity@T={tau:g}"] = _diversity(rng, kl + shift, tau, examples)
    write_scores(folder, before={}, after=tables)
    _lines(folder / "samples.jsonl", SAMPLES)
    _lines(folder / "metrics.jsonl", _metrics(rng, kl, steps))
    (folder / "student").mkdir(exist_ok=True)
    (folder / "student" / "student.json").write_text(json.dumps({"parameters": 92_000_832}))
    (folder / "provenance.json").write_text(json.dumps({"fingerprints": {"teacher": "9f2c"}}))
    (folder / "stages").mkdir(exist_ok=True)
    for stage, seconds, tokens, speed, peak in STAGES:
        manifest = {"stage": stage, "done": True, "fingerprint": "f", "started": 1.76e9, "seconds": seconds}
        manifest |= {"tokens": tokens, "tokens_per_s": speed, "peak_memory_mib": peak}
        if shared and stage in ("prompts", "respond", "teach"):
            manifest["shared_from"] = "../other"
        (folder / "stages" / f"{stage}.json").write_text(json.dumps(manifest))
    return folder


def write_sweep(root: Path, *, objectives=("fkl", "rkl", "csd"), temperatures=(1, 2, 4), seeds=(0, 1, 2)) -> Path:
    """A sweep with a grid, tuning runs, a failed run, a dropped one and one that waits."""
    lines = []
    for objective in objectives:
        for n, temperature in enumerate(temperatures):
            arm = f"name={objective},temperature={temperature}"
            kl = 0.8 + 0.1 * objectives.index(objective) + 0.12 * abs(n - 1)
            for rate in (1e-4, 3e-4) if n == 0 else ():
                directory = f"arms/{arm}/tune/learning_rate={rate:g}"
                write_arm_run(root / directory, objective=objective, temperature=temperature, kl=kl, steps=20)
                keys = {"objective.name": objective, "objective.temperature": temperature, "train.learning_rate": rate}
                lines.append(_line(arm, 0, keys, directory, tuning=True))
            keys = {"objective.name": objective, "objective.temperature": temperature, "train.learning_rate": 3e-4}
            for seed in seeds:
                directory = f"arms/{arm}/seed={seed}"
                write_arm_run(
                    root / directory, objective=objective, temperature=temperature, seed=seed, kl=kl,
                    diversity=(0.5, 1.0), shared=bool(lines),
                )  # fmt: skip
                lines.append(_line(arm, seed, keys, directory))
    lines[-1] |= {"state": "failed", "error": "the loss became NaN at step 31: lower train.learning_rate"}
    lines.append(_line("late", 0, {"objective.name": "js"}, "arms/late/seed=0") | {"state": "waiting"})
    lines.append(_line("halved", 0, {"objective.name": "tv"}, "arms/halved/seed=0") | {"state": "dropped"})
    _lines(root / "arms.jsonl", lines)
    return root


def _line(arm, seed, keys, directory, *, tuning=False):
    return {
        "arm": arm, "seed": seed, "keys": keys, "tuning": tuning, "state": "done", "error": None,
        "directory": directory,
    }  # fmt: skip


def _lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _hard(examples):
    """How hard each example is: the same in all runs."""
    return np.random.default_rng(3).gamma(8.0, 1 / 8, examples)


def _fidelity(rng, kl, examples):
    lengths = np.random.default_rng(5).integers(24, 97, examples)
    rows = []
    for n, hard in enumerate(_hard(examples)):
        own = float(kl * hard * rng.gamma(40.0, 1 / 40))
        rows.append(
            ScoredRow(
                id=f"p{n}",
                weight=float(lengths[n]),
                values={
                    "forward_kl": own, "reverse_kl": own * 1.1, "acceptance": float(np.exp(-own / 2)),
                    "top1_agreement": float(np.clip(1 - own / 2.5, 0, 1)), "student_entropy": 1.1 + 0.2 * own,
                    "teacher_entropy": 1.1, "student_nll": 1.05 + own, "teacher_nll": 1.05,
                },
            )
        )  # fmt: skip
    return rows


def _rouge(rng, mean, examples):
    values = np.clip(mean * (1.4 - 0.4 * _hard(examples)) + 0.05 * rng.normal(size=examples), 0, 1)
    return [ScoredRow(id=f"p{n}", weight=1.0, values={"rouge_l": float(v)}) for n, v in enumerate(values)]


def _diversity(rng, kl, tau, examples):
    distinct = np.clip(0.5 + 0.3 * tau - 0.1 * kl + 0.05 * rng.normal(size=examples), 0, 1)
    rouge = np.clip(0.5 - 0.12 * tau - 0.2 * (kl - 0.8) + 0.05 * rng.normal(size=examples), 0, 1)
    return [
        ScoredRow(
            id=f"p{n}",
            weight=1.0,
            values={
                "distinct_2": float(distinct[n]), "teacher_distinct_2": 0.5 + 0.3 * tau,
                "sample_rouge_l": float(rouge[n]), "teacher_sample_rouge_l": 0.55 - 0.12 * tau,
            },
        )
        for n in range(examples)
    ]  # fmt: skip


def _metrics(rng, kl, steps):
    for step in range(1, steps + 1):
        fall = np.exp(-step / 22)
        yield {
            "step": step, "loss": 0.5 + 1.6 * fall + 0.06 * rng.normal(), "objective": "fkl",
            "forward_kl": kl + 1.2 * fall + 0.05 * rng.normal(),
        }  # fmt: skip
