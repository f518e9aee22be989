"""A run directory as a quickstart leaves it, written from a seed: realistic enough to be looked at."""

import json
from pathlib import Path

import numpy as np

from limbeck.evaluation.scores.files import write_scores
from limbeck.runtime.rundir import RunDirectory
from limbeck.types import ScoredRow

RECIPE = """\
name: quickstart
teacher:
  model: smollm2-135m-instruct
  dtype: float32
student:
  init: depth_prune
  layers: 18
prompts:
  source: builtin
  eval_fraction: 0.1
responses:
  source: {name: teacher}
  max_new_tokens: 96
  temperature: 0.8
  top_p: 0.95
objective:
  name: fkl
  temperature: 2.0
train:
  num_train_epochs: 2
  learning_rate: 0.0003
  per_device_train_batch_size: 8
  seed: 0
evaluate: [fidelity, rouge]
"""
KEPT = [0, 1, 2, 6, 7, 8, 9, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29]
SAMPLES = [
    {
        "prompt": "Give three tips for sleeping better.",
        "teacher": "1. Go to bed at the same time every night.\n2. Keep your bedroom cool and dark.\n"
        "3. Avoid caffeine after noon.",
        "before": "1. The sleep sleep is a sleep sleep sleep of the sleep and the bed bed the sleep.\n2. The the",
        "after": "1. Go to bed at the same time every day.\n2. Keep your bedroom dark and quiet.\n"
        "3. Avoid screens before bed.",
        "rouge_before": 0.12,
        "rouge_after": 0.71,
    },
    {
        "prompt": "Write a Python function that returns the larger of two numbers.",
        "teacher": "def larger(a, b):\n    return a if a > b else b",
        "before": "",
        "after": "def larger(a, b):\n    if a > b:\n        return a\n    return b",
        "rouge_before": 0.0,
        "rouge_after": 0.62,
    },
    {
        "prompt": "Is <b>bold</b> the same as <script>alert('strong')</script> & “quoted”?",
        "teacher": "No. `<b>` only changes the look, `<strong>` says that the text matters.",
        "before": "</p></div><img src=x onerror=alert(1)>",
        "after": "No, `<b>` changes how it looks & `<strong>` what it means.",
        "rouge_before": 0.0,
        "rouge_after": 0.44,
    },
]
STAGES = [
    ("prompts", 1.2, None, None, 310.0),
    ("respond", 118.4, 38_214, 322.7, 1420.5),
    ("teach", 21.7, 48_800, None, 1890.0),
    ("train", 254.9, 61_144, 239.9, 3650.2),
    ("evaluate", 41.3, 8_120, None, 2210.0),
]


def write_run(run_dir: Path, *, seed: int = 0, steps: int = 160) -> Path:
    """Write every file a finished run has, except the report."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    (run_dir / "recipe.resolved.yaml").write_text(RECIPE, encoding="utf-8")
    _lines(run_dir / "metrics.jsonl", _metrics(rng, steps))
    _lines(run_dir / "samples.jsonl", SAMPLES)
    (run_dir / "stages").mkdir(exist_ok=True)
    clock = 1_760_000_000.0
    for stage, seconds, tokens, speed, peak in STAGES:
        manifest = {
            "stage": stage,
            "done": True,
            "fingerprint": f"{rng.integers(1 << 62):016x}",
            "started": clock,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_s": speed,
            "peak_memory_mib": peak,
        }
        (run_dir / "stages" / f"{stage}.json").write_text(json.dumps(manifest))
        clock += seconds
    before, after = _fidelity(rng, kl=2.1, agreement=0.4), _fidelity(rng, kl=0.81, agreement=0.66)
    write_scores(
        run_dir,
        before={"fidelity": before, "rouge": _rouge(rng, 0.16)},
        after={"fidelity": after, "rouge": _rouge(rng, 0.38)},
        seed=seed,
    )
    (run_dir / "student").mkdir(exist_ok=True)
    (run_dir / "student" / "student.json").write_text(json.dumps(_student(rng)))
    (run_dir / "provenance.json").write_text(json.dumps(_provenance()))
    return run_dir


def _lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _metrics(rng, steps):
    tokens, seconds = 0, 0.0
    for step in range(1, steps + 1):
        fresh = int(rng.integers(330, 440))
        speed = 240 + 12 * rng.normal()
        tokens, seconds = tokens + fresh, seconds + fresh / speed
        yield {
            "step": step,
            "epoch": round(2 * step / steps, 4),
            "loss": 0.55 + 1.6 * np.exp(-step / 22) + 0.06 * rng.normal(),
            "learning_rate": 3e-4 * min(1.0, step / 12) * 0.5 * (1 + np.cos(np.pi * step / steps)),
            "grad_norm": float(1.1 + 3 * np.exp(-step / 15) + 0.25 * abs(rng.normal())),
            "tokens": tokens,
            "tokens_per_s": speed,
            "seconds": seconds,
            "forward_kl": 0.4 + 1.2 * np.exp(-step / 22) + 0.05 * rng.normal(),
            "student_entropy": 1.4 + 2.0 * np.exp(-step / 20) + 0.05 * rng.normal(),
            "objective": "fkl",
        }


def _fidelity(rng, *, kl, agreement, examples=44):
    lengths = np.random.default_rng(5).integers(24, 97, examples)
    rows = []
    for n, length in enumerate(lengths):
        entropy = float(rng.normal(1.1, 0.25))
        tv = float(np.clip(rng.normal(0.62 * kl / (kl + 0.8), 0.06), 0.02, 0.98))
        rows.append(
            ScoredRow(
                id=f"p{n}",
                weight=float(length),
                values={
                    "forward_kl": float(kl * rng.gamma(12.0) / 12),
                    "reverse_kl": float(1.2 * kl * rng.gamma(9.0) / 9),
                    "total_variation": tv,
                    "acceptance": 1 - tv,
                    "top1_agreement": float(np.clip(rng.normal(agreement, 0.1), 0, 1)),
                    "student_entropy": entropy + 0.9 * kl * 0.5,
                    "teacher_entropy": 1.12,
                    "student_nll": float(1.05 + kl * rng.gamma(12.0) / 12),
                    "teacher_nll": 1.05,
                },
            )
        )
    return rows


def _rouge(rng, mean, examples=44):
    values = np.clip(rng.normal(mean, 0.14, examples), 0, 1)
    return [ScoredRow(id=f"p{n}", weight=1.0, values={"rouge_l": float(v)}) for n, v in enumerate(values)]


def _student(rng):
    influence = np.abs(rng.normal(0.12, 0.05, 30)) + 0.35 * np.exp(-np.arange(30) / 1.5)
    return {
        "parameters": 92_000_832,
        "teacher_parameters": 134_515_008,
        "size_mb": 368.1,
        "teacher_size_mb": 538.1,
        "teacher_layers": 30,
        "kept_blocks": KEPT,
        "removed_blocks": [13, 16, 4, 25, 12, 17, 14, 3, 26, 15, 5, 18],
        "block_scores": influence.tolist(),
        "criterion": "greedy KL",
    }


def _provenance():
    return {
        "limbeck": "0.1.0",
        "revision": "1e7f0d1a9c",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "accelerate": "1.14.0"},
        "teacher": {
            "name": "smollm2-135m-instruct",
            "architecture": "LlamaForCausalLM",
            "fingerprint": "sha256:" + "9f2c" * 16,
            "license": "apache-2.0",
        },
        "seeds": {"train": 0, "sampling": 0, "bootstrap": 0},
        "hardware": {"cpu": "AMD EPYC", "cores": 2, "memory_gib": 23.4, "gpu": None},
    }


ANSWERS = (
    "Keep a fixed hour for bed and another for rising, also at weekends. Make the room dark, quiet and cool, and leave "
    "the telephone outside. Drink no coffee after noon.",
    "A function that returns the larger of two numbers:\n\ndef larger(a, b):\n    return a if a > b else b",
    "Bees find their way by the sun, by landmarks, and by the smell of the hive.",
)


def write_on_policy(run_dir: Path, *, steps: int = 160, tokenizer: bool = True, seed: int = 1) -> Path:
    """Add to a run what training on the student's own responses leaves: metrics, alarms, responses, a tokenizer."""
    rng = np.random.default_rng(seed)
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    _lines(path, (row | _own_metrics(rng, row["step"] / steps) | _warnings(row["step"], steps) for row in rows))
    _lines(RunDirectory(run_dir).prompts, _prompts())
    run = RunDirectory(run_dir)
    run.rounds.mkdir(exist_ok=True)
    _lines(run.examples, _written(steps))
    if tokenizer:
        _byte_tokenizer().save(str(run_dir / "student" / "tokenizer.json"))
    return run_dir


def _own_metrics(rng, at):
    late = max(0.0, at - 0.6) * 2
    return {
        "responses/count": 8,
        "responses/truncated": float(np.clip(0.2 + late + 0.1 * rng.normal(), 0, 1)),
        "responses/repeated": float(np.clip(0.04 + 0.9 * late + 0.05 * rng.normal(), 0, 1)),
        "responses/empty": 0.0,
        "responses/length": 44 + 50 * late + 6 * rng.normal(),
        "log_q/student": -1.4 + 0.5 * at + 0.08 * rng.normal(),
        "kl_p99": 6.5 - 3 * at + 0.5 * rng.normal(),
        "share": 0.2 + 0.6 * at,
        "alpha/teacher": 0.1 + 0.02 * rng.normal(),
        "alpha/student": 0.12 + 0.1 * at + 0.02 * rng.normal(),
        "beta": 0.5 + 0.5 * at,
    }


def _warnings(step, steps):
    # The first, a step that no alarm is for, comes from a version to come.
    when = {0.5: ["of_tomorrow"], 0.8: ["repetition"], 0.9: ["truncation"], 1.0: ["repetition"]}
    return next(({"warnings": names} for at, names in when.items() if step == round(at * steps)), {})


def _prompts():
    for n, sample in enumerate(SAMPLES):
        yield {"id": f"p{n}", "messages": [{"role": "user", "content": sample["prompt"]}], "split": "train"}


def _written(steps):
    for quarter in range(1, 5):
        for n, answer in enumerate(ANSWERS):
            step = quarter * steps // 4 - 3 + n
            row = {
                "step": step,
                "epoch": 2 * step / steps,
                "prompt_id": f"p{n}",
                "prompt_ids": _bytes("user: " + answer),
            }
            if quarter != 3:
                yield row | {"author": "teacher", "response_ids": [*_bytes(answer), 256], "stop": "eos"}
            said, stop = (
                (answer[: 60 * quarter], "eos") if quarter < 4 else (answer[:40] + " and the bed" * 90, "length")
            )
            said = "" if (n, quarter) == (2, 1) else said
            yield row | {"author": "student", "response_ids": _bytes(said) + [256] * (stop == "eos"), "stop": stop}


def _bytes(text):
    return list(text.encode())


def _byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # The letter that byte-level tokenizers write for each byte.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = {pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(n))[0][0]: n for n in range(128)}
    free = iter(n for n in range(256) if n not in plain.values())
    vocab = {letter: plain[letter] if letter in plain else next(free) for letter in letters}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer
