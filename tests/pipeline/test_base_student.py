"""A base student under an instruct teacher: it is trained on the teacher's ends, saved with them, and stops at them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from limbeck import run as play
from limbeck.export import export_model
from limbeck.export.gguf_tokens import Vocabulary
from limbeck.models.loading import load_model
from limbeck.models.vocabulary import describe_vocabulary
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stages.respond import teacher_inputs
from limbeck.pipeline.student_endings import doctor_says, further_ends
from limbeck.prompts.saved_template import saved_chat_template
from limbeck.prompts.templates import encode_prompts, resolve_template
from limbeck.prompts.wording import alpaca_text
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.student.endings import stop_ids
from limbeck.types import LimbeckError, Prompt
from tests.export.test_export import llama_cpp
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair, questions, silence, write_model

END, TEXT_END = 2, 0
SHORT = {"max_steps": 2, "save_steps": 2}
INITS: dict[str, dict[str, Any]] = {
    "pretrained": {"init": "pretrained"},
    "lora": {"init": "pretrained", "lora": {"r": 2}},
    "depth_prune": {"init": "depth_prune", "layers": 2},
    "scratch": {"init": "scratch", "config": {"num_hidden_layers": 1}},
}


def make_base(folder: Path) -> Path:
    """Leave a model folder as a base model has it: no chat template, its own end of text, the same vocabulary."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        told = json.loads((folder / name).read_text("utf-8"))
        told |= {"eos_token_id": TEXT_END, "bos_token_id": TEXT_END, "pad_token_id": TEXT_END}
        (folder / name).write_text(json.dumps(told), "utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(write_model(tmp_path_factory.mktemp("base") / "base", seed=3))


@pytest.mark.parametrize("init", INITS)
def test_it_is_saved_with_what_it_was_trained_with(tiny: TinyPair, base: Path, init: str, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path / "run", student={"model": str(base), **INITS[init]}, train=SHORT)
    tree["student"] = {"model": str(base), **INITS[init]}
    student = play(tree).student
    tokenizer: Any = AutoTokenizer.from_pretrained(student)
    teacher: Any = AutoTokenizer.from_pretrained(tiny.teacher)
    assert tokenizer.chat_template == teacher.chat_template
    assert tokenizer.special_tokens_map == teacher.special_tokens_map
    assert tokenizer.model_max_length == 128
    model: Any = AutoModelForCausalLM.from_pretrained(student)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == END
    assert model.config.pad_token_id == model.generation_config.pad_token_id == teacher.pad_token_id
    record = json.loads((student / "student.json").read_text("utf-8"))
    assert record["template"] == "chat" and record["ends"] == ["<|im_end|>"]
    assert "answers end with <|im_end|>, not <|endoftext|>" in record["changed"]
    card = (student / "README.md").read_text("utf-8")
    assert "chat template" in card and "`<|im_end|>`" in card


def test_a_student_of_the_teacher_keeps_what_it_has(tiny: TinyPair, tmp_path: Path) -> None:
    student = play(tiny.tree(tmp_path / "run", train=SHORT)).student
    for name in ("chat_template.jinja", "generation_config.json"):
        ours, theirs = ((folder / name).read_text("utf-8") for folder in (student, tiny.teacher))
        assert ours == theirs
    assert json.loads((student / "student.json").read_text("utf-8"))["changed"] == []


def test_answers_end_where_the_models_own_generation_stops(tiny: TinyPair, tmp_path: Path) -> None:
    """As those of Qwen2.5: the end of the text ends an answer too, although neither tokenizer nor template says so."""
    plain, ends = RunContext(load_recipe(tiny.tree(tmp_path / "plain"))), [END, TEXT_END]
    assert further_ends(plain) == () and "ends" not in teacher_inputs(plain)
    teacher = shutil.copytree(tiny.teacher, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    # The one is written where the other was.
    weights["model.embed_tokens.weight"][[END, TEXT_END]] = weights["model.embed_tokens.weight"][[TEXT_END, END]]
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((teacher / "generation_config.json").read_text("utf-8")) | {"eos_token_id": ends}
    (teacher / "generation_config.json").write_text(json.dumps(settings), "utf-8")
    tree = tiny.tree(tmp_path / "run", train=SHORT) | {"teacher": {"model": str(teacher)}}
    context = RunContext(load_recipe(tree))
    assert further_ends(context) == (TEXT_END,) and teacher_inputs(context)["ends"] == [TEXT_END]
    run = play(tree)
    written = read_responses(run.directory / "responses/teacher.jsonl")
    assert all((r.stop == "eos") == (r.response_ids[-1] in ends) for r in written)
    assert any(r.response_ids[-1] == TEXT_END for r in written)
    assert all(TEXT_END not in r.response_ids[:-1] for r in written)
    model: Any = AutoModelForCausalLM.from_pretrained(run.student)
    assert model.generation_config.eos_token_id == ends


def test_what_it_writes_itself_ends_with_the_teachers_end(tiny: TinyPair, base: Path, tmp_path: Path) -> None:
    """Both while it trains and in the evaluation; before, this died when responses and signal were there."""
    tree = tiny.tree(
        tmp_path / "run",
        responses={"source": "student", "max_new_tokens": 24},
        train={"max_steps": 4, "save_steps": 4},
        evaluate={"groups": ["fidelity", "diversity"], "max_new_tokens": 24},
    )
    tree["student"] = {"model": str(base)}
    run = play(tree)
    lines = (run.directory / "rounds/examples.jsonl").read_text("utf-8").splitlines()
    written = [(tuple(line["response_ids"]), line["stop"]) for line in map(json.loads, lines)]
    files = (run.directory / "scores/answers").glob("[ab]*.jsonl")
    answers = [(r.response_ids, r.stop) for path in files for r in read_responses(path)]
    for responses in (written, answers):
        assert responses
        for ids, stop in responses:
            assert (stop == "eos") == (ids[-1] == END)
            assert END not in ids[:-1]
    assert "eos" in {stop for _, stop in [*written, *answers]}


def test_plain_generate_and_llama_cpp_stop_where_it_was_taught(tiny: TinyPair, tmp_path: Path) -> None:
    """The student ends at once with the token that it was trained to end with, so whoever goes on has missed it."""
    base = make_base(silence(write_model(tmp_path / "base", seed=3)))
    tree = tiny.tree(tmp_path / "run", train=SHORT | {"learning_rate": 1e-8})
    tree["student"] = {"model": str(base)}
    student = play(tree).student
    tokenizer: Any = AutoTokenizer.from_pretrained(student)
    model: Any = AutoModelForCausalLM.from_pretrained(student)
    tokenizer.padding_side = "left"
    turns = [[{"role": "user", "content": text}] for text in questions(4)]
    asked = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    written = model.generate(**asked, max_new_tokens=20, do_sample=False)
    assert written[:, asked["input_ids"].shape[1] :].tolist() == [[END]] * 4
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp comes with xllamacpp: extra dev")
    done = export_model(str(student.parent), tmp_path / "gguf", format="gguf")
    with llama_cpp(done.file) as ask:
        for conversation in turns:
            said = ask("v1/chat/completions", messages=conversation, max_tokens=20, temperature=0.0)
            assert said["choices"][0]["finish_reason"] == "stop"
            assert said["usage"]["completion_tokens"] == 1
            prompt = ask("apply-template", messages=conversation)["prompt"]
            assert prompt == tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def test_a_gguf_file_stops_at_what_the_generation_configuration_adds(tmp_path: Path) -> None:
    folder = make_base(write_model(tmp_path / "model", seed=3))
    told = json.loads((folder / "generation_config.json").read_text("utf-8"))
    (folder / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": [TEXT_END, END, 1]}), "utf-8")
    loaded = load_model(folder)
    special = Vocabulary.of(loaded.tokenizer, 300, stop_ids(loaded.model)).special
    assert (special["eos"], special["eot"], special["eom"]) == (TEXT_END, END, 1)


def test_options_of_the_template_become_its_defaults() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    turns = [{"role": "user", "content": "a"}]
    tokenizer.chat_template = "\n{% if thinks is defined and not thinks %}quiet{% else %}loud{% endif %}"
    told = tokenizer.apply_chat_template(turns, tokenize=False, thinks=False)
    tokenizer.chat_template = saved_chat_template(tokenizer, "chat", {"thinks": False})
    assert tokenizer.apply_chat_template(turns, tokenize=False) == told == "\nquiet"
    assert tokenizer.apply_chat_template(turns, tokenize=False, thinks=True) == "\nloud"


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_without_the_chat_template_it_is_not_saved_with_it(tiny: TinyPair, template: str, tmp_path: Path) -> None:
    wide = [write_model(tmp_path / name, window=256, seed=seed) for seed, name in enumerate(("teacher", "student"))]
    tree = tiny.tree(tmp_path / "run", teacher={"model": str(wide[0])}, prompts={"template": template}, train=SHORT)
    tree["student"] = {"model": str(make_base(wide[1]))}
    student = play(tree).student
    model: Any = AutoModelForCausalLM.from_pretrained(student)
    tokenizer: Any = AutoTokenizer.from_pretrained(student)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == END
    asked = [Prompt(id="a", text="What is tea?"), Prompt(id="b", text="q", instruction=("Name it.", "salt"))]
    if template == "plain":
        assert tokenizer.chat_template is None
        return
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "What is tea?"}], return_dict=False)
    assert tuple(rendered) == encode_prompts(asked[:1], tokenizer, "alpaca")[0].ids
    assert resolve_template("auto", tokenizer, asked) == "alpaca"
    assert encode_prompts(asked, tokenizer)[1].ids == tuple(tokenizer(alpaca_text(asked[1]))["input_ids"])


class TestUntrainedEnds:
    """Rows of control tokens that nobody used are nearly the same, or nearly 0."""

    @pytest.fixture(params=["short", "as another"])
    def fresh(self, base: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        folder = tmp_path / "fresh"
        shutil.copytree(base, folder)
        weights = load_file(folder / "model.safetensors")
        rows = weights["model.embed_tokens.weight"]
        rows[END] = rows[END] * 1e-3 if request.param == "short" else rows[1] * 1.001
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def test_they_are_warned_of(
        self, tiny: TinyPair, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tree = tiny.tree(tmp_path / "run", train=SHORT)
        tree["student"] = {"model": str(fresh)}
        play(tree)
        assert "was never trained on <|im_end|>, which ends an answer" in capsys.readouterr().err

    @pytest.mark.parametrize("frozen", [{"lora": {"r": 2}}, {"freeze_embeddings": True}])
    def test_they_are_refused_where_they_stay_so(
        self, tiny: TinyPair, fresh: Path, frozen: dict[str, Any], tmp_path: Path
    ) -> None:
        tree = tiny.tree(tmp_path / "run", train=SHORT)
        tree["student"] = {"model": str(fresh), **frozen}
        with pytest.raises(LimbeckError, match=rf"never trained on <\|im_end\|>.*student.{next(iter(frozen))} leaves"):
            play(tree)
        assert not (tmp_path / "run").exists()

    def test_trained_ones_are_not(
        self, tiny: TinyPair, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tree = tiny.tree(tmp_path / "run", train=SHORT)
        tree["student"] = {"model": str(base), "lora": {"r": 2}}
        play(tree)
        assert "never trained" not in capsys.readouterr().err


def test_doctor_says_what_will_be_changed(tiny: TinyPair, base: Path, limbeck: CommandServer) -> None:
    said = " ".join(limbeck.run("doctor", tiny.teacher, base).stdout.split())
    assert "trained and saved with the teacher's tokenizer: answers end with <|im_end|>, not <|endoftext|>" in said
    assert "chat template: the teacher's, where it had none" in said and "eos_token: <|im_end|>" in said
    pair = {"teacher": {"model": str(tiny.teacher)}, "student": {"model": str(tiny.teacher)}}
    assert doctor_says(describe_vocabulary(tiny.teacher), describe_vocabulary(tiny.teacher), pair) == ()


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_control_tokens_that_one_of_the_two_lacks(tiny: TinyPair, who: str, tmp_path: Path) -> None:
    """As Llama and Qwen add some from one release to the next: rows that were padding in the other."""
    more = write_model(tmp_path / "more", seed=3, head_rows=320)
    tokenizer: Any = AutoTokenizer.from_pretrained(more)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.save_pretrained(more)
    plain = write_model(tmp_path / "plain", seed=4, head_rows=320)
    teacher, student = (more, plain) if who == "teacher" else (plain, more)
    tree = tiny.tree(tmp_path / "run", train=SHORT, teacher={"model": str(teacher)})
    tree["student"] = {"model": str(student)}
    run = play(tree)
    saved: Any = AutoTokenizer.from_pretrained(run.student)
    assert saved.get_vocab() == load_model(teacher).tokenizer.get_vocab()
    assert run.scores["after"]["forward_kl"]["mean"] > 0


def test_a_token_without_a_row_is_refused(tiny: TinyPair, tmp_path: Path) -> None:
    more = write_model(tmp_path / "more", head_rows=320)
    tokenizer: Any = AutoTokenizer.from_pretrained(more)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.save_pretrained(more)
    tree = tiny.tree(tmp_path / "run", teacher={"model": str(more)})
    tree["student"] = {"model": str(tiny.teacher)}
    with pytest.raises(LimbeckError, match=r"1 ids only the teacher has \(\d+ '<\|call\|>'; the student's head has"):
        play(tree)
    assert not (tmp_path / "run").exists()
