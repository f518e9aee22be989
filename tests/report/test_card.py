"""The model card: metadata that the hub's own parser reads back, and figures that are those of the run."""

import json

import pytest
from huggingface_hub import ModelCard, ModelCardData

from limbeck.evaluation.scores.files import write_scores
from limbeck.report.model_card import write_card
from limbeck.types import LimbeckError, ScoredRow
from tests.report.synthetic import KEPT, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart", steps=40)


def read(path):
    card = ModelCard.load(path)
    assert isinstance(card.data, ModelCardData)
    return card


def test_the_hub_reads_every_figure_back(run_dir):
    card = read(write_card(run_dir, base_model="owner/base", license="apache-2.0", datasets=["owner/prompts"]))
    data = card.data.to_dict()
    assert data["base_model"] == "owner/base" and data["base_model_relation"] == "finetune"
    assert data["library_name"] == "transformers" and data["license"] == "apache-2.0"
    assert data["datasets"] == ["owner/prompts"] and {"distillation", "limbeck", "pruned"} <= set(data["tags"])
    scores = json.loads((run_dir / "scores.json").read_text())["after"]
    results = {result.metric_type: result for result in card.data["eval_results"]}
    assert {"forward_kl", "reverse_kl", "top1_agreement", "acceptance", "rouge_l"} <= set(results)
    assert "teacher_entropy" not in results
    for name, result in results.items():
        assert result.metric_value == scores[name]["mean"]
        assert result.task_type == "text-generation" and result.dataset_name == "held-out prompts of builtin"
    assert results["forward_kl"].metric_name == "Forward KL (nats/token)"


def with_groups(run_dir, **groups):
    """Write scores of these groups alone, after training: GROUP or GROUP@CONDITION to the values of each example."""
    after = {
        name.replace("__", "@").replace("_is_", "="): [
            ScoredRow(id=f"p{n}", weight=1.0, values=values) for n, values in enumerate(examples)
        ]
        for name, examples in groups.items()
    }
    write_scores(run_dir, before={}, after=after)
    return run_dir


def test_every_group_and_condition_is_carried(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    recipe = (run_dir / "recipe.resolved.yaml").read_text().replace("source: builtin", "source: /data/mine/asked.jsonl")
    recipe = recipe.replace("smollm2-135m-instruct", "/data/mine/teacher")
    recipe = recipe.replace(
        "evaluate: [fidelity, rouge]", "evaluate: {groups: {tasks: {files: {gsm8k: /data/mine/test.jsonl}}}}"
    )
    (run_dir / "recipe.resolved.yaml").write_text(recipe)
    with_groups(
        run_dir,
        fidelity=[{"forward_kl": 0.5}, {"forward_kl": 0.7}],
        fidelity__student=[{"forward_kl": 1.5}, {"forward_kl": 1.9}],
        tasks__gsm8k=[{"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 1.0}],
        **{"tasks__heldout,4 steps": [{"accuracy": 1.0}], "tasks__lm_eval,arc_easy": [{"accuracy": 1.0}]},
        cost=[{"parameters": 92.0, "teacher_parameters": 135.0}],
        cost__prompt_is_256=[{"decode_speed": 30.0, "teacher_decode_speed": 20.0}],
    )
    card = read(write_card(run_dir))
    results = {result.metric_type: result for result in card.data["eval_results"]}
    expected = ("forward_kl", "forward_kl@student", "accuracy@gsm8k", "parameters", "decode_speed@prompt=256")
    expected += ("accuracy@heldout,4 steps", "accuracy@lm_eval,arc_easy")
    assert set(results) == set(expected)
    assert results["forward_kl@student"].metric_name == "Forward KL (on the student's answers) (nats/token)"
    assert results["forward_kl@student"].metric_value == pytest.approx(1.7)
    assert "from the teacher `teacher`" in card.text
    low, high = results["forward_kl"].metric_args["interval_95"]
    assert low < 0.6 < high and results["forward_kl"].metric_args["examples"] == 2
    assert results["parameters"].metric_args == {"examples": 1}
    assert results["forward_kl"].dataset_name == "held-out prompts of asked.jsonl"
    problems = results["accuracy@gsm8k"]
    assert (problems.dataset_type, problems.dataset_name) == ("gsm8k", "gsm8k (test.jsonl)")
    assert results["accuracy@heldout,4 steps"].dataset_name == "held-out prompts of asked.jsonl"
    assert results["accuracy@lm_eval,arc_easy"].dataset_name == "arc_easy (lm-evaluation-harness)"
    assert "/data/mine" not in card.text and "/data/mine" not in str(card.data)
    assert card.text.count("KL(teacher ‖ student)") == 1, "a meaning is said once for all conditions"
    row = next(line for line in card.text.splitlines() if line.startswith("| Parameters |"))
    assert row == "| Parameters | M | 135 | not measured | 92.0 | 1 |"


def test_what_the_hub_writes_back_is_what_was_there(run_dir):
    """The hub's library puts results of one data set together; ours are so already, and nothing gets lost."""
    card = read(write_card(run_dir))
    again = ModelCard(str(card))
    assert again.data["eval_results"] == card.data["eval_results"]
    assert len(card.data["eval_results"]) == len({result.metric_type for result in again.data["eval_results"]})


def test_a_run_with_one_group_only(tmp_path):
    run_dir = with_groups(write_run(tmp_path / "run", steps=30), rouge=[{"rouge_l": 0.25}, {"rouge_l": 0.5}])
    card = read(write_card(run_dir))
    assert [result.metric_type for result in card.data["eval_results"]] == ["rouge_l"]
    assert card.data["eval_results"][0].metric_value == 0.375
    assert "Forward KL" not in card.text.partition("## What was kept")[2].partition("## Training")[0]


def test_the_text_names_what_matters(run_dir):
    text = read(write_card(run_dir)).text
    for phrase in (
        "92M of 135M parameters (68 %)",
        "`smollm2-135m-instruct`",
        "forward KL (`fkl`) at temperature 2",
        f"18 of its 30 blocks kept ({', '.join(map(str, KEPT))})",
        "sampling temperature 0.8",
        "Prompts: builtin",
        "AutoModelForCausalLM.from_pretrained",
        "| Forward KL | nats/token | 0 |",
        "learning_rate",
        "torch 2.13.0",
        "## Limits",
    ):
        assert phrase in text, phrase
    assert "/tmp" not in text and str(run_dir) not in text


def test_names_that_are_no_hub_ids_are_not_declared(run_dir, tmp_path, monkeypatch):
    assert "base_model" not in read(write_card(run_dir)).data.to_dict()
    other = write_run(tmp_path / "run", steps=30)
    recipe = (other / "recipe.resolved.yaml").read_text()
    (other / "recipe.resolved.yaml").write_text(recipe.replace("smollm2-135m-instruct", "owner/model-1.0"))
    assert read(write_card(other)).data["base_model"] == "owner/model-1.0"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model-1.0").mkdir(parents=True)
    assert "base_model" not in read(write_card(other)).data.to_dict()


def test_a_student_of_its_own_kind(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    recipe = (run_dir / "recipe.resolved.yaml").read_text()
    (run_dir / "recipe.resolved.yaml").write_text(recipe.replace("init: depth_prune", "model: owner/small"))
    card = read(write_card(run_dir))
    assert card.data["base_model"] == "owner/small" and "The student began as `owner/small`" in card.text
    (run_dir / "recipe.resolved.yaml").write_text(recipe.replace("init: depth_prune", "init: scratch"))
    card = read(write_card(run_dir))
    assert "base_model" not in card.data.to_dict() and "fresh weights" in card.text


def test_ends_and_options_of_a_strangers_model_stay_code(tmp_path):
    run = write_run(tmp_path / "run", steps=30)
    path = run / "student" / "student.json"
    said = {"template": "chat", "ends": ["<|im_end|>", "`<img src=x>`\n# Mine"], "chat_options": {"a`b": "`[x](y)\n`|"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    text = read(write_card(run)).text
    assert r"ends an answer with `<|im_end|>` or `'<img src=x>'\n# Mine`, where `generate` stops" in text
    assert r"with `a'b=''[x](y)\n'|'`, and" in text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_options": "odd"}))
    assert "`tokenizer.apply_chat_template`), and ends" in read(write_card(run)).text


def test_weights_in_few_bits_are_named(tmp_path):
    run = write_run(tmp_path / "run", steps=30)
    path = run / "student" / "student.json"
    quantized = {"weights": "straight_through", "formats": {"q8_0": 1, "q4_0": 210}, "size_mb": 89.9}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantized": quantized}))
    text = read(write_card(run)).text
    assert "by format: 210 in `q4_0`, 1 in `q8_0`, 90 MB in all; the weights were trained on the grid" in text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantized": "odd"}))
    assert "few bits" not in read(write_card(run)).text


def test_without_scores_it_says_so_and_claims_nothing(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    (run_dir / "scores.json").unlink()
    card = read(write_card(run_dir))
    assert "has not been evaluated" in card.text and card.data["eval_results"] is None


def test_odd_names_cannot_break_the_front_matter(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    name = "a: [b]\n---\n# <script> | 'x\" 日本"
    (run_dir / "recipe.resolved.yaml").write_text(f"name: {json.dumps(name)}\n")
    card = read(write_card(run_dir))
    assert card.data["model_name"] == name
    assert "<script>" not in card.text


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match="expected a run directory"):
        write_card(tmp_path)
