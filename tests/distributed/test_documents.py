"""Plain text that two ranks cut: the files of one process, also after one of them was killed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.test_shared_stages import content
from tests.limbeck_command import CommandServer, KillAt, all_end
from tests.tiny_pair import TinyPair

TEXT = ("responses.source=text", "responses.max_new_tokens=6", "evaluate.groups=[fidelity]")


def test_two_ranks_write_the_pieces_of_one(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    # Three lots.
    text.write_text("".join(json.dumps({"text": f"Tea {i}."}) + "\n" for i in range(2100)), "utf-8")
    one, two = tmp_path / "one", tmp_path / "two"
    recipe = tiny.recipe(one, prompts={"source": str(text), "eval_limit": 20})
    end = limbeck.run("respond", recipe, *TEXT)
    assert end.code == 0, end.stderr[-3000:]
    launch = ("respond", recipe, *TEXT, f"output_dir={two}")
    # Of three lots one of the two writes a second one: which, is a matter of a moment.
    at_its_second = KillAt(two, "responses/batches/0*.json", writes=1)
    ranks = limbeck.launch(*launch, killed=dict.fromkeys(range(2), at_its_second))
    ranks[0].wait_until(ranks[1].ended)
    assert {rank.code for rank in ranks if rank.ended()} == {-9}
    for rank in ranks:
        rank.kill()
    all_end(limbeck.launch(*launch))
    assert content(two, "responses") == content(one, "responses")
    assert not list(two.rglob("*.partial")) and not list((two / ".ranks").glob("work/*"))
