"""Students that see, by objective: a tiny pair is trained from scratch on drawn pictures, a program judges the answers.

    python -m benchmarks.vision --out runs/vision
    python -m benchmarks.vision --out runs/vision --table

Pictures show one to three squares, discs or bars in one of four colours; questions ask for colour, shape or number. A
LLaVA of 2 blocks learns them from the right answers. A student of 1 narrow block under the teacher's vision tower,
which stays frozen, learns from fewer questions, by each objective at equal steps, with three seeds. An answer is right
where it is the right word and ends. Each result is a file of its own, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck import run
from limbeck.models.loading import load_model
from limbeck.models.vision import bind_images
from limbeck.models.vocabulary import real_vocab_size
from limbeck.prompts.io import read_prompts
from limbeck.prompts.templates import encode_prompts, end_token_ids
from limbeck.runtime.memory import peak_memory_mib
from limbeck.sampling.local import LocalSampler
from limbeck.types import Prompt, Sampling
from tests.tiny_vision import write_questions, write_vision_model

TAUGHT, ASKED = 4000, 300
SEEDS = (0, 1, 2)
CE, TEACHER = {"name": "ce"}, {"responses": {"source": "teacher", "temperature": 1.0}}
# What the student learns from, and how: sections merged over `student_recipe`.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "sft": {"responses": {"source": "data"}, "objective": CE, "teacher": {"cache": False}},
    "seqkd": {**TEACHER, "objective": CE, "teacher": {"cache": False}},
    "fkl": {**TEACHER, "objective": {"name": "fkl"}},
    "rkl": {**TEACHER, "objective": {"name": "rkl"}},
    "skl": {**TEACHER, "objective": {"name": "skl"}},
    "fkl on the data's answers": {"responses": {"source": "data"}, "objective": {"name": "fkl"}},
    "fkl on policy": {"responses": {"source": "student"}, "objective": {"name": "fkl"}},
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Steps and sizes; the cut-down one is for a test."""

    taught: int = TAUGHT
    asked: int = ASKED
    teacher_steps: int = 1400
    student_steps: int = 400
    width: int = 64
    rows: int = 32
    # Of the teacher: how wide its fresh weights are spread, and its learning rate.
    spread: float = 0.02
    rate: float = 1.0e-3


def merged(tree: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    return {**tree, **{name: {**tree.get(name, {}), **section} for name, section in sections.items()}}


def common(folder: Path, name: str, questions: Path, size: Size, *, steps: int, rate: float) -> dict[str, Any]:
    return {
        "name": name,
        "output_dir": str(folder / name),
        "prompts": {"source": str(questions), "eval_fraction": 0.1},
        "responses": {"source": "data", "max_new_tokens": 3, "batch_size": 64},
        "objective": {"name": "ce"},
        "train": {
            "max_steps": steps,
            "num_train_epochs": 1000.0,
            "per_device_train_batch_size": size.rows,
            "learning_rate": rate,
            "warmup_steps": min(50, steps // 5),
            "save_steps": 100,
            "save_total_limit": 1,
            "compile": "off",
        },
        "evaluate": {"max_new_tokens": 3, "samples": 2, "groups": ["nll"]},
    }


def teach(folder: Path, size: Size) -> Path:
    """The teacher, trained from scratch on the right answers."""
    questions = folder / "taught" / "questions.jsonl"
    if not questions.exists():
        write_questions(folder / "taught", size.taught, seed=1)
    blank = folder / "blank"
    if not (blank / "config.json").exists():
        write_vision_model(blank, "llava", width=size.width, layers=2, spread=size.spread)
    tree = common(folder, "teacher", questions, size, steps=size.teacher_steps, rate=size.rate)
    run(
        tree
        | {
            "teacher": {"model": str(blank), "where": "none", "cache": False},
            "student": {"model": str(blank), "init": "scratch", "freeze_vision": False},
        }
    )
    return folder / "teacher" / "student"


def blank_student(folder: Path, teacher: Path, size: Size, seed: int) -> Path:
    """A narrow model of one block with the teacher's vision tower."""
    target = folder / f"blank-{seed}"
    if (target / "config.json").exists():
        return target
    written = write_vision_model(
        folder / f".blank-{seed}",
        "llava",
        width=size.width // 4,
        eyes=size.width,
        layers=1,
        spread=0.02,
        seed=seed + 10,
    )
    student: Any = load_model(written).model
    seeing: Any = load_model(teacher).model
    student.base_model.vision_tower.load_state_dict(seeing.base_model.vision_tower.state_dict())
    student.save_pretrained(written)
    written.replace(target)
    return target


def student_recipe(folder: Path, teacher: Path, arm: str, seed: int, size: Size) -> dict[str, Any]:
    name = f"{arm.replace(' ', '-').replace(chr(39), '')}-{seed}"
    questions = folder / "distilled" / "questions.jsonl"
    if not questions.exists():
        write_questions(folder / "distilled", size.taught // 4, seed=2)
    tree = common(folder, name, questions, size, steps=size.student_steps, rate=3.0e-3) | {
        "teacher": {"model": str(teacher)},
        "student": {"model": str(blank_student(folder, teacher, size, seed))},
    }
    tree = merged(tree, {"train": {"seed": seed}, "responses": {"seed": seed}})
    tree = merged(tree, {name: section for name, section in ARMS[arm].items() if name != "objective"})
    return tree | {"objective": ARMS[arm]["objective"]}


def accuracy(model_folder: Path, prompts: Sequence[Prompt], images: Path) -> float:
    """Share of the questions whose answer, greedy, is the right word and ends."""
    loaded: Any = load_model(model_folder)
    bind_images(loaded.model, images)
    sampler = LocalSampler(
        model=loaded.model,
        eos_token_ids=end_token_ids(loaded.tokenizer, "chat"),
        pad_token_id=int(loaded.tokenizer.pad_token_id),
        vocab_size=real_vocab_size(loaded.tokenizer),
        author="student",
        batch_size=128,
    )
    asked = encode_prompts(prompts, loaded.tokenizer)
    answers = sampler.respond(asked, Sampling(max_new_tokens=3, temperature=0.0))
    told = [loaded.tokenizer.decode(a.response_ids, skip_special_tokens=True).strip() for a in answers]
    right = [a.stop == "eos" and said == p.completion for a, said, p in zip(answers, told, prompts, strict=True)]
    return sum(right) / len(right)


def unseen(folder: Path, size: Size) -> tuple[list[Prompt], Path]:
    """Questions about pictures that no step has seen, and the folder of these pictures."""
    from limbeck.models.images import ImageFolder
    from limbeck.prompts.images import RowImages
    from limbeck.prompts.io import write_prompts
    from limbeck.prompts.sources import load_prompts

    path = folder / "asked" / "prompts.jsonl"
    if not path.exists():
        questions = write_questions(folder / "asked", size.asked, seed=3)
        images = RowImages(ImageFolder(folder / "asked" / "images"))
        write_prompts(path, load_prompts(str(questions), heldout_fraction=1.0, images=images).prompts)
    return read_prompts(path), folder / "asked" / "images"


def measure(folder: Path, arms: Sequence[str], seeds: Sequence[int], size: Size, most: int | None = None) -> None:
    """Every result that is not there yet, or so many of them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prompts, images = unseen(folder, size)
    teacher = teach(folder, size)
    for arm, seed in [("teacher", 0), *((arm, seed) for seed in seeds for arm in arms)]:
        result = folder / f"result-{arm.replace(' ', '-').replace(chr(39), '')}-{seed}.json"
        if result.exists():
            continue
        if most is not None and (most := most - 1) < 0:
            return
        started, trained = time.process_time(), teacher
        if arm != "teacher":
            trained = run(student_recipe(folder, teacher, arm, seed, size)).student
        found = {
            "arm": arm,
            "seed": seed,
            "accuracy": accuracy(trained, prompts, images),
            "cpu_seconds": time.process_time() - started,
            "peak_mib": peak_memory_mib(),
        }
        result.write_text(json.dumps(found), "utf-8")
        print(json.dumps(found), flush=True)


def results(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for path in sorted(folder.glob("result-*.json")):
        one = json.loads(path.read_text("utf-8"))
        found.setdefault(one["arm"], []).append(one["accuracy"])
    return found


def table(folder: Path) -> str:
    """The results as the page has them: mean over seeds, each seed, the share of the teacher's accuracy."""
    found = results(folder)
    best = statistics.mean(found["teacher"])
    lines = ["| learnt from, by | accuracy | each seed | share of the teacher's |", "|---|---|---|---|"]
    lines.append(f"| the teacher | {best:.1%} | | |")
    for arm in [arm for arm in ARMS if arm in found]:
        mean, each = statistics.mean(found[arm]), ", ".join(f"{one:.1%}" for one in found[arm])
        lines.append(f"| {arm} | {mean:.1%} | {each} | {mean / best:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vision"))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--most", type=int, help="measure so many results and stop; the same command goes on")
    parser.add_argument("--table", action="store_true", help="print what is there and measure nothing")
    options = parser.parse_args()
    if not options.table:
        measure(options.out, options.arms, options.seeds, Size(), options.most)
    print(table(options.out))


if __name__ == "__main__":
    main()
