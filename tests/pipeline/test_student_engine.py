"""Runs whose student's responses are written by servers that take its weights before each round."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from limbeck.client.openai import Server
from limbeck.client.pool import ServerPool
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.student_engine import StudentEngine
from limbeck.recipe.load import load_recipe
from limbeck.rollouts.io import read_responses
from limbeck.runtime.files import write_json
from limbeck.runtime.records import read_sealed, sealed
from limbeck.runtime.rundir import RunDirectory
from limbeck.sampling.engine import EngineSampler
from limbeck.types import LimbeckError, Response
from tests.limbeck_command import CommandServer
from tests.sampling.served.engine_server import DEFAULT, EngineHandler, engine_server
from tests.tiny_pair import TinyPair, write_model, write_recipe, write_tokenizer

Engine = tuple[type[EngineHandler], str]
ROUNDS, STEPS = 3, 2


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a server has after its start: a model of the student's architecture, with other weights."""
    return write_model(tmp_path_factory.mktemp("first") / "model", layers=2, seed=7)


@pytest.fixture
def engine(first: Path) -> Iterator[Engine]:
    with engine_server(first) as (handler, url):
        yield handler, url


def tree_of(tiny: TinyPair, output: Path, *urls: str, **responses: Any) -> dict[str, Any]:
    """Three rounds of two steps; written by engines where there are addresses."""
    answers: dict[str, Any] = {"source": {"name": "student", "refresh": STEPS}, "temperature": 0.0, "batch_size": 2}
    if urls:
        answers["engine"] = {"name": "vllm", "base_url": list(urls), "retries": 1, "timeout_s": 20.0, "concurrency": 1}
    tree = tiny.tree(output, responses=answers | responses, evaluate={"groups": ["nll"]})
    tree["train"] |= {"max_steps": ROUNDS * STEPS, "learning_rate": 3.0e-3}
    return tree


def trained(tree: dict[str, Any]) -> RunDirectory:
    return run_pipeline(load_recipe(tree), stages=STAGES, until="train")


def written(run: RunDirectory) -> list[list[Response]]:
    """The student's responses, round by round."""
    folders = sorted(path for path in run.rounds.iterdir() if path.is_dir())
    return [[r for path in sorted(folder.glob("student/*.jsonl")) for r in read_responses(path)] for folder in folders]


def ids_of(rounds: list[list[Response]]) -> list[dict[str, tuple[int, ...]]]:
    return [{r.prompt_id: r.response_ids for r in one} for one in rounds]


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text("utf-8").splitlines()]


def apart(run: RunDirectory, other: RunDirectory) -> float:
    """Largest difference between the weights of two trained students."""
    one, two = (load_file(path.student / "model.safetensors") for path in (run, other))
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def local(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same run without a server."""
    return trained(tree_of(tiny, tmp_path_factory.mktemp("local") / "run"))


def test_greedy_answers_are_those_of_each_round_s_student(
    engine: Engine, tiny: TinyPair, local: RunDirectory, tmp_path: Path
) -> None:
    handler, url = engine
    run = trained(tree_of(tiny, tmp_path / "run", url))
    rounds = ids_of(written(run))
    assert rounds == ids_of(written(local)) and len(rounds) == ROUNDS
    assert rounds[0] != rounds[-1], "the student has not changed, so that this shows nothing"
    # The teacher's signal is computed in other batches, which moves last bits.
    assert apart(run, local) < 1e-4
    reloads = [body["kwargs"]["weights_path"] for path, body in handler.calls if "method" in body]
    assert [Path(path).name for path in reloads] == ["000", "001", "002"]
    # What was cached of the old weights goes before anything is asked of the new ones, and nothing is asked twice.
    order = [path for path, body in handler.calls if "method" in body or path != "/collective_rpc"]
    assert all(order[i + 1] == "/reset_prefix_cache" for i, path in enumerate(order) if path == "/collective_rpc")
    assert len(handler.asked()) == sum(map(len, written(run)))
    assert not run.engine.exists()
    rows = metrics(run)
    assert all(row["engine/gap"] < 1e-5 < row["engine/gap_limit"] for row in rows)
    assert not any("warnings" in row for row in rows)


@pytest.mark.parametrize("source", ["mixed", "pairs"])
def test_other_sources_and_the_teacher_s_own_server(
    engine: Engine, tiny: TinyPair, tmp_path: Path, source: str
) -> None:
    """Pairs are asked of two servers: the teacher's answers of a later round too."""
    _, url = engine
    options: dict[str, Any] = {"name": source, "refresh": STEPS, "share": 0.7}
    runs = []
    with engine_server(tiny.teacher) as (teacher, teacher_url):
        for urls in ((), (url,)):
            more: dict[str, Any] = {"source": options}
            if source == "pairs":
                more["source"] = {"name": "pairs", "refresh": "epoch"}
                more["server"] = {"base_url": teacher_url, "retries": 0} if urls else None
            tree = tree_of(tiny, tmp_path / f"run{len(urls)}", *urls, **more)
            tree["train"] |= {"max_steps": 11 if source == "pairs" else 8}
            if source == "pairs":
                tree["objective"] = {"name": "skl", "alpha": 0.1, "temperature": 1.0}
                tree["contrast"] = {"student": {"name": "srkl", "alpha": 0.1}}
            runs.append(trained(tree))
        local, run = runs
        assert ids_of(written(run)) == ids_of(written(local)) and apart(run, local) < 1e-4
        if source == "pairs":
            theirs = [read_responses(path) for path in sorted(run.rounds.glob("001/teacher/*.jsonl"))]
            later = {r.prompt_id: r.response_ids for some in theirs for r in some}
            there = {tuple(r.prompt_ids) for some in theirs for r in some}
            assert len(later) == 18 and there <= set(teacher.asked())
    gaps = [row["engine/gap"] for row in metrics(run) if "engine/gap" in row]
    assert gaps and max(gaps) < 1e-5
    # In a step on others' responses the measure of the student's is not repeated.
    assert source == "pairs" or len(gaps) == sum(row.get("responses/count", 0) > 0 for row in metrics(run)) < 8


def test_servers_share_the_prompts_and_one_that_fails_costs_its_own(
    engine: Engine, first: Path, tiny: TinyPair, local: RunDirectory, tmp_path: Path, capsys: Any
) -> None:
    """One comes back in the middle of a round with its first weights: it writes nothing until the next."""
    handler, url = engine
    with engine_server(first) as (other, other_url):
        seen = Counter[str]()

        def fails(path: str, body: dict[str, Any]) -> None:
            if path == "/v1/completions" and "prompt_logprobs" not in body:
                seen[other.version] += 1
                if seen[other.version] == 2 and ", round 2," in other.version:
                    other.restart()
                    raise ConnectionError

        other.before = staticmethod(fails)
        run = trained(tree_of(tiny, tmp_path / "run", url, other_url))
        assert ids_of(written(run)) == ids_of(written(local))
        assert len(seen.keys() - {DEFAULT}) == ROUNDS and handler.asked()
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if "'default'" in line)
    assert "expected 'tiny, round 2, " in line and "the others of responses.engine.base_url (1) do its work" in line
    assert f"{other_url}/v1 is back, with the weights of round 3" in said


@pytest.mark.parametrize("moment", ["before it is loaded", "an answer"])
def test_a_kill_repeats_nothing_and_mixes_nothing(
    engine: Engine, tiny: TinyPair, local: RunDirectory, tmp_path: Path, limbeck: CommandServer, moment: str
) -> None:
    handler, url = engine
    recipe = write_recipe(tmp_path / "run.yaml", tree_of(tiny, tmp_path / "run", url))
    pids: list[int] = []

    def kills(path: str, body: dict[str, Any]) -> None:
        if not pids or ", round 2," not in f"{body.get('new_version', handler.version)}":
            return
        now = {
            "before it is loaded": path == "/update_weight_version" and "being loaded" in body["new_version"],
            "an answer": path == "/v1/completions" and len(handler.asked()) == 8 + 5,
        }[moment]
        if now:
            os.kill(pids.pop(), signal.SIGKILL)

    handler.before = staticmethod(kills)
    command = limbeck.start("train", recipe)
    pids.append(command.pid)
    assert command.wait().code == -signal.SIGKILL
    run = RunDirectory(tmp_path / "run")
    kept = {path: path.read_bytes() for path in run.rounds.glob("*/student/*.jsonl")}
    assert kept and not any("002" in path.parts for path in kept)
    asked = len(handler.asked())
    done = limbeck.run("train", recipe)
    assert done.code == 0, done.stderr
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert ids_of(written(run)) == ids_of(written(local)) and apart(run, local) < 1e-4
    # Of an interrupted round what is on disk is not asked for again: two answers in each file.
    missing = sum(map(len, written(run))) - 2 * len(kept)
    assert len(handler.asked()) - asked == missing
    rows = metrics(run)
    assert len(rows) == ROUNDS * STEPS and all(row["engine/gap"] < 1e-5 for row in rows)


def test_answers_of_other_weights_are_not_gone_on_with(
    engine: Engine, tiny: TinyPair, local: RunDirectory, tmp_path: Path, limbeck: CommandServer
) -> None:
    """A machine that trains to other last bits after a kill would else mix two students in a round."""
    handler, url = engine
    recipe = write_recipe(tmp_path / "run.yaml", tree_of(tiny, tmp_path / "run", url))
    handler.before = staticmethod(lambda path, body: _gone_after(handler, 8 + 5))
    assert limbeck.run("train", recipe).code == 2
    handler.before = staticmethod(lambda path, body: None)
    record = tmp_path / "run" / "rounds" / "001" / "engine.json"
    begun = read_sealed(record)
    write_json(record, sealed(begun | {"weights": "other"}))
    done = limbeck.run("train", recipe)
    assert done.code == 0 and "was begun with other weights (other); its answers are written anew" in done.stderr
    assert ids_of(written(RunDirectory(tmp_path / "run"))) == ids_of(written(local))


def _gone_after(handler: type[EngineHandler], answers: int) -> None:
    if len(handler.asked()) >= answers:
        raise ConnectionError


def test_a_server_that_dies_between_two_rounds_loses_nothing(
    engine: Engine, tiny: TinyPair, local: RunDirectory, tmp_path: Path, limbeck: CommandServer
) -> None:
    handler, url = engine
    recipe = write_recipe(tmp_path / "run.yaml", tree_of(tiny, tmp_path / "run", url))
    gone: list[str] = []

    def ends(path: str, body: dict[str, Any]) -> None:
        if gone or ", round 2," in str(body.get("new_version")):
            gone.append(path)
            raise ConnectionError

    handler.before = staticmethod(ends)
    stopped = limbeck.run("train", recipe)
    assert stopped.code == 2 and url in stopped.error_line and "Traceback" not in stopped.stderr
    asked = len(handler.asked())
    again = limbeck.run("train", recipe)
    # Still gone: said before anything is done.
    assert again.code == 2 and url in again.error_line and len(handler.asked()) == asked
    handler.before = staticmethod(lambda path, body: None)
    handler.restart()
    assert limbeck.run("train", recipe).code == 0
    run = RunDirectory(tmp_path / "run")
    assert ids_of(written(run)) == ids_of(written(local))
    assert len(handler.asked()) == sum(map(len, written(run)))


def test_a_gap_of_the_log_probabilities_is_an_alarm(
    engine: Engine, tiny: TinyPair, tmp_path: Path, capsys: Any
) -> None:
    handler, url = engine
    handler.lie = 0.01
    tree = tree_of(tiny, tmp_path / "run", url)
    run = run_pipeline(load_recipe(tree), stages=STAGES)
    rows = metrics(run)
    assert rows[0]["warnings"] == ["engine_gap"] and not any("warnings" in row for row in rows[1:])
    assert rows[0]["engine/gap"] == pytest.approx(0.01, rel=0.01) and rows[0]["engine/gap_limit"] == 1e-3
    assert "engine_gap: log-probabilities of the engine's tokens are 0.01 nats" in capsys.readouterr().err
    page = (run.root / "report.html").read_text("utf-8")
    assert "engine_gap" in page and "The engine that writes the student" in page


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"developer": False}, "takes no new weights: /weight_info answers HTTP 404: Not Found; start vLLM"),
        ({"versions": False}, "takes no new weights: /weight_info answers"),
        ({"deaf": True}, "says that it has the student's weights, and gives a short text log-probabilities"),
    ],
)
def test_servers_that_cannot_be_relied_on_are_refused(
    first: Path, tiny: TinyPair, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    with engine_server(first, **settings) as (handler, url), pytest.raises(LimbeckError) as error:
        trained(tree_of(tiny, tmp_path / "run", url))
    assert expected in str(error.value) and "\n" not in str(error.value) and not handler.asked()


def test_another_tokenizer_and_a_folder_that_is_not_seen_are_refused(
    engine: Engine, first: Path, tiny: TinyPair, tmp_path: Path
) -> None:
    handler, url = engine
    write_tokenizer(tmp_path / "other", extra=["Etwas ganz anderes, das hier gelernt wird."] * 50)
    from tokenizers import Tokenizer

    own = handler.state.tokenizer
    handler.state.tokenizer = Tokenizer.from_file(str(tmp_path / "other" / "tokenizer.json"))
    with pytest.raises(LimbeckError, match="has another tokenizer than the student: it reads"):
        trained(tree_of(tiny, tmp_path / "run", url))
    handler.state.tokenizer = own
    tree = tree_of(tiny, tmp_path / "run", url)
    tree["responses"]["engine"] |= {"seen_as": "/nowhere", "folder": str(tmp_path / "weights")}
    with pytest.raises(LimbeckError, match=r"the weights in /nowhere/run-\w+/000 were not loaded .*seen_as"):
        trained(tree)
    assert not handler.asked()


@dataclass
class Ranks:
    """One of several threads that meet as ranks do."""

    rank: int
    meet: threading.Barrier
    items: dict[int, list[Any]]

    @property
    def ranks(self) -> int:
        return self.meet.parties

    def gather(self, items: list[Any]) -> list[Any]:
        self.items[self.rank] = items
        self.meet.wait(20)
        found = [item for rank in range(self.ranks) for item in self.items[rank]]
        self.meet.wait(20)
        return found

    def wait(self) -> None:
        self.meet.wait(20)


@pytest.mark.parametrize("refused", [False, True])
def test_one_rank_gives_the_weights_and_all_rely_on_the_same_servers(refused: bool) -> None:
    urls = ["http://localhost:8/v1", "http://localhost:9/v1"]
    given: list[int] = []

    class Given(StudentEngine):
        def _give(self, number: int) -> tuple[str, tuple[str, ...]]:
            given.append(number)
            if refused:
                raise LimbeckError("no server took them")
            self.answers.use("round 4", urls[1:])
            return "round 4", tuple(urls[1:])

    meet, items = threading.Barrier(2), dict[int, list[Any]]()
    nothing: Any = None
    unused: dict[str, Any] = dict.fromkeys(("context", "engine", "model", "tokenizer", "folder", "seen_as"))

    def rank(number: int) -> EngineSampler | str:
        pool = ServerPool(servers=tuple(Server(base_url=url) for url in urls))
        answers = EngineSampler(pool=pool, sampler=nothing)
        engine = Given(answers=answers, batch_size=4, **unused)
        try:
            engine.take(3, Ranks(number, meet, items))
        except LimbeckError as error:
            return str(error)
        return answers

    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(rank, range(2)))
    assert given == [3]
    if refused:
        assert ends == ["no server took them"] * 2
        return
    for answers in ends:
        assert isinstance(answers, EngineSampler) and answers.version == "round 4"
        assert [server.base_url for server in answers.pool.left] == urls[1:]
