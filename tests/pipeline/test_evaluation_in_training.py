"""What is measured while it trains, through the real command: loss and fidelity on set-aside prompts, an early end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair, questions, write_prompts

SIZES = {"max_steps": 12, "per_device_train_batch_size": 2, "eval_steps": 3, "eval_size": 2}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prompts enough for some to be set aside."""
    rows = [{"prompt": text} for text in questions(120)]
    return {"source": str(write_prompts(tmp_path_factory.mktemp("many") / "prompts.jsonl", rows))}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_fidelity_is_measured_on_the_way(
    tiny: TinyPair, limbeck: CommandServer, many: dict[str, str], tmp_path: Path
) -> None:
    # A teacher that is its own student: nothing is apart, and nothing can be gained.
    same = {
        "student": {"init": "pretrained", "model": str(tiny.teacher), "layers": None},
        "train": SIZES | {"learning_rate": 1e-9},
    }
    end = limbeck.run("train", tiny.recipe(tmp_path / "same", prompts=many, **same))
    assert end.code == 0, end.stderr
    found = [line for line in lines(tmp_path / "same") if "eval_forward_kl" in line]
    assert [line["step"] for line in found] == [3, 6, 9, 12]
    assert all(abs(line["eval_forward_kl"]) < 1e-4 and line["eval_top1_agreement"] == 1 for line in found)
    end = limbeck.run("train", tiny.recipe(tmp_path / "apart", prompts=many, train=SIZES))
    assert end.code == 0, end.stderr
    assert all(line["eval_forward_kl"] > 0.1 for line in lines(tmp_path / "apart") if "eval_forward_kl" in line)
    assert "eval_forward_kl" in lines(tmp_path / "apart")[-1]


def test_a_policy_gradient_is_measured_by_what_it_estimates(
    tiny: TinyPair, limbeck: CommandServer, many: dict[str, str], tmp_path: Path
) -> None:
    """Its value does not measure the fit: the student of the lowest reverse KL is handed on."""
    own = {"responses": {"source": "student"}, "objective": {"name": "opd", "temperature": 1.0}, "sft": {}}
    end = limbeck.run("train", tiny.recipe(tmp_path / "run", prompts=many, train=SIZES, **own))
    assert end.code == 0, end.stderr
    found = [line for line in lines(tmp_path / "run") if "eval_loss" in line]
    assert len(found) == 4 and all(line["eval_loss"] == line["eval_reverse_kl"] for line in found)
    assert all(line["eval_loss_before"] > 0.01 for line in found)
    assert found[-1]["eval_loss"] != found[-1]["eval_forward_kl"]


def test_it_ends_early_and_the_rest_of_the_run_follows(
    tiny: TinyPair, limbeck: CommandServer, many: dict[str, str], tmp_path: Path
) -> None:
    train = SIZES | {"early_stopping_patience": 2, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    end = limbeck.run("run", tiny.recipe(tmp_path / "run", prompts=many, train=train))
    assert end.code == 0, end.stderr
    assert "train: ended after step 6 of 12" in end.stderr + end.stdout
    assert (tmp_path / "run" / "report.html").exists()
    scores = json.loads((tmp_path / "run" / "scores.json").read_text("utf-8"))
    assert scores["after"]["forward_kl"]["mean"] == pytest.approx(scores["before"]["forward_kl"]["mean"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"early_stopping_patience": 2}, "nothing is measured while it trains; set train.eval_steps"),
        ({"early_stopping_threshold": 0.1}, "which only train.early_stopping_patience reads"),
    ],
)
def test_what_nobody_would_read_is_refused(
    tiny: TinyPair, limbeck: CommandServer, tmp_path: Path, settings: dict, said: str
) -> None:
    end = limbeck.run("prompts", tiny.recipe(tmp_path / "run", train=settings))
    assert end.code == 2 and said in end.error_line
