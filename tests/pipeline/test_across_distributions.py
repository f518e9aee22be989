"""A teacher with other tokens whose distributions are used: `teacher.across`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.pipeline.across import in_shared_tokens
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import open_teacher
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.teachers.across import AcrossTeacher
from limbeck.types import LimbeckError, SharedSignal
from tests.limbeck_command import CommandServer, KillAt
from tests.teachers.alignment.tokenizers_at_hand import sentencepiece
from tests.tiny_pair import TOPICS, TinyPair, write_model, write_prompts

GEMMA = (
    "{% for m in messages %}{{ '<bos>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>model\n' }}{% endif %}"
)
GROUPS = ["rouge", "nll"]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A sentencepiece teacher with a template of its own, and prompts."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = sentencepiece()
    model = write_model(folder / "teacher", head_rows=len(tokenizer) + 3, window=256)
    tokenizer.chat_template = GEMMA
    tokenizer.save_pretrained(model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    return TinyPair(teacher=model, prompts=write_prompts(folder / "prompts.jsonl"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("student") / "student", layers=2, seed=3)


def tree_of(pair: TinyPair, student: Path, out: Path, **sections: Any) -> dict[str, Any]:
    across = {"model": str(pair.teacher), "across": {}}
    tree = pair.tree(
        out,
        student={"init": "pretrained", "model": str(student), "layers": None},
        evaluate={"groups": GROUPS, "max_new_tokens": 8, "samples": 2},
        teacher=across | sections.pop("teacher", {}),
        **sections,
    )
    return tree


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def offline(foreign: TinyPair, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on the teacher's answers."""
    run = tmp_path_factory.mktemp("offline") / "run"
    run_pipeline(load_recipe(tree_of(foreign, student, run)), stages=STAGES)
    return run


def test_the_student_learns_the_teachers_distributions(offline: Path, foreign: TinyPair) -> None:
    rows = metrics(offline)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(0.3 < row["aligned"] < 1 for row in rows)
    assert all(0 < row["teacher_kept"] < 1 and 0 < row["student_kept"] < 1 for row in rows)
    own = AutoTokenizer.from_pretrained(offline / "student")
    assert own.eos_token == "<|im_end|>"


def test_the_states_are_those_of_the_teachers_own_prompt_and_tokens(
    offline: Path, foreign: TinyPair, student: Path
) -> None:
    """At an aligned position the signal is what the teacher says behind its own prompt and the same text."""
    context = RunContext(load_recipe(tree_of(foreign, student, offline)))
    responses = list(load_responses(context, "train").values())[:6]
    found = in_shared_tokens(context, open_teacher(context)).signal(collate(responses, range(6), pad_id=0))
    assert isinstance(found, SharedSignal) and isinstance(context.teacher, AcrossTeacher)
    model = AutoModelForCausalLM.from_pretrained(foreign.teacher).eval()
    theirs, own = AutoTokenizer.from_pretrained(foreign.teacher), AutoTokenizer.from_pretrained(student)
    written = (offline / "prompts.jsonl").read_text("utf-8").splitlines()
    texts = {row["id"]: row["text"] for row in map(json.loads, written)}
    start, compared = 0, 0
    for response in responses:
        turns = [{"role": "user", "content": texts[response.prompt_id]}]
        prompt = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = list(response.response_ids)
        for i, index in enumerate(ids):
            if not found.aligned_N[start + i]:
                continue
            before = own.decode(ids[:i])
            if "\ufffd" in before:
                continue
            read = theirs(prompt + before, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits_V = model(input_ids=torch.tensor([read])).logits[0, -1, : len(theirs)]
            logits_S = found.hidden_ND[start + i] @ found.head.weight_VD.T
            piece = context.teacher.readings.aligner.shared.teacher_of[index]
            place = found.student_ids_S.tolist().index(index)
            torch.testing.assert_close(
                logits_S.log_softmax(-1)[place], logits_V.log_softmax(-1)[piece], rtol=1e-3, atol=1e-4
            )
            compared += 1
        start += len(ids)
    assert compared > 5


def test_without_a_cache_the_losses_are_the_same(
    offline: Path, foreign: TinyPair, student: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_pipeline(load_recipe(tree_of(foreign, student, run, teacher={"cache": False})), stages=STAGES, until="train")
    for one, other in zip(metrics(run), metrics(offline), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one["aligned"] == other["aligned"]


@pytest.mark.parametrize("author", ["student", "data"])
def test_other_authors(foreign: TinyPair, student: Path, tmp_path: Path, author: str) -> None:
    run = tmp_path / "run"
    rows = [
        {"prompt": f"What is {topic}?", "completion": f"It is {topic}, or nearly so: a thing of 🍵 and é."}
        for topic in TOPICS
    ]
    source = str(write_prompts(tmp_path / "prompts.jsonl", rows))
    sections = {
        "responses": {"source": author, "max_new_tokens": 24},
        "prompts": {"source": source},
        "objective": {"name": "rkl", "temperature": 1.0},
        "train": {"max_steps": 4},
    }
    run_pipeline(load_recipe(tree_of(foreign, student, run, **sections)), stages=STAGES)
    assert all(0.1 < row["aligned"] < 1 for row in metrics(run))
    assert (run / "report.html").exists()


def test_cross_entropy_beside_a_teacher_with_other_tokens(foreign: TinyPair, student: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sections = {"objective": {"name": "ce", "temperature": 1.0}, "teacher": {"cache": False}}
    run_pipeline(load_recipe(tree_of(foreign, student, run, **sections)), stages=STAGES, until="train")
    assert all(row["loss"] > 0 and "aligned" not in row for row in metrics(run))


def test_labels_count_everywhere(foreign: TinyPair, student: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    parts = [{"name": "csd", "weight": 0.5}, {"name": "ce", "weight": 0.5}]
    sections = {
        "objective": {"name": "sum", "options": {"parts": parts}, "temperature": 1.0},
        "teacher": {"across": {"outside": "renormalised"}},
    }
    tree = tree_of(foreign, student, run, **sections)
    run_pipeline(load_recipe(tree), stages=STAGES, until="train")
    last = metrics(run)[-1]
    assert last["loss/ce"] > 0 and last["loss/csd"] > 0


@pytest.mark.parametrize("author", ["teacher", "student"])
def test_killed_it_goes_on_as_if_nothing_had_been(
    limbeck: CommandServer, foreign: TinyPair, student: Path, tmp_path: Path, author: str
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    sections = {"responses": {"source": author}, "train": {"max_steps": 4}}
    for out in (whole, run):
        path = out.with_suffix(".json")
        path.write_text(json.dumps(tree_of(foreign, student, out, **sections)), "utf-8")
        path.rename(out.with_suffix(".yaml"))
    assert limbeck.run("run", whole.with_suffix(".yaml")).code == 0
    for name, before in (("signal/hidden.safetensors", 0), ("checkpoints/step-000002", 0)):
        killed = limbeck.run("run", run.with_suffix(".yaml"), killed=KillAt(run, name, before))
        assert killed.code == -signal.SIGKILL, (name, killed.stderr)
    finished = limbeck.run("run", run.with_suffix(".yaml"))
    assert finished.code == 0, finished.stderr
    mine, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (run / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teacher.across=null", "learns from text alone: set .*teacher.across={}"),
        ("responses.source=speculative", "set responses.source=student"),
        ("evaluate.groups=[fidelity, rouge]", r"set evaluate.groups=\[rouge, nll\]"),
        ("teacher.support=topk_tail", "set teacher.support=full"),
        ("teacher.across.merged=chain", "set teacher.cache=false"),
        ("objective.name=csd", "teacher.across.outside=renormalised"),
        ("teacher.across.outside=else", "teacher.across.outside"),
    ],
)
def test_what_does_not_go_is_refused_before_anything_works(
    foreign: TinyPair, student: Path, tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(LimbeckError, match=said) as caught:
        run_pipeline(load_recipe(tree_of(foreign, student, tmp_path / "run"), [override]), stages=STAGES)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_pair_with_the_same_tokens_is_refused(tiny: TinyPair, tmp_path: Path) -> None:
    recipe = load_recipe(tiny.tree(tmp_path / "run", teacher={"across": {}}))
    with pytest.raises(LimbeckError, match="have the same; leave teacher"):
        run_pipeline(recipe, stages=STAGES)


def test_a_conversation_with_earlier_answers_is_refused(foreign: TinyPair, student: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    source = write_prompts(
        tmp_path / "p.jsonl",
        [{"messages": [*turns[:1], {"role": "assistant", "content": str(i)}, *turns[2:]]} for i in range(16)],
    )
    sections = {"prompts": {"source": str(source)}, "responses": {"source": "data"}}
    with pytest.raises(LimbeckError, match="set prompts"):
        run_pipeline(load_recipe(tree_of(foreign, student, tmp_path / "run", **sections)), stages=STAGES)


def test_doctor_foresees_the_share(limbeck: CommandServer, foreign: TinyPair, student: Path) -> None:
    found = limbeck.run("doctor", foreign.teacher, student, "--prompts", foreign.prompts)
    said = " ".join(found.stdout.split())
    assert found.code == 1 and "with teacher.across={} the two are compared where their tokens coincide" in said
    assert f"on 24 texts of {foreign.prompts}" in said.replace("- ", "-") or "on 24 texts of" in said


def test_tokens_of_one_side_are_compared_by_rank(foreign: TinyPair, student: Path, tmp_path: Path) -> None:
    sections = {"teacher": {"across": {"sorted_weight": 0.5}}, "train": {"max_steps": 2}}
    run = run_pipeline(load_recipe(tree_of(foreign, student, tmp_path / "run", **sections)), stages=STAGES).root
    assert all(0 < row["sorted_distance"] <= 2 for row in metrics(run))


def test_merged_groups_by_the_chain_rule(foreign: TinyPair, student: Path, tmp_path: Path) -> None:
    """The teacher's probability of a group is the product of those of its own tokens of the same text."""
    run = tmp_path / "run"
    sections = {"teacher": {"across": {"merged": "chain"}, "cache": False}, "train": {"max_steps": 4}}
    tree = tree_of(foreign, student, run, **sections)
    run_pipeline(load_recipe(tree), stages=STAGES, until="train")
    assert all(row["merged"] > 0 and row["aligned"] + row["merged"] <= 1 for row in metrics(run))
    context = RunContext(load_recipe(tree))
    teacher = context.teacher
    assert isinstance(teacher, AcrossTeacher)
    responses = list(load_responses(context, "train").values())[:4]
    batch = collate(responses, range(4), pad_id=0)
    found = in_shared_tokens(context, teacher).signal(batch)
    assert isinstance(found, SharedSignal) and found.group_logp_G is not None
    model = AutoModelForCausalLM.from_pretrained(foreign.teacher).eval()
    expected = []
    for prompt, alignment in teacher.readings.of(batch):
        ids = torch.tensor([[*prompt, *alignment.teacher_ids]])
        with torch.no_grad():
            logp_TV = model(input_ids=ids).logits[0, :, : found.head.vocab_size].log_softmax(-1)
        for group in (group for group in alignment.groups if group.kind == "merged"):
            places = [len(prompt) - 1 + token for token in range(*group.teacher)]
            expected.append(sum(float(logp_TV[place, ids[0, place + 1]]) for place in places))
    torch.testing.assert_close(found.group_logp_G, torch.tensor(expected), rtol=1e-3, atol=1e-3)
