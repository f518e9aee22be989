"""A real vLLM with SmolLM2: sampling, both signals of a served teacher, runs on them, new weights, the judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import limbeck.models.loading
from limbeck.client.concurrency import concurrently
from limbeck.evaluation.judge.questions import AnswerPair, questions_of
from limbeck.models.heads import head_of, project
from limbeck.models.loading import LoadedModel, load_model
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.prompts.io import read_prompts
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.rollouts.io import read_responses
from limbeck.runtime.append_log import read_log
from limbeck.runtime.rundir import RunDirectory
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.local import LocalTeacher
from limbeck.teachers.served import ServedTeacher
from limbeck.teachers.served_options import OnServer
from limbeck.types import DenseSignal, Response, TokenBatch, TopKSignal
from tests.servers.conftest import Figures, Vllm
from tests.tiny_pair import questions, write_prompts

CPU = torch.device("cpu")
PROMPTS, K = 10, 64


@pytest.fixture(scope="module")
def local(smollm2_dir: Path) -> LocalTeacher:
    loaded = load_model(str(smollm2_dir))
    return LocalTeacher(loaded.model, head_of(loaded.model, len(loaded.tokenizer)))


def opened(vllm: Vllm, model: Path, **options: Any) -> ServedTeacher:
    where = OnServer(**{"base_url": vllm.url, "timeout_s": 600.0, "retries": 0} | options)
    teacher = where.open(TeacherModel(model=str(model)), device=CPU, progress=None)
    teacher.support, teacher.support_k = "topk_tail", K
    return teacher


def texts(model: Path, count: int, length: int) -> list[Response]:
    """Answers of words to questions, none of which is another's beginning."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    rows = []
    for number, question in enumerate(questions(count)):
        turns = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        words = " ".join(f"{text} It is {number}." for text in questions(24)[number % 8 :])
        said = tokenizer(f"Number {number}: {words}")["input_ids"][:length]
        rows.append(
            Response(
                prompt_id=f"p{number}",
                author="data",
                prompt_ids=tuple(asked),
                response_ids=tuple(said),
                stop="length",
            )
        )
    return rows


def batch_of(rows: Sequence[Response]) -> TokenBatch:
    return collate(rows, range(len(rows)), pad_id=0)


def log_p(signal: DenseSignal) -> torch.Tensor:
    return project(signal.head, signal.hidden_ND).double().log_softmax(-1)


def require_local_states(
    teacher: ServedTeacher, batch: TokenBatch, expected: torch.Tensor, figures: Figures, what: str
) -> DenseSignal:
    """What a server gives of a batch, asked twice: the log-probabilities that are expected."""
    for again in ("", ", asked again"):
        said = teacher.signal(batch)
        assert isinstance(said, DenseSignal)
        kl_N = (expected.exp() * (expected - log_p(said))).sum(1)
        figures.note(
            f"{what}: KL to the local signal over {len(kl_N)} tokens{again}",
            f"mean {kl_N.mean():.1e}, largest {kl_N.max():.1e} nats",
        )
        assert kl_N.mean() <= 1e-6
    return said


def test_hidden_states_are_those_of_the_model_here(
    vllm: Vllm, local: LocalTeacher, smollm2_dir: Path, figures: Figures
) -> None:
    """Asked twice: the second time the server has the prompts in its cache."""
    batch = batch_of(texts(smollm2_dir, 4, 40))
    teacher = opened(vllm, smollm2_dir, gives="hidden")
    teacher.reach()
    require_local_states(teacher, batch, log_p(local.signal(batch)), figures, "hidden states")
    # The comparison at the beginning leaves none of its own either.
    assert not list(vllm.states.iterdir())


def test_likeliest_tokens_are_those_of_the_model_here(
    vllm: Vllm, local: LocalTeacher, smollm2_dir: Path, figures: Figures
) -> None:
    batch = batch_of(texts(smollm2_dir, 2, 24))
    said = opened(vllm, smollm2_dir).signal(batch)
    assert isinstance(said, TopKSignal)
    gap = (said.logp_NK - log_p(local.signal(batch)).gather(1, said.ids_NK)).abs().max().item()
    figures.note(f"top-k, k = {K}: largest difference of a log-probability from the local one", f"{gap:.1e} nats")
    assert gap < 1e-3


def test_scoring_keeps_up_with_the_server(vllm: Vllm, smollm2_dir: Path, figures: Figures) -> None:
    """Tokens a second beside the same requests whose answers are thrown away unread, in turns."""
    rows = texts(smollm2_dir, 8, 48)
    teacher = opened(vllm, smollm2_dir, concurrency=8)
    teacher.reach()
    tokens = sum(row.tokens for row in rows)
    bodies = [
        {
            "model": "teacher",
            "prompt": [*row.prompt_ids, *row.response_ids],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": K,
        }
        for row in rows
    ]
    spent, sizes = {"server": 0.0, "limbeck": 0.0}, [0]
    for _ in range(3):
        began = time.perf_counter()
        sizes = [len(reply) for reply in concurrently(lambda body: vllm.post("/v1/completions", body), bodies, 8)]
        spent["server"] += time.perf_counter() - began
        began = time.perf_counter()
        teacher.signal(batch_of(rows))
        spent["limbeck"] += time.perf_counter() - began
    rates = {who: 3 * tokens / seconds for who, seconds in spent.items()}
    figures.note(
        f"top-k, k = {K}: response tokens a second, 8 at a time, three turns each",
        f"the server's own {rates['server']:.0f}, limbeck's {rates['limbeck']:.0f} "
        f"({rates['limbeck'] / rates['server']:.0%}); {sum(sizes) / tokens:.0f} bytes a response token",
    )
    assert rates["limbeck"] >= 0.9 * rates["server"]


def test_greedy_answers_are_those_of_the_model_here(
    vllm: Vllm, smollm2_dir: Path, tmp_path: Path, figures: Figures
) -> None:
    written = []
    for name, server in (("there", {"base_url": vllm.url, "timeout_s": 600.0}), ("here", None)):
        tree = {
            "name": name,
            "output_dir": str(tmp_path / name),
            "teacher": {"model": str(smollm2_dir)},
            "student": {"init": "depth_prune", "layers": 2},
            "prompts": {"source": str(prompts(tmp_path)), "eval_fraction": 0.2},
            "responses": {"source": "teacher", "temperature": 0.0, "max_new_tokens": 16, "server": server},
            "objective": {"name": "fkl"},
        }
        run = run_pipeline(load_recipe(tree), stages=STAGES, until="respond")
        written.append(read_responses(run.responses / "teacher.jsonl"))
    there, here = written
    same = sum(one.response_ids == other.response_ids for one, other in zip(there, here, strict=True))
    record = (RunDirectory(tmp_path / "there").manifest("respond") or {})["server"]
    figures.note(
        "sampling: greedy answers of 16 tokens that are the local ones",
        f"{same} of {len(here)}; {record['reencoded_from_text']} read again from text",
    )
    assert same >= len(here) - 1 and record["reencoded_from_text"] == 0


def prompts(folder: Path) -> Path:
    rows = [{"prompt": text, "completion": f"An answer to: {text}"} for text in questions(PROMPTS)]
    return write_prompts(folder / "prompts.jsonl", rows)


COMMON = (
    "sft=null",
    "student={init: pretrained, layers: null, freeze_embeddings: true}",
    "responses.max_new_tokens=8",
    "train.max_steps=3",
    "train.per_device_train_batch_size=2",
    "train.learning_rate=0.001",
    "train.warmup_steps=0",
    "train.eval_steps=null",
    "train.compile=off",
    "evaluate.max_new_tokens=4",
)
SOURCES = {
    "kd": ("responses.source=data",),
    "gkd": ("responses.initial_author=data",),
    # The answers of the other side of each pair are the data's: a served teacher writes none in a round.
    "distillm2": (
        "responses.source={name: pairs, refresh: epoch, resample_teacher: false}",
        "responses.initial_author=data",
    ),
}


@dataclass
class Losses:
    """What a run lost with a teacher behind a server and with one in this process.

    Attributes:
        apart: largest relative difference of a step.
        steps: of each run.
        loads: how often the teacher's weights were read, by the name of the side.
    """

    apart: float
    steps: int
    loads: dict[str, int]

    def note(self, figures: Figures, what: str) -> None:
        figures.note(
            f"{what}: losses of {self.steps} steps, largest relative difference from a local teacher's",
            f"{self.apart:.1e}; the teacher was loaded {self.loads['served']} times ({self.loads['local']} locally)",
        )


def losses_of(
    url: str, smollm2: Path, student: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> Losses:
    loads: list[str] = []
    whole = limbeck.models.loading.load_model

    def counted(name: str | Path, **options: Any) -> Any:
        loads.append(str(name))
        return whole(name, **options)

    monkeypatch.setattr(limbeck.models.loading, "load_model", counted)
    losses, of_teacher = {}, {}
    served = json.dumps({"name": "server", "base_url": url, "timeout_s": 600.0})
    for where in ("in_process", served):
        loads.clear()
        side = "local" if where == "in_process" else "served"
        overrides = [*COMMON, *SOURCES[recipe], f"student.model={student}", f"teacher.model={smollm2}"]
        overrides += [f"output_dir={folder / side}", f"teacher.where={where}"]
        overrides += ["evaluate.groups=[fidelity]", f"prompts={{source: {prompts(folder)}, eval_fraction: 0.2}}"]
        run = run_pipeline(load_recipe(recipe, overrides), stages=STAGES)
        rows = [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]
        losses[side] = [row["loss"] for row in rows if "loss" in row]
        of_teacher[side] = loads.count(str(smollm2))
    apart = max(abs(a / b - 1) for a, b in zip(losses["served"], losses["local"], strict=True))
    return Losses(apart=apart, steps=len(losses["local"]), loads=of_teacher)


def require_equal_losses(found: Losses) -> None:
    """The losses of three steps, without loading the teacher beside a server."""
    assert found.steps == 3 and found.apart <= 1e-4
    assert found.loads["served"] == 0 < found.loads["local"]


@pytest.mark.parametrize("recipe", SOURCES)
def test_losses_are_those_of_a_teacher_in_this_process(
    vllm: Vllm,
    smollm2_dir: Path,
    student: Path,
    tmp_path: Path,
    figures: Figures,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
) -> None:
    found = losses_of(vllm.url, smollm2_dir, student, tmp_path, monkeypatch, recipe)
    found.note(figures, f"`{recipe}`")
    require_equal_losses(found)


def p_of_letters(loaded: LoadedModel, question: str) -> dict[str, float]:
    """Probabilities of A and B as the first token of an answer; tokens with a space among them, as a judge is read."""
    tokenizer: Any = loaded.tokenizer
    turns = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        top = loaded.model(torch.tensor([ids])).logits[0, -1].double().softmax(0).topk(20)
    said = [(tokenizer.decode([place]).strip(), p) for p, place in zip(*map(torch.Tensor.tolist, top), strict=True)]
    return {letter: sum(p for text, p in said if text == letter) for letter in "AB"}


def test_it_judges(vllm: Vllm, smollm2_dir: Path, student: Path, tmp_path: Path, figures: Figures) -> None:
    """By its letters, as a model of this size ends no reasons with a verdict: a verdict on every pair."""
    judge = json.dumps({"base_url": vllm.url, "against": "references", "verdict": "logprobs", "timeout_s": 600.0})
    overrides = [*COMMON, *SOURCES["kd"], f"student.model={student}", f"teacher.model={smollm2_dir}"]
    overrides += [f"output_dir={tmp_path / 'run'}", "teacher.where=none", "objective={name: ce}", "train.max_steps=1"]
    overrides += [f"evaluate.groups={{judge: {judge}}}", "teacher.cache=false"]
    overrides += [f"prompts={{source: {prompts(tmp_path)}, eval_fraction: 0.2}}"]
    run = run_pipeline(load_recipe("kd", overrides), stages=STAGES)
    heldout = [row for row in read_prompts(run.prompts) if row.split == "heldout"]
    judged = {entry["key"]: entry["opinion"] for _, entry in read_log(run.root / "judgements.jsonl")}
    loaded, gaps = load_model(str(smollm2_dir)), list[float]()
    lines = [json.loads(line) for line in (run.scores / "after.judge.pairs.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        pair = AnswerPair(
            id=line["question_id"], request=line["prompt"], student=line["answer_1"], other=line["answer_2"]
        )
        for question in questions_of([pair], "teacher", "logprobs")[0]:
            found = judged[question.key]["probabilities"]
            gaps += [abs(found[letter] - p) for letter, p in p_of_letters(loaded, question.text).items()]
    read = [opinion for opinion in judged.values() if opinion["verdict"]]
    figures.note(
        f"judge: verdicts by log-probabilities on {len(heldout)} pairs in both orders",
        f"{len(read)} of {len(judged)}; largest difference of a letter's probability from the local one "
        f"{max(gaps):.1e}",
    )
    assert len(lines) == len(heldout) > 0 and len(read) == len(judged)
    assert json.loads((run.root / "scores.json").read_text("utf-8"))["after"]["win_rate_references"]["n"] == len(lines)
    assert max(gaps) < 1e-2


def test_new_weights_are_what_it_scores_with(
    vllm: Vllm, local: LocalTeacher, smollm2_dir: Path, tmp_path: Path, figures: Figures
) -> None:
    loaded = load_model(str(smollm2_dir))
    with torch.no_grad():
        loaded.model.get_submodule("model.layers.3.mlp.down_proj").weight.mul_(1.5)  # type: ignore[operator]
    loaded.model.save_pretrained(tmp_path / "other")
    loaded.tokenizer.save_pretrained(tmp_path / "other")
    changed = LocalTeacher(loaded.model, head_of(loaded.model, len(loaded.tokenizer)))
    batch = batch_of(texts(smollm2_dir, 1, 24))

    def reload(folder: Path) -> float:
        began = time.perf_counter()
        vllm.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        vllm.post("/reset_prefix_cache", {})
        return time.perf_counter() - began

    gap: Callable[[LocalTeacher], float] = lambda teacher: (  # noqa: E731
        (log_p(opened_signal(vllm, smollm2_dir, batch)) - log_p(teacher.signal(batch))).abs().max().item()
    )
    seconds = reload(tmp_path / "other")
    there = gap(changed), gap(local)
    reload(smollm2_dir)
    back = gap(local)
    figures.note(
        "new weights: largest difference of a log-probability from those weights here, and after the way back",
        f"{there[0]:.1e} and {back:.1e} nats ({there[1]:.2g} from the other weights); {seconds:.1f} s",
    )
    assert max(there[0], back) < 1e-2 < there[1]


def opened_signal(vllm: Vllm, model: Path, batch: TokenBatch) -> DenseSignal:
    signal = opened(vllm, model, gives="hidden").signal(batch)
    assert isinstance(signal, DenseSignal)
    return signal
