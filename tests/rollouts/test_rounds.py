"""A round on disk: its table, which holds what its batches hold, and what a training has of it in memory."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from limbeck.rollouts.asked import scratch_table
from limbeck.rollouts.pairs import PairedSource
from limbeck.rollouts.rounds import Rounds
from limbeck.rollouts.sources import SourceContext, StepCounter
from limbeck.rollouts.table import ResponseTable, keep_columns, open_responses
from limbeck.runtime.records import read_sealed
from limbeck.types import LimbeckError, Response, Sampling
from tests.sampling.writing import FakeSampler, Together, base_of, on_ranks, own_of, pen_of, played, prompts_of

SAMPLING = Sampling(max_new_tokens=12, seed=3)


def written_in(folder: Path, sampler: FakeSampler | None = None) -> list[Response]:
    rounds = Rounds(folder=folder)
    return list(rounds.write(0, "student", sampler or FakeSampler(), prompts_of(10), SAMPLING))


def test_the_order_is_that_of_the_prompts_whatever_the_batches(tmp_path):
    class LongestFirst(FakeSampler):
        def plan(self, prompts: Any, sampling: Sampling) -> list[tuple[int, ...]]:
            rows = sorted(range(len(prompts)), key=lambda row: -len(prompts[row].ids))
            return [tuple(rows[i : i + 3]) for i in range(0, len(rows), 3)]

    found = written_in(tmp_path / "a", LongestFirst())
    assert [one.prompt_id for one in found] == [prompt.id for prompt in prompts_of(10)]
    assert found == written_in(tmp_path / "b") and all(one.round == 1 for one in found)
    assert found == written_in(tmp_path / "a", LongestFirst(weights=5)), "nothing is written twice"


@pytest.mark.parametrize("harm", ["missing", "cut off", "another", "of an older version"])
def test_a_table_that_is_not_what_was_written_is_made_of_the_batches_again(tmp_path: Path, harm: str) -> None:
    found = written_in(tmp_path)
    folder = tmp_path / "000" / "student"
    table, record = folder / "round.arrow", folder / "round.json"
    whole, known = table.read_bytes(), read_sealed(record)["files"]
    assert set(known) == {path.name for path in folder.iterdir()} - {"round.json"}
    if harm == "cut off":
        table.write_bytes(whole[: len(whole) // 2])
    elif harm == "another":
        keep_columns(table, found[::-1])
    else:
        table.unlink()
    if harm == "of an older version":
        from limbeck.runtime.files import write_json
        from limbeck.runtime.records import sealed

        write_json(record, sealed({"files": {name: sha for name, sha in known.items() if name != table.name}}))
    late = FakeSampler(weights=9)
    assert written_in(tmp_path, late) == found and not late.drawn
    assert table.read_bytes() == whole and read_sealed(record)["files"] == known


def test_a_damaged_batch_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """The first rank reads the batches; the others do not wait for it."""
    written_in(tmp_path)
    folder = tmp_path / "000" / "student"
    (folder / "round.json").unlink()
    path = folder / "00001.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"stop": "eos"})
    path.write_text("\n".join(lines) + "\n")

    def work(world: Together) -> Any:
        return Rounds(folder=tmp_path, world=world).write(0, "student", FakeSampler(), prompts_of(10), SAMPLING)

    ends = on_ranks(2, work)
    assert all(isinstance(end, LimbeckError) and f"{path} is damaged" in str(end) for end in ends), ends


def in_memory() -> int:
    gc.collect()
    return sum(type(one) is Response for one in gc.get_objects())


@pytest.mark.parametrize("kind", ["student", "pairs"])
def test_of_a_round_the_rows_of_a_step_are_in_memory(tmp_path: Path, kind: str) -> None:
    """Prompts and first responses on disk too, as in a run: of 600 prompts no 600 responses are ever kept."""
    prompts = scratch_table(tmp_path, prompts_of(600))
    keep_columns(tmp_path / "base.arrow", base_of(prompts_of(600)))
    base = open_responses(tmp_path / "base.jsonl")
    before = in_memory()
    sampler = FakeSampler(batch_size=50)
    rollout = pen_of(sampler, tmp_path / "rounds", refresh=None)
    context = SourceContext(step_rows=20, seed=11)
    if kind == "student":
        from limbeck.rollouts.student import StudentSource

        source = StudentSource(prompts, rollout, context)
    else:
        source = PairedSource(base, prompts, rollout, context)
    total = source.steps_per_epoch
    seen: set[str] = set()
    for step in range(total):
        responses = source.step(StepCounter(step=step, total=total))
        assert in_memory() - before <= len(responses) + 2
        seen |= {one.prompt_id for one in responses.values()}
    assert len(seen) == 600
    assert isinstance(open_responses(tmp_path / "rounds/000/student/round.jsonl"), ResponseTable)


def test_prompts_on_disk_or_in_memory_make_the_same_steps(tmp_path: Path) -> None:
    asked, listed = scratch_table(tmp_path, prompts_of(10)), prompts_of(10)
    for number, refresh in enumerate((2, None)):
        steps = [
            played(own_of(FakeSampler(), tmp_path / f"{number}{name}", refresh=refresh, asked=some), range(6), 6)
            for name, some in (("a", asked), ("b", listed))
        ]
        assert steps[0] == steps[1]
