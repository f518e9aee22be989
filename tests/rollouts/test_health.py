"""What is measured on the student's responses; each alarm by a history that sets it off and one that must not."""

import itertools
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.rollouts import alarms
from limbeck.rollouts.alarms import ALARMS
from limbeck.rollouts.health import Watch, health_of, loops, rates, repeated_share, tally
from limbeck.types import Author, Response, StopReason

EOS = 2


def response(ids, stop: StopReason = "eos", author: Author = "student"):
    ids = (*ids, EOS) if stop == "eos" else tuple(ids)
    return Response(prompt_id="p", author=author, prompt_ids=(1,), response_ids=ids, stop=stop)


def test_metrics_by_hand():
    found = health_of(
        [
            response(range(10, 19)),
            response([7] * 40, stop="length"),
            response([]),
            response(range(9), stop="stop"),
            response([7] * 99, author="teacher"),
        ],
        log_q_mean=-1.5,
    )
    assert found == {
        "responses/count": 4, "responses/truncated": 0.25, "responses/repeated": 0.25, "responses/empty": 0.25,
        "responses/length": (10 + 40 + 1 + 9) / 4, "log_q/student": -1.5,
    }  # fmt: skip
    assert health_of([response([1], author="data")], log_q_mean=-1.0) == {}
    assert health_of([response([], stop="stop")])["responses/empty"] == 1


def test_tallies_add_up_over_ranks():
    rows = [response(range(n)) for n in range(5)] + [response([3] * 20, stop="length")]
    halves = [tally(rows[:2]), tally(rows[2:])]
    assert rates([sum(parts) for parts in zip(*halves, strict=True)]) == health_of(rows)
    assert rates(tally([])) == {}


def test_loops():
    text = list(range(100, 400))
    assert repeated_share([]) == repeated_share([1, 1, 1]) == 0
    assert not loops(text) and not loops([]) and not loops([5] * 5) and loops([5] * 6)
    assert loops([1, 2] * 4) and not loops([1, 2, 3, 4, 5, 1, 2, 3])
    # A loop that begins late shows in an ending, short or long; a sentence said twice, or a refrain, is no loop.
    assert loops(text + [8] * 60) and loops(text[:100] + list(range(50)) * 4)
    assert not loops(text[:40] + text[:40] + text[40:100])
    table = [x for n in range(20) for x in (1000 + n, 3, 2000 + n, 3, 3000 + n, 4)]
    assert not loops(table)


@given(st.integers(1, 60), st.integers(0, 300))
def test_a_loop_counts_once_it_has_run_four_periods(period, before):
    ids = list(range(1000, 1000 + before)) + list(range(period)) * max(5, -(-300 // period))
    assert loops(ids)


def test_it_is_fast():
    rng = random.Random(0)
    rows = [response([rng.randrange(50_000) for _ in range(512)], stop="length") for _ in range(64)]
    started = time.perf_counter()
    health_of(rows)
    assert time.perf_counter() - started < 0.5


HEALTHY = {
    "loss": 0.5, "forward_kl": 0.5, "kl_p99": 4.0, "grad_norm": 1.0, "student_entropy": 1.3, "teacher_entropy": 1.1,
    "log_q/student": -1.2, "responses/count": 16, "responses/truncated": 0.2, "responses/repeated": 0.05,
    "responses/length": 60.0, "responses/empty": 0.0,
}  # fmt: skip
NOISE = {
    "loss": 0.1, "forward_kl": 0.1, "kl_p99": 0.6, "student_entropy": 0.1, "teacher_entropy": 0.1, "log_q/student": 0.2,
    "responses/truncated": 0.1, "responses/repeated": 0.05, "responses/length": 12.0,
}  # fmt: skip


def history(moves=None, steps=200, seed=0):
    """Metrics of steps around healthy values; `moves` maps a key to a function of the step."""
    rng = random.Random(seed)
    for step in range(1, steps + 1):
        line = {"step": step} | HEALTHY
        line |= {key: move(step) for key, move in (moves or {}).items()}
        yield {key: value + rng.gauss(0, NOISE[key]) if key in NOISE else value for key, value in line.items()}


def ramp(start, end, first=60, last=120):
    return lambda step: start + (end - start) * min(1.0, max(0.0, (step - first) / (last - first)))


def fired(lines, watch=None):
    watch = watch or Watch()
    return [(line["step"], alarm.name) for line in lines for alarm in watch.see(line)]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_training_raises_nothing(seed):
    assert fired(history(steps=2000, seed=seed)) == []


GOES_OFF = {
    "repetition": {"responses/repeated": ramp(0.05, 0.8)},
    "truncation": {"responses/truncated": ramp(0.2, 1.0)},
    "length_drift": {"responses/length": ramp(60, 200)},
    "entropy_collapse": {"student_entropy": ramp(1.3, 0.2)},
    "kl_tail": {"kl_p99": ramp(4.0, 9.0)},
    "log_q_collapse": {"log_q/student": ramp(-1.2, -4.0)},
    "empty": {"responses/empty": ramp(0.0, 0.4)},
    "engine_gap": {"engine/gap": ramp(0.0, 2e-3), "engine/gap_limit": lambda step: 1e-3},
}
STAYS_QUIET = {
    # A pruned student learns to stop looping.
    "repetition": {"responses/repeated": ramp(0.7, 0.05, 0, 60)},
    "truncation": {"responses/truncated": ramp(0.95, 0.3, 0, 30)},
    # It used to ramble up to the limit; what it learned is to end.
    "length_drift": {"responses/length": ramp(256, 60, 0, 60), "responses/truncated": ramp(1.0, 0.05, 0, 60)},
    # As sharp as its teacher.
    "entropy_collapse": {"student_entropy": ramp(3.4, 0.5), "teacher_entropy": ramp(1.2, 0.6)},
    # All of it grows: that is no tail.
    "kl_tail": {"kl_p99": ramp(4.0, 9.0), "forward_kl": ramp(0.5, 1.2)},
    "log_q_collapse": {"log_q/student": ramp(-3.0, -1.0, 0, 100)},
    "empty": {"responses/empty": lambda step: 0.5 * (step % 20 == 0)},
    # What float32 never has is what bfloat16 is.
    "engine_gap": {"engine/gap": ramp(0.0, 0.09), "engine/gap_limit": lambda step: 0.1},
}


def test_every_alarm_is_tried_both_ways():
    assert set(GOES_OFF) == set(STAYS_QUIET) == set(ALARMS)


@pytest.mark.parametrize("name", ALARMS)
def test_it_goes_off_once_and_soon(name):
    (step, what), *more = fired(history(GOES_OFF[name], steps=400))
    assert what == name and 70 < step < 140 and not more


@pytest.mark.parametrize("name", ALARMS)
def test_it_does_not_go_off(name):
    assert fired(history(STAYS_QUIET[name], steps=400)) == []


@pytest.mark.parametrize("name", ALARMS)
def test_it_goes_off_again_after_recovery_alone(name):
    def wave(move):
        return lambda step: move(step) if step <= 200 else move(320 - step) if step <= 320 else move(step - 320)

    moves = {key: wave(move) for key, move in GOES_OFF[name].items()}
    found = fired(history(moves, steps=600))
    assert [what for _, what in found] == [name, name] and found[1][0] > 320


@pytest.mark.parametrize("name", ALARMS)
def test_a_level_at_the_threshold_does_not_chatter(name):
    """Noise around the threshold: once on, it stays on."""
    move = {key: (lambda step, move=move: move(96)) for key, move in GOES_OFF[name].items()}
    worst = {key: (lambda step, move=move: move(60 if step < 60 else 96)) for key, move in GOES_OFF[name].items()}
    assert len(fired(history(move, steps=2000))) <= 1 and len(fired(history(worst, steps=2000))) <= 1


def test_nothing_in_the_first_steps():
    bad = {"responses/truncated": 1.0, "responses/empty": 1.0, "responses/repeated": 1.0, "student_entropy": 0.0}
    found = fired([{"step": n} | HEALTHY | bad for n in range(1, 200)])
    assert found == [(alarms.QUIET, "truncation"), (alarms.QUIET, "empty"), (alarms.PATIENCE, "repetition")]


def test_the_message_says_what_against_what_and_the_remedy():
    watch = Watch()
    (alarm,) = itertools.chain.from_iterable(map(watch.see, history(GOES_OFF["repetition"])))
    assert alarm.message.startswith("repetition: 29%") and "29% of the student's responses loop, 3%" in alarm.message
    assert "when it was best" in alarm.message and alarm.message.endswith(ALARMS["repetition"].remedy)
    assert "\n" not in alarm.message


def test_lines_that_lack_metrics_or_hold_nonsense_change_nothing():
    lines = list(history(GOES_OFF["repetition"]))
    gaps = [
        # A step on the teacher's text.
        {"step": 0, "loss": 9.0, "kl_p99": 90.0, "student_entropy": 0.0},
        {"step": 0, "responses/count": 4, "responses/repeated": None, "loss": float("nan"), "kl_p99": float("inf")},
    ]
    between = [line for pair in zip(lines, itertools.cycle(gaps)) for line in pair]
    assert fired(lines) == fired(between)


def test_few_responses_a_step_are_smoothed_longer():
    rng = random.Random(1)
    lines = [
        {"step": n, "responses/count": 1, "responses/repeated": float(rng.random() < 0.15)} for n in range(1, 4000)
    ]
    assert fired(lines) == []
    lines += [{"step": n, "responses/count": 1, "responses/repeated": 1.0} for n in range(4000, 4060)]
    assert [name for _, name in fired(lines)] == ["repetition"]


@pytest.mark.parametrize("cut", [1, 9, 10, 19, 65, 97, 150])
def test_a_resumed_watch_is_the_one_that_was_never_interrupted(cut):
    moves = {key: move for name in ALARMS for key, move in GOES_OFF[name].items()}
    lines = list(history(moves))
    whole, first, second = Watch(), Watch(), Watch()
    expected = [whole.see(line) for line in lines]
    before = [first.see(line) for line in lines[:cut]]
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + [second.see(line) for line in lines[cut:]] == expected
    assert second.state() == whole.state()
    assert len({alarm.name for some in expected for alarm in some}) == len(ALARMS)


def test_the_page_explains_every_alarm():
    page = (Path(__file__).resolve().parents[2] / "docs" / "on-policy.md").read_text("utf-8")
    _, page = page.split("## The alarms")
    page, *_ = page.split("\n## ")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(ALARMS)


def test_no_torch_is_needed():
    code = "import limbeck.rollouts.health, limbeck.rollouts.monitor, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
