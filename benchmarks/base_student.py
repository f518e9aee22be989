"""Does a base student of an instruct teacher stop where it was taught to, after 100 steps?

    python -m benchmarks.base_student --out /tmp/base-student

SmolLM2-135M-Instruct teaches a copy of itself cut to 18 blocks that has the tokenizer files of the base model: no chat
template, <|endoftext|> as the end. The prompts are the built-in ones with "Answer in one short sentence.", so that most
answers of the teacher end. Then plain transformers, with nothing but the student's folder, answers 40 prompts that no
step has seen, and so does llama.cpp with the exported file. What ends is counted beside what the teacher ends and what
the student ended before: as it came, and with the teacher's files around its untrained weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from limbeck import run
from limbeck.export import export_model
from limbeck.models.assets import fetch
from limbeck.prompts.sources import load_prompts

TEACHER = "smollm2-135m-instruct"
BASE_END, END = "<|endoftext|>", "<|im_end|>"
SUFFIX = " Answer in one short sentence."
HELD_OUT = 40
# At most, of an answer that is trained on, and of one that is counted.
TAUGHT_TOKENS, NEW_TOKENS = 128, 128
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
WAYS: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "temperature 0.8, top-p 0.95": SAMPLED}
LAYERS = 18


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Of so many answers, how many ended, and how."""

    what: str
    way: str
    ended: int
    answers: int
    tokens: float

    def row(self) -> str:
        return f"| {self.what} | {self.way} | {self.ended} of {self.answers} | {self.tokens:.0f} |"


def as_base(folder: Path) -> Path:
    """A copy of the teacher's folder with the tokenizer files and ends of the base model."""
    from transformers import AutoTokenizer

    shutil.copytree(fetch(TEACHER), folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    for role in ("bos_token", "eos_token", "unk_token"):
        setattr(tokenizer, role, BASE_END)
    tokenizer.pad_token = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((folder / name).read_text("utf-8"))
        told |= dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
        told.pop("pad_token_id")
        (folder / name).write_text(json.dumps(told), "utf-8")
    return folder


def written_prompts(folder: Path, train: int) -> tuple[Path, list[str]]:
    """The training prompts as a file, and those that are kept from it."""
    loaded = load_prompts("builtin", heldout_fraction=0.1).prompts
    texts = [f"{prompt.text}{SUFFIX}" for prompt in loaded if prompt.text]
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in texts[HELD_OUT : HELD_OUT + train]), "utf-8"
    )
    return path, texts[:HELD_OUT]


def recipe(folder: Path, base: Path, prompts: Path, steps: int) -> dict[str, Any]:
    return {
        "name": "base-student",
        "output_dir": str(folder / "run"),
        "teacher": {"model": TEACHER},
        "student": {"init": "depth_prune", "model": str(base), "layers": LAYERS, "freeze_embeddings": True},
        "prompts": {"source": str(prompts), "eval_fraction": 0.1},
        "responses": {"source": "teacher", "max_new_tokens": TAUGHT_TOKENS, "temperature": 0.2, "top_p": 0.9},
        "objective": {"name": "fkl"},
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 6.0e-4,
            "warmup_steps": 10,
            "save_steps": 50,
            "save_total_limit": 1,
        },
        "evaluate": {"groups": ["fidelity"]},
    }


def ends(what: str, folder: Path, asked: Sequence[str], ways: Sequence[str] = ("greedy",)) -> list[Counted]:
    """With plain transformers and the folder alone: what ends with the teacher's end of turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    if tokenizer.chat_template is None:
        # Somebody who knows the teacher's format can write it by hand; where to stop is still the folder's business.
        tokenizer.chat_template = AutoTokenizer.from_pretrained(fetch(TEACHER)).chat_template
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    turns = [[{"role": "user", "content": text}] for text in asked]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    found = []
    for way in ways:
        torch.manual_seed(0)
        with torch.inference_mode():
            written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **WAYS[way])
        found.append(_counted(what, way, written[:, inputs["input_ids"].shape[1] :].tolist(), tokenizer))
    return found


def _counted(what: str, way: str, answers: list[list[int]], tokenizer: Any) -> Counted:
    """An answer has ended where its end is followed by padding or by nothing at all."""
    end, ended, lengths = tokenizer.convert_tokens_to_ids(END), 0, []
    for ids in answers:
        place = ids.index(end) if end in ids else None
        stopped = place is not None and all(i in (end, tokenizer.pad_token_id) for i in ids[place:])
        ended += stopped and (place or 0) < NEW_TOKENS
        lengths.append(place + 1 if stopped and place is not None else len(ids))
    return Counted(what=what, way=way, ended=ended, answers=len(answers), tokens=sum(lengths) / len(lengths))


SERVE = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.use_jinja = sys.argv[1], 1024, True
server = xllamacpp.Server(params)
for line in sys.stdin:
    print("said", json.dumps(server.handle_chat_completions(json.loads(line))), flush=True)
"""


def llama_cpp_ends(what: str, file: Path, asked: Sequence[str]) -> Counted:
    """The same with llama.cpp and the exported file, greedy."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    ended, tokens = 0, 0
    for text in asked:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": NEW_TOKENS, "temperature": 0.0}
        process.stdin.write(json.dumps(body) + "\n")
        process.stdin.flush()
        line = next(line for line in process.stdout if line.startswith("said"))
        said = json.loads(line.removeprefix("said"))
        ended += said["choices"][0]["finish_reason"] == "stop"
        tokens += said["usage"]["completion_tokens"]
    process.stdin.close()
    process.wait(60)
    return Counted(what=what, way="greedy, llama.cpp", ended=ended, answers=len(asked), tokens=tokens / len(asked))


def with_files_of(student: Path, base: Path, folder: Path) -> Path:
    """The student's weights with the ends and the template of the base model: what was saved before."""
    shutil.copytree(student, folder)
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(base / name, folder / name)
    return folder


def measure(folder: Path, *, steps: int, train: int) -> list[Counted]:
    base = as_base(folder / "base")
    prompts, asked = written_prompts(folder, train)
    student = run(recipe(folder, base, prompts, steps)).student
    old = with_files_of(student, base, folder / "old")
    found = ends("the teacher", fetch(TEACHER), asked)
    found += ends(f"the student after {steps} steps", student, asked, tuple(WAYS))
    found += ends("the same weights with the base model's files", old, asked)
    exported = export_model(str(student.parent), folder / "gguf", format="gguf", dtype="float32")
    return [*found, llama_cpp_ends(f"the student after {steps} steps", exported.file, asked)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/base-student"), help="a new folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train", type=int, default=400, help="prompts of the run")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True)
    started = time.time()
    found = measure(chosen.out, steps=chosen.steps, train=chosen.train)
    print("| who | how | ended with <|im_end|> | mean tokens |\n|---|---|---:|---:|")
    print("\n".join(counted.row() for counted in found))
    print(f"\n{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()
