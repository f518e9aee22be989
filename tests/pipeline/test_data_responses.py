"""Answers of the data: written a lot at a time as at once, in memory that does not grow with the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from limbeck.models.loading import load_tokenizer
from limbeck.pipeline import data_responses
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stages import prompts as prompts_stage
from limbeck.pipeline.stages import respond as respond_stage
from limbeck.prompts.sources import load_prompts
from limbeck.prompts.templates import encode_prompts, encode_responses
from limbeck.recipe.load import load_recipe
from limbeck.rollouts import table
from limbeck.rollouts.io import write_responses
from limbeck.rollouts.table import keep_responses, open_responses
from limbeck.runtime.memory import give_back_freed, peak_memory_mib, reset_peak_memory, resident_memory
from limbeck.types import Json, LimbeckError, Response
from tests.tiny_pair import TinyPair, write_model, write_prompts

WINDOW, ANSWER = 128, 12
# Bytes for each further row that the two stages may take at most.
PER_ROW = {"prompts": 1000, "respond": 1000}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair.write(tmp_path_factory.mktemp("pair"))


def rows() -> list[dict[str, Any]]:
    """Conversations, some of them too long and some asked twice."""
    every = []
    for i in range(40):
        turns = [f"What is {i}?", f"{i} is a number.", f"Is {i} even{'? Say why' * (20 if i % 9 == 4 else 0)}?"]
        roles = ["user", "assistant", "user"]
        asked = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        every.append({"messages": [*asked, {"role": "assistant", "content": "No." if i % 2 else "Yes, it is even."}]})
    return [*every, *every[5:9]]


def context_of(tiny: TinyPair, out: Path, data: list[dict[str, Any]], **prompts: Any) -> RunContext:
    source = write_prompts(out.with_suffix(".jsonl"), data)
    tree = tiny.tree(
        out,
        prompts={"source": str(source), "too_long": "drop", **prompts},
        responses={"source": "data", "max_new_tokens": ANSWER},
    )
    return RunContext(load_recipe(tree))


def at_once(context: RunContext, loss_on: Any) -> tuple[list[Response], Json]:
    """The naive lines: all prompts are encoded, those that do not fit left out, and the others' answers encoded."""
    section = context.recipe.prompts
    prompts = load_prompts(section.source, heldout_fraction=section.eval_fraction).prompts
    tokenizer = load_tokenizer(context.recipe.teacher.model)
    encoded = encode_prompts(prompts, tokenizer)
    fitting = [p for p, e in zip(prompts, encoded, strict=True) if len(e.ids) <= WINDOW - ANSWER]
    responses = encode_responses(fitting, tokenizer, max_new_tokens=ANSWER, loss_on=loss_on)
    return responses, {
        "template": "chat",
        "responses": len(responses),
        "empty": 0,
        "dropped_too_long": len(prompts) - len(fitting),
        "ended": sum(r.stop != "length" for r in responses),
        "tokens": sum(r.tokens for r in responses),
    }


@pytest.mark.parametrize("loss_on", ["all", "last"])
@pytest.mark.parametrize("lot", [1, 7, 1000])
def test_what_is_written_in_lots_is_what_is_written_at_once(
    tiny: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lot: int,
    loss_on: str,
) -> None:
    monkeypatch.setattr(data_responses, "LOT", lot)
    context = context_of(tiny, tmp_path / "run", rows(), loss_on=loss_on)
    assert prompts_stage.STAGE.run(context)["duplicates"] == 4
    record = respond_stage.STAGE.run(context)
    responses, naive = at_once(context, loss_on)
    assert record == naive and naive["dropped_too_long"] == 4 and 0 < naive["ended"] < len(responses)
    said = f"{len(responses) - naive['ended']} of the data's {len(responses)} answers have more than {ANSWER} tokens"
    assert f"warning: {said} and are cut there, without an end (responses.max_new_tokens)" in capsys.readouterr().err
    folder = context.run.responses
    write_responses(tmp_path / "naive.jsonl", responses)
    keep_responses(tmp_path / "kept.jsonl", responses)
    assert (folder / "data.jsonl").read_bytes() == (tmp_path / "naive.jsonl").read_bytes()
    assert (folder / "data.arrow").read_bytes() == (tmp_path / "kept.arrow").read_bytes()
    assert list(open_responses(folder / "data.jsonl")) == responses


def test_messages_count_over_all_lots(tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_responses, "LOT", 3)
    context = context_of(tiny, tmp_path / "run", rows(), too_long="error")
    prompts_stage.STAGE.run(context)
    with pytest.raises(LimbeckError, match=r"expected at most 116 \(window 128 .*\), and 3 more are too long; lower"):
        respond_stage.STAGE.run(context)
    assert not context.run.responses.exists()


def test_empty_answers_of_a_split_leave_no_file(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_responses, "LOT", 3)
    data = [{"prompt": f"What is {i}?", "completion": " "} for i in range(20)]
    context = context_of(tiny, tmp_path / "run", data, template="plain", too_long="error")
    prompts_stage.STAGE.run(context)
    monkeypatch.setattr(data_responses, "encode_responses", lambda lot, *_, **__: [empty_answer_to(p) for p in lot])
    with pytest.raises(LimbeckError, match="all train responses are empty: the data ended every answer at once"):
        respond_stage.STAGE.run(context)
    assert not list(context.run.responses.iterdir())


def empty_answer_to(prompt: Any) -> Response:
    return Response(
        prompt_id=prompt.id, author="data", prompt_ids=(5,), response_ids=(2,), stop="eos", split=prompt.split
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """A row has 1,200 characters and as many tokens, which would take 2 kB as text and 10 kB as numbers."""
    command = [sys.executable, "-m", "tests.pipeline.test_data_responses", str(tmp_path)]
    peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    few, many = sorted(map(int, peaks))
    for stage, most in PER_ROW.items():
        assert (peaks[str(many)][stage] - peaks[str(few)][stage]) / (many - few) < most, (stage, peaks)


def peaks_of(folder: Path) -> dict[int, dict[str, int]]:
    """The most bytes that the two stages take on few rows and on many, beside what was there before."""
    data_responses.LOT = table.ROWS = 128
    tiny = TinyPair(teacher=write_model(folder / "teacher", window=4096), prompts=folder)
    found: dict[int, dict[str, int]] = {}
    # The first one takes what any takes.
    for count in (300, 500, 4500):
        answers = [{"prompt": f"{i}", "completion": f"{i:x} {'xyzzy' * 240}"} for i in range(count)]
        source = write_prompts(folder / f"{count}.jsonl", answers)
        tree = tiny.tree(
            folder / str(count),
            prompts={"source": str(source), "template": "plain"},
            responses={"source": "data", "max_new_tokens": 2048},
        )
        context, found[count] = RunContext(load_recipe(tree)), {}
        _ = context.teacher.tokenizer
        for stage in (prompts_stage, respond_stage):
            give_back_freed()
            before = resident_memory()
            reset_peak_memory()
            stage.STAGE.run(context)
            found[count][stage.STAGE.name] = peak_memory_mib() * 2**20 - before
    del found[300]
    return found


if __name__ == "__main__":
    print(json.dumps(peaks_of(Path(sys.argv[1]))))
