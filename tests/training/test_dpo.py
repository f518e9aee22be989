"""Preference tuning is DPO as the paper writes it, on the very ids of the pairs; its checkpoints hold no pickles."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from limbeck.models.loading import LoadedModel, load_model
from limbeck.recipe.preference import PreferenceSection
from limbeck.rollouts.preference.pairs import PreferencePair
from limbeck.runtime.console import PlainConsole
from limbeck.training import dpo_checkpoints
from limbeck.training.dpo import dpo_steps, tune_preferences
from limbeck.types import Interrupted, Json, LimbeckError, Response
from tests.tiny_pair import TinyPair

SETTINGS = PreferenceSection(per_device_train_batch_size=4, learning_rate=1e-3, num_train_epochs=2.0, save_steps=1)


def pairs(count: int = 10) -> list[PreferencePair]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (length,), generator=generator).tolist())

    made = []
    for i in range(count):
        asked = ids(4 + i % 3)
        chosen, rejected = (
            Response(prompt_id=f"p{i}", author="student", prompt_ids=asked, response_ids=ids(n), stop="eos", round=n)
            for n in (3 + i % 2, 5)
        )
        made.append(PreferencePair(chosen=chosen, rejected=rejected))
    return made


def play(
    tiny: TinyPair, folder: Path, settings: PreferenceSection = SETTINGS, stop: Callable[[], bool] = lambda: False
) -> tuple[LoadedModel, list[Json]]:
    loaded = load_model(str(tiny.teacher))
    rewards = tune_preferences(
        loaded.model,
        loaded.tokenizer,
        pairs(),
        settings,
        seed=0,
        device=torch.device("cpu"),
        checkpoints=folder,
        console=PlainConsole(),
        should_stop=stop,
    )
    return loaded, rewards


def logp(model: Any, response: Response) -> torch.Tensor:
    """The naive line: one answer, all logits, the sum over its tokens."""
    ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
    logp_TV = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logp_TV.gather(1, ids[0, 1:, None])[-len(response.response_ids) :].sum()


def gap(model: Any, pair: PreferencePair) -> torch.Tensor:
    return logp(model, pair.chosen) - logp(model, pair.rejected)


def test_the_loss_of_the_paper_on_the_ids_of_the_pairs(tiny: TinyPair, tmp_path: Path) -> None:
    whole = replace(SETTINGS, per_device_train_batch_size=10, num_train_epochs=3.0, warmup_ratio=0.0, max_grad_norm=0.0)
    whole = replace(whole, lr_scheduler_type="constant")
    tuned, rewards = play(tiny, tmp_path / "dpo", whole)
    model, reference = (load_model(str(tiny.teacher)).model for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for row in rewards:
        margins = whole.beta * torch.stack([gap(model, p) - gap(reference, p).detach() for p in pairs()])
        assert row["rewards/margins"] == pytest.approx(margins.mean().item(), abs=1e-4)
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(tuned.model.state_dict()[name], value, atol=2e-4, rtol=1e-3)
    assert rewards[-1]["rewards/margins"] > rewards[0]["rewards/margins"] == 0.0


def test_stopped_and_continued_is_the_same_to_the_last_bit(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: loaded.append("pickle"))
    monkeypatch.setattr(torch, "save", lambda *a, **k: loaded.append("pickle"))
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: loaded.append("telemetry"))
    plain, rewards = play(tiny, tmp_path / "plain")
    assert [row["step"] for row in rewards] == [1, 2, 3, 4, 5, 6]
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 4

    with pytest.raises(Interrupted, match="after step 4 of 6"):
        play(tiny, tmp_path / "stopped", stop=stop)
    # What a kill leaves of a checkpoint that was being written: it is no checkpoint.
    (tmp_path / "stopped" / "checkpoint-5").mkdir()
    (tmp_path / "stopped" / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    continued, again = play(tiny, tmp_path / "stopped")
    ended, last = play(tiny, tmp_path / "stopped")
    assert rewards == again == last
    for other in (continued, ended):
        assert all(torch.equal(plain.model.state_dict()[n], v) for n, v in other.model.state_dict().items())
    assert not loaded
    assert [path.name for path in sorted((tmp_path / "stopped").iterdir())] == ["checkpoint-5", "checkpoint-6"]
    assert {path.suffix for path in (tmp_path / "stopped").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert plain.model.config.to_dict() == load_model(str(tiny.teacher)).model.config.to_dict()


def test_a_damaged_checkpoint_is_passed_over(tiny: TinyPair, tmp_path: Path) -> None:
    play(tiny, tmp_path / "run")
    newest, before = tmp_path / "run" / "checkpoint-6", tmp_path / "run" / "checkpoint-5"
    said: list[str] = []
    assert dpo_checkpoints.last_whole(tmp_path / "run", said.append) == newest and not said
    data = (newest / "optimizer.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert dpo_checkpoints.last_whole(tmp_path / "run", said.append) == before
    assert "checkpoint-6 is damaged (optimizer.safetensors is not what was written)" in said[0]
    (before / "sealed.json").write_text(json.dumps({"step": 5}))
    assert dpo_checkpoints.last_whole(tmp_path / "run", said.append) is None


def test_a_loss_that_is_no_number_ends_it_with_the_remedy(tiny: TinyPair, tmp_path: Path) -> None:
    with pytest.raises(LimbeckError, match=r"the loss is nan at step \d; lower preference.learning_rate"):
        play(tiny, tmp_path / "run", replace(SETTINGS, learning_rate=1e30, warmup_ratio=0.0))


@pytest.mark.parametrize(
    ("count", "changes", "steps"),
    (
        (10, {}, 6),
        (10, {"gradient_accumulation_steps": 2}, 4),
        (9, {"max_steps": 2}, 2),
        (8, {"num_train_epochs": 0.5}, 1),
    ),
)
def test_steps_of_a_training(count: int, changes: dict[str, Any], steps: int) -> None:
    assert dpo_steps(replace(SETTINGS, **changes), count) == steps
