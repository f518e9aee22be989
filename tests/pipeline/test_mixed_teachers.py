"""Several teachers of which some are served or stored, and the mean of probabilities: exact, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from limbeck.models.heads import project
from limbeck.models.loading import load_model
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.stages.teach import open_teacher
from limbeck.pipeline.store_capture import capture
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.collate import collate
from limbeck.runtime.console import QuietConsole
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.in_process import InProcessTeacher
from limbeck.types import LimbeckError, Response, TopKSignal
from tests.teachers.scoring_server import scoring_server
from tests.tiny_pair import TinyPair, questions, write_model, write_prompts

K = 16
SPARSE: dict[str, Any] = {"support": "topk_tail", "support_k": K}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("pair")
    rows = [
        {"prompt": text, "completion": f"It is {i}.", "teacher_id": "uses" if "uses" in text else "what"}
        for i, text in enumerate(questions())
    ]
    write_model(folder / "other", layers=2, width=48, seed=3)
    write_model(folder / "student", layers=2, seed=5)
    return TinyPair(teacher=write_model(folder / "teacher"), prompts=write_prompts(folder / "prompts.jsonl", rows))


@pytest.fixture(scope="module")
def served(tiny: TinyPair) -> Iterator[dict[str, Any]]:
    """Where the other teacher is served."""
    folder = tiny.teacher.parent / "other"
    model = load_model(str(folder)).model

    def scores(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    with scoring_server(Tokenizer.from_file(str(folder / "tokenizer.json")), scores) as (_, url, _):
        yield {"name": "server", "base_url": url, "retries": 0, "timeout_s": 10.0}


def tree_of(
    tiny: TinyPair, output: Path, *, where: Any = "in_process", combine: Any = "column", **sections: Any
) -> dict[str, Any]:
    folder = tiny.teacher.parent
    base = {"responses": {"source": "data"}, "evaluate": {"groups": ["nll"]}, "objective": {"temperature": 1.0}}
    base["student"] = {"init": "pretrained", "layers": None, "model": str(folder / "student")}
    more = sections.pop("teacher", SPARSE)
    tree = tiny.tree(output, **base | sections)
    del tree["teacher"]
    tree["teachers"] = {
        "what": {"model": str(tiny.teacher)} | more,
        "uses": {"model": str(folder / "other"), "where": where} | more,
    }
    tree["combine"] = combine
    if combine != "column":
        tree["prompts"]["ignore_columns"] = ["teacher_id"]
    tree["train"]["max_steps"] = 2
    return tree


def store_of(tiny: TinyPair, path: Path, teacher: dict[str, Any]) -> dict[str, Any]:
    """Where the other teacher is stored."""
    tree = tiny.tree(path.with_name("capture"), responses={"source": "data"}, evaluate={"groups": ["nll"]})
    tree["teacher"] = {"model": str(tiny.teacher.parent / "other")} | teacher
    tree["student"] = {"init": "pretrained", "model": str(tiny.teacher.parent / "student")}
    tree["prompts"]["ignore_columns"] = ["teacher_id"]
    tree["objective"]["temperature"] = 1.0
    capture(load_recipe(tree), path, None, console=QuietConsole())
    return {"name": "store", "path": str(path)}


def logp(model: Path, response: Response) -> torch.Tensor:
    teacher = InProcessTeacher(model=TeacherModel(model=str(model)), device=torch.device("cpu"))
    signal: Any = teacher.signal(collate([response], [0], pad_id=0))
    return project(signal.head, signal.hidden_ND).double().log_softmax(-1)


def losses(root: Path) -> torch.Tensor:
    lines = (root / "metrics.jsonl").read_text("utf-8").splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines])


@pytest.mark.parametrize("how", ["server", "sparse store", "dense store"])
def test_each_prompt_has_the_likeliest_tokens_of_its_own_teacher(
    tiny: TinyPair, served: dict[str, Any], tmp_path: Path, how: str
) -> None:
    where = served if how == "server" else store_of(tiny, tmp_path / "store", SPARSE if "sparse" in how else {})
    tree = tree_of(tiny, tmp_path / "run", where=where)
    if how == "dense store":
        # Beside a teacher that says no more than that.
        tree["teachers"]["what"]["where"] = served
        tree["teachers"]["what"]["model"] = str(tiny.teacher.parent / "other")
    recipe = load_recipe(tree)
    run_pipeline(recipe, stages=STAGES, until="train")
    context = RunContext(recipe)
    stored, seen = open_teacher(context), set[str]()
    for row, response in load_responses(context, "train").items():
        name = context.member_of(response.prompt_id)
        signal = stored.signal(collate({row: response}, [row], pad_id=0))
        assert isinstance(signal, TopKSignal)
        whole_NV = logp(Path(recipe.teachers[name].model), response)
        wanted_NK = whole_NV.gather(-1, signal.ids_NK)
        # A store keeps log-probabilities in few bits.
        near = 0.02 if how == "sparse store" and name == "uses" else 1e-4
        torch.testing.assert_close(signal.logp_NK.double(), wanted_NK, rtol=1e-4, atol=near)
        # All but the last are the likeliest ones; in the last place a server gives the token that followed.
        torch.testing.assert_close(wanted_NK[:, :-1], whole_NV.topk(K).values[:, :-1], rtol=1e-4, atol=1e-4)
        seen.add(name)
    assert seen == {"what", "uses"}


def test_a_mean_with_a_stored_teacher_is_that_of_both_in_memory(tiny: TinyPair, tmp_path: Path) -> None:
    where = store_of(tiny, tmp_path / "store", {})
    found = []
    for name, place in (("stored", where), ("local", "in_process")):
        tree = tree_of(tiny, tmp_path / name, where=place, combine="mean_log_p", teacher={})
        found.append(losses(run_pipeline(load_recipe(tree), stages=STAGES, until="train").root))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def mean_p(weights: tuple[float, float], tiny: TinyPair, response: Response) -> torch.Tensor:
    """The naive line: log of the weighted mean of the two teachers' probabilities."""
    parts = [logp(tiny.teacher, response).exp(), logp(tiny.teacher.parent / "other", response).exp()]
    return (weights[0] * parts[0] + weights[1] * parts[1]).log()


@pytest.mark.parametrize("place", ["in_process", "store"])
def test_the_mean_of_probabilities_is_exact_on_its_likeliest_tokens(tiny: TinyPair, tmp_path: Path, place: str) -> None:
    where = "in_process" if place == "in_process" else store_of(tiny, tmp_path / "store", {})
    combine = {"name": "mean_p", "weights": {"what": 3.0, "uses": 1.0}}
    tree = tree_of(tiny, tmp_path / "run", where=where, combine=combine, objective={"temperature": 2.0})
    recipe = load_recipe(tree)
    run = run_pipeline(recipe, stages=STAGES, until="train")
    context = RunContext(recipe)
    stored = open_teacher(context)
    for row, response in list(load_responses(context, "train").items())[:4]:
        signal = stored.signal(collate({row: response}, [row], pad_id=0))
        assert isinstance(signal, TopKSignal) and signal.temperatures == (2.0,)
        whole_NV = mean_p((0.75, 0.25), tiny, response)
        wanted_NK, ids_NK = whole_NV.topk(K)
        torch.testing.assert_close(signal.logp_NK.double(), wanted_NK, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            whole_NV.gather(-1, signal.ids_NK), whole_NV.gather(-1, ids_NK), rtol=1e-4, atol=1e-4
        )
        log_z_N = (whole_NV / 2.0).logsumexp(-1)
        torch.testing.assert_close(signal.log_z_NG[:, 0].double(), log_z_N, rtol=1e-4, atol=1e-4)
    assert not (run.signal / "parts").exists()


def test_the_mean_of_probabilities_in_rounds(tiny: TinyPair, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"responses": {"source": "student", "initial_author": "data"}}
    run = run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run", combine="mean_p", **sections)), stages=STAGES)
    assert (losses(run.root) > 0).all() and run.report.exists()


@pytest.mark.parametrize(
    ("how", "sections", "said"),
    [
        ("server", {"combine": "mean_p"}, "teachers.uses says its likeliest tokens alone, of which combine=mean_p has"),
        ("server", {"combine": "mean_log_p"}, "of which combine=mean_log_p has no exact mean"),
        ("server", {"objective": {"temperature": 2.0}}, "objective fkl is impossible on what combine=column gives"),
        ("in_process", {"combine": "mean_p", "teacher": {}}, "a mean of several teachers has likeliest tokens alone"),
        ("sampled", {}, "teachers.uses has a store of samples"),
        ("sparse", {"teacher": SPARSE | {"support_k": 9}}, "a store of 16 tokens of each position, but"),
        (
            "dense",
            {"combine": "mean_p", "responses": {"source": "student", "initial_author": "data"}},
            "has a store of texts that were captured, and no others",
        ),
    ],
)
def test_what_is_not_exact_is_refused_in_one_line(
    tiny: TinyPair, served: dict[str, Any], tmp_path: Path, how: str, sections: dict[str, Any], said: str
) -> None:
    where: Any = "in_process" if how == "in_process" else served
    if how in ("sampled", "sparse", "dense"):
        support: dict[str, Any] = {"sparse": SPARSE, "dense": {}}.get(how, {"support": "sampled", "support_k": 8})
        where = store_of(tiny, tmp_path / "store", support)
    with pytest.raises(LimbeckError) as caught:
        run_pipeline(load_recipe(tree_of(tiny, tmp_path / "run", where=where, **sections)), stages=STAGES)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run/responses").exists()
