"""The loop: one update however the batch is cut, and a run that continues is the run that was never interrupted."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from limbeck.models.heads import project
from limbeck.objectives import AdaptiveTemperature, Temperature, build_objective
from limbeck.rollouts.collate import collate
from limbeck.rollouts.order import Plan
from limbeck.student.adapters import LoraSpec
from limbeck.student.build import StudentSpec, build_student
from limbeck.training import checkpoints, gradients
from limbeck.training.run import NonFiniteError
from limbeck.training.step_measures import with_median
from limbeck.types import Interrupted, LimbeckError
from tests.tiny_pair import write_model
from tests.training.play import (
    VOCAB,
    FailingTeacher,
    identical,
    largest_gap,
    metrics,
    play,
    settings,
    stop_after,
    tiny_lora,
    tiny_model,
    tiny_responses,
    tiny_teacher,
    weights,
)

CUTS = ((8, 1), (4, 2), (2, 4), (1, 8))


@pytest.mark.parametrize("tied", [True, False])
def test_the_update_does_not_depend_on_how_the_batch_is_cut(tmp_path, tied):
    ends, lines = {}, {}
    start = weights(tiny_model(1, tied=tied))
    for size, accumulation in CUTS:
        folder = tmp_path / f"{size}x{accumulation}"
        folder.mkdir()
        chosen = settings(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        ends[size] = weights(play(tiny_model(1, tied=tied), folder, chosen))
        lines[size] = metrics(folder)
    assert largest_gap(start, ends[8]) > 1e-3
    for size, _ in CUTS[1:]:
        assert largest_gap(ends[8], ends[size]) < 1e-6
        for one, other in zip(lines[8], lines[size], strict=True):
            assert one["tokens"] == other["tokens"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("tokens", "packing"), [(25, False), (70, False), (70, True), (None, True)])
def test_the_update_does_not_depend_on_a_budget_of_tokens_or_on_packing(tmp_path, tokens, packing):
    ends, lines, shapes = {}, {}, {}
    for name, changes in {"rows": {}, "other": {"max_tokens_per_batch": tokens, "packing": packing}}.items():
        folder = tmp_path / name
        folder.mkdir()
        teacher = FailingTeacher(1000)
        chosen = settings(per_device_train_batch_size=4, gradient_accumulation_steps=2, **changes)
        ends[name] = weights(play(tiny_model(1), folder, chosen, teacher=teacher))
        lines[name], shapes[name] = metrics(folder), teacher.shapes
    assert largest_gap(ends["rows"], ends["other"]) < 1e-6
    for one, other in zip(lines["rows"], lines["other"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["padding"] > 0 and (other["padding"] == 0.0 or not packing)
    if tokens and not packing:
        assert all(rows == 1 or rows * width <= tokens for rows, width in shapes["other"])
        assert any(rows * width > tokens for rows, width in shapes["rows"]) or len(shapes["other"]) < len(
            shapes["rows"]
        )


def naive_gradient(rows, cut, normalise):
    """Gradients of a step by plain autograd; `normalise` gives the divisor of a micro-batch from its tokens."""
    student, teacher, responses, tau = tiny_model(1), tiny_teacher(), tiny_responses(), 2.0
    losses = []
    for start in range(0, len(rows), cut):
        batch = collate(responses, rows[start : start + cut], pad_id=0)
        logits_NV = student(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits[
            batch.loss_mask_BT
        ][:, :VOCAB]
        log_q_NV = (logits_NV / tau).log_softmax(-1)
        log_p_NV = (project(teacher.head, teacher.signal(batch).hidden_ND) / tau).log_softmax(-1)
        kl_N = tau**2 * F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1)
        losses.append(kl_N.sum() / normalise(len(kl_N)))
    loss = torch.stack(losses).sum()
    loss.backward()
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))
    return loss.item(), norm.item()


def test_loss_and_gradient_are_those_of_the_mean_over_the_steps_tokens(tmp_path):
    responses = tiny_responses()
    rows = Plan.of(responses, step_rows=8, seed=0).epoch(0)[0]
    tokens = sum(len(responses[row].response_ids) for row in rows)
    play(tiny_model(1), tmp_path, settings(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1))
    (line,) = metrics(tmp_path)
    loss, norm = naive_gradient(rows, 8, lambda n: n)
    assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4))
    assert line["tokens"] == tokens
    # The usual mistake, a mean of the micro-batches' means, would show.
    _, wrong_norm = naive_gradient(rows, 2, lambda n: 4 * n)
    assert abs(wrong_norm - norm) > 0.01 * norm


def test_a_step_shorter_than_a_micro_batch_has_its_own_divisor(tmp_path):
    responses = tiny_responses(11)
    play(tiny_model(1), tmp_path, settings(max_steps=None, num_train_epochs=1.0), responses=responses)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[-1]["tokens"] == sum(len(r.response_ids) for r in responses)
    assert lines[-1]["epoch"] == 1.0


def test_a_learned_projection_is_part_of_the_checkpoint(tmp_path):
    objective = build_objective("sum", parts=[{"name": "fkl"}, {"name": "hidden", "kind": "mse"}])
    chosen = settings(save_steps=2)
    for folder in ("straight", "broken"):
        (tmp_path / folder).mkdir()
    straight = play(tiny_model(1), tmp_path / "straight", chosen, objective=objective)
    with pytest.raises(Interrupted):
        play(tiny_model(1), tmp_path / "broken", chosen, objective=objective, should_stop=stop_after(3))
    newest = checkpoints.usable(tmp_path / "broken" / "checkpoints")
    assert newest is not None
    stored = load_file(newest / "model.safetensors")
    assert stored["projection_ED"].shape == (48, 32)
    broken = play(tiny_model(1), tmp_path / "broken", chosen, objective=objective)
    assert identical(weights(straight), weights(broken))
    assert metrics(tmp_path / "straight")[-1]["loss"] == metrics(tmp_path / "broken")[-1]["loss"]


STUDENTS = {
    "full": lambda: tiny_model(1),
    "untied": lambda: tiny_model(1, tied=False, family="qwen2"),
    "lora": lambda: tiny_lora(1),
    "dropout": lambda: tiny_lora(1, dropout=0.5),
}


def interrupted_by_wish(make, folder, chosen):
    with pytest.raises(Interrupted, match="after step 2 of 5"):
        play(make(), folder, chosen, should_stop=stop_after(2))
    # What happens to stand in the generators of the next process must not matter.
    torch.rand(3)
    return play(make(), folder, chosen)


def interrupted_by_force(make, folder, chosen):
    steps = chosen.gradient_accumulation_steps
    with pytest.raises(ConnectionAbortedError):
        play(make(), folder, chosen, teacher=FailingTeacher(4 * steps))
    torch.rand(3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    return play(make(), folder, chosen)


@pytest.mark.parametrize("kind", STUDENTS)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("interrupted", [interrupted_by_wish, interrupted_by_force])
def test_a_run_that_continues_is_the_run_that_was_never_interrupted(tmp_path, kind, bf16, interrupted):
    make = STUDENTS[kind]
    chosen = settings(per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=3, bf16=bf16)
    for folder in ("straight", "broken"):
        (tmp_path / folder).mkdir()
    straight = weights(play(make(), tmp_path / "straight", chosen))
    torch.rand(5)
    broken = weights(interrupted(make, tmp_path / "broken", chosen))
    assert identical(straight, broken)
    assert not identical(straight, weights(make()))
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in metrics(folder)]
        for folder in (tmp_path / "straight", tmp_path / "broken")
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[0]] == [1, 2, 3, 4, 5]


def test_a_run_killed_before_its_first_checkpoint_starts_over_the_same_way(tmp_path):
    make, chosen = STUDENTS["dropout"], settings()
    for folder in ("straight", "broken"):
        (tmp_path / folder).mkdir()
    straight = weights(play(make(), tmp_path / "straight", chosen))
    with pytest.raises(ConnectionAbortedError):
        play(make(), tmp_path / "broken", chosen, teacher=FailingTeacher(2))
    assert identical(straight, weights(play(make(), tmp_path / "broken", chosen)))
    assert [line["step"] for line in metrics(tmp_path / "broken")] == [1, 2, 3, 4, 5]


def test_dropout_follows_the_seed(tmp_path):
    ends = {}
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        # One step over all rows, so that the seed cannot show through the order of the data.
        chosen = settings(seed=seed, max_steps=1, per_device_train_batch_size=22)
        ends[seed] = weights(play(tiny_lora(1, dropout=0.5), tmp_path / str(seed), chosen))
    assert largest_gap(ends[0], ends[1]) > 1e-5


def test_checkpoints_are_pruned_and_partial_ones_ignored(tmp_path):
    play(tiny_model(1), tmp_path, settings(save_steps=1, save_total_limit=2, max_steps=5))
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000003", "step-000004"]
    (folder / ".step-000005.partial").mkdir()
    newest = checkpoints.usable(folder)
    assert newest is not None and newest.name == "step-000004"


def test_a_wish_to_stop_in_the_last_step_lets_the_run_end(tmp_path):
    play(tiny_model(1), tmp_path, settings(max_steps=3), should_stop=stop_after(3))
    assert len(metrics(tmp_path)) == 3


def test_lora_trains_the_adapters_alone(tmp_path):
    student = tiny_lora(1)
    before = weights(student)
    after = weights(play(student, tmp_path, settings(save_steps=4)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    kept = load_file(tmp_path / "checkpoints" / "step-000004" / "model.safetensors")
    assert kept and all("lora_" in name for name in kept)


def test_a_median_is_of_a_pass_without_dropout_whatever_the_micro_batches(tmp_path, monkeypatch):
    """Where nothing is dropped, the pass in training has the same one, and none comes before it."""
    found = []

    def recorded(*given, **named):
        looked = with_median(*given, **named)
        assert looked.temperature.adapt is not None
        found.append(looked.temperature.adapt.median)
        return looked

    monkeypatch.setattr(gradients, "with_median", recorded)
    adapting = Temperature(loss=2.0, adapt=AdaptiveTemperature())
    for dropout, rows in ((0.5, 8), (0.5, 4), (0.0, 8)):
        chosen = settings(max_steps=1, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows)
        play(tiny_lora(1, dropout=dropout), tmp_path / f"{dropout} {rows}", chosen, temperature=adapting)
    assert len(found) == 2 and found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("lora", [None, LoraSpec(r=4)])
def test_gradient_checkpointing_makes_the_same_update(tmp_path, lora):
    folder = write_model(tmp_path / "model")
    ends = []
    for on in (False, True):
        spec = StudentSpec(model=str(folder), gradient_checkpointing=on, lora=lora)
        (tmp_path / str(on)).mkdir()
        ends.append(weights(play(build_student(spec).model, tmp_path / str(on), settings(max_steps=3))))
    assert largest_gap(*ends) < 1e-6


def test_bf16_stays_close_to_float32(tmp_path):
    lines = []
    for bf16 in (False, True):
        (tmp_path / str(bf16)).mkdir()
        student = play(tiny_model(1), tmp_path / str(bf16), settings(bf16=bf16))
        assert {p.dtype for p in student.parameters()} == {torch.float32}
        lines.append([line["loss"] for line in metrics(tmp_path / str(bf16))])
    assert lines[0] != lines[1]
    assert lines[0] == pytest.approx(lines[1], rel=0.03)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_student_whose_weights_are_not_finite_stops_at_once(tmp_path, bad):
    student = tiny_model(1)
    with torch.no_grad():
        next(p for n, p in student.named_parameters() if "down_proj" in n)[0, 0] = bad
    before = weights(student)
    with pytest.raises(NonFiniteError, match=r"step 1: .*the start") as error:
        play(student, tmp_path, settings())
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[n].nan_to_num(), p.nan_to_num()) for n, p in weights(student).items())


def test_nan_in_the_middle_keeps_the_last_good_checkpoint(tmp_path):
    student = tiny_model(1)
    with pytest.raises(NonFiniteError, match=r"step 4: .*step-000003") as error:
        play(student, tmp_path, settings(save_steps=1), teacher=FailingTeacher(3, nan=True))
    assert "learning_rate" in str(error.value)
    kept = load_file(tmp_path / "checkpoints" / "step-000003" / "model.safetensors")
    now = {f"student.{name}": parameter for name, parameter in weights(student).items()}
    assert kept and all(torch.equal(tensor, now[name]) for name, tensor in kept.items())
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("last", [1, 5])
def test_a_step_that_ruins_the_student_is_neither_kept_nor_handed_on(tmp_path, last):
    """Its own loss was finite: that of the weights it made is not."""
    beyond = settings(learning_rate=1e30, warmup_steps=0, save_steps=1, max_steps=last, max_grad_norm=0.0)
    with pytest.raises(NonFiniteError, match=r"step 1: after the update .*the start.*--update"):
        play(tiny_model(1), tmp_path, beyond)
    assert checkpoints.usable(tmp_path / "checkpoints") is None


def test_another_number_of_ranks_does_not_continue_in_another_place(tmp_path):
    chosen = settings(per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=2)
    with pytest.raises(Interrupted):
        play(tiny_model(1), tmp_path, chosen, should_stop=stop_after(2))
    with pytest.raises(LimbeckError, match=r"8 responses per step and this launch has 4; launch 2 processes again"):
        play(tiny_model(1), tmp_path, settings(per_device_train_batch_size=4, save_steps=2))


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match="response"):
        play(tiny_model(1), tmp_path, settings(), responses=[])


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match="no trainable weights"):
        play(tiny_model(1).requires_grad_(False), tmp_path, settings())


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(LimbeckError, match="'wandbb'"):
        play(tiny_model(1), tmp_path, settings(report_to=("wandbb",)))


def test_metrics_say_what_happened(tmp_path):
    play(tiny_model(1), tmp_path, settings(logging_steps=2))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(0 <= line["padding"] < 1 and line["tokens_per_s"] > 0 for line in lines)
    # A warm-up of two steps that starts above zero, then down to just above zero.
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 0.5e-3, 0.25e-3])
    assert json.dumps(lines)


def test_the_loss_falls(tmp_path):
    play(tiny_model(1), tmp_path, settings(max_steps=30, learning_rate=1e-2))
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
