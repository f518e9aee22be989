"""Axis marks, smoothing and thinning."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.report.charts import charts
from limbeck.report.curves import axis, path, smooth, thin, tight_axis
from limbeck.report.format import count, duration, figure, memory, share
from limbeck.report.read_run import read_run
from tests.report.synthetic import write_run

numbers = st.floats(-1e9, 1e9, allow_nan=False, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-9 else x)


@given(st.lists(numbers, min_size=1, max_size=30), st.booleans(), st.integers(2, 8))
def test_an_axis_holds_its_values_between_round_marks(values, zero, marks):
    made = axis(values, marks=marks, zero=zero)
    slack = 1e-6 * max(abs(made.low), abs(made.high))
    assert made.low - slack <= min(values) and max(values) <= made.high + slack
    assert 2 <= len(made.marks) <= 2 * marks + 2
    assert all(a < b for a, b in zip(made.marks, made.marks[1:], strict=False))
    if zero and min(values) >= 0:
        assert made.low == 0


def test_round_marks_by_hand():
    assert axis([0.1, 2.1], marks=5, zero=True).marks == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert axis([0, 0], zero=True).marks[-1] == 1.0
    assert tight_axis([1, 160], marks=4).marks == (50, 100, 150)
    assert tight_axis([7, 7]).marks == (7,)


@given(st.lists(numbers, min_size=1, max_size=60), st.integers(1, 20))
def test_smoothing_equals_the_mean_of_the_window(values, window):
    half = window // 2
    for n, mean in enumerate(smooth(values, window)):
        part = values[max(0, n - half) : n + half + 1]
        assert mean == pytest.approx(math.fsum(part) / len(part), rel=1e-6, abs=1e-4)


@given(st.lists(numbers, min_size=1, max_size=300), st.integers(6, 40))
def test_thinning_keeps_the_peaks_and_the_ends(values, most):
    kept = thin(values, most)
    assert kept == sorted(set(kept)) and len(kept) <= max(most, 2)
    picked = [values[n] for n in kept]
    assert min(picked) == min(values) and max(picked) == max(values)
    assert kept[0] == 0 and kept[-1] == len(values) - 1


def test_paths_and_words():
    assert path([(0, 1), (2.04, 3)]) == "M0.0,1.0L2.0,3.0"
    assert [figure(v) for v in (0, 2.1034, 0.4, 123.4, 1234567, 3e-7, -0.05, None)] == [
        "0", "2.10", "0.400", "123", "1.23e6", "3e-7", "-0.0500", "n/a",
    ]  # fmt: skip
    assert [count(v) for v in (12, 999.7, 61_144, 134_515_008, 7e9)] == ["12", "1k", "61.1k", "135M", "7B"]
    assert [share(v) for v in (0.684, 0.05, 1)] == ["68 %", "5.0 %", "100 %"]
    assert [duration(v).replace("\u00a0", " ") for v in (1.23, 59, 254.9, 7300)] == [
        "1.2 s", "59 s", "4 min 15 s", "2 h 01 min",
    ]  # fmt: skip
    assert [memory(v) for v in (310, 3650.2)] == ["310 MiB", "3.56 GiB"]


def test_curves_that_repeat_the_loss_are_left_out(tmp_path):
    run_dir = write_run(tmp_path / "run", steps=30)
    assert [chart.name for chart in charts(read_run(run_dir))] == [
        "loss", "forward_kl", "student_entropy", "learning_rate", "grad_norm", "tokens_per_s",
    ]  # fmt: skip
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps(row | {"forward_kl": row["loss"] * (1 + 1e-6)}) + "\n" for row in rows))
    assert "forward_kl" not in [chart.name for chart in charts(read_run(run_dir))]
