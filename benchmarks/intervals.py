"""How often intervals hold the truth and equal arms are called separated, simulated where the truth is known.

    python -m benchmarks.intervals                # minutes; writes docs/results/intervals.md
    python -m benchmarks.intervals --trials 40 --page ""

A score of a run is simulated from one value per example. A comparison is simulated from six arms that are equal in
truth, three seeds each, 100 examples: the value of a run at an example is its example's, plus its seed's, plus its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from limbeck.compare.uncertainty import Resampled, ResampledMetric, draws
from limbeck.evaluation.scores.bootstrap import CONFIDENCE, RESAMPLES, summarise
from limbeck.runtime.files import write_text
from limbeck.types import ScoredRow

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (10, 28, 47, 100, 400)
ARMS, SEEDS, COMPARED_EXAMPLES = 6, 3, 100


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of the three parts of a value.

    Attributes:
        wilder: how many times as much the seeds of the first arm scatter.
    """

    seed: float
    example: float
    own: float
    wilder: float = 1.0

    def values(self, rng: np.random.Generator) -> ndarray:
        """Values of equal arms, (ARMS, SEEDS, examples)."""
        seed_AS1 = self.seed * rng.normal(size=(ARMS, SEEDS, 1))
        seed_AS1[0] *= self.wilder
        example_E = self.example * rng.normal(size=COMPARED_EXAMPLES)
        return seed_AS1 + example_E + self.own * rng.normal(size=(ARMS, SEEDS, COMPARED_EXAMPLES))


NOISE: Mapping[str, Noise] = {
    "mostly from seeds": Noise(seed=0.2, example=0.4, own=0.3),
    "mostly from examples": Noise(seed=0.01, example=1.0, own=0.3),
    "mostly from seeds, those of one arm three times as far apart": Noise(seed=0.2, example=0.4, own=0.3, wilder=3.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", type=int, default=400, help="of each comparison; of a single score five times as many"
    )
    parser.add_argument("--page", default=str(ROOT / "docs" / "results" / "intervals.md"), help="empty only prints it")
    arguments = parser.parse_args()
    text = page(arguments.trials)
    print(text)
    if arguments.page:
        write_text(Path(arguments.page), text)


def page(trials: int) -> str:
    parts = (__doc__ or "").strip().split("\n\n")
    kinds = ("normal", "skewed")
    scores = [
        f"| {examples} | {' | '.join(percent(held(kind, examples, 5 * trials)) for kind in kinds)} |"
        for examples in EXAMPLES
    ]
    shares = {name: compare(noise, trials) for name, noise in NOISE.items()}
    compared = [f"| {name} | {' | '.join(map(percent, found))} |" for name, found in shares.items()]
    return "\n".join(
        [
            "# What intervals hold",
            "",
            parts[0],
            "",
            f"`python -m benchmarks.intervals`; seeds are fixed, {RESAMPLES:,} resamples as everywhere.",
            "",
            "## A score of one run",
            "",
            "How often the 95 % interval of `scores.json` (percentiles over resampled whole examples) holds the truth,",
            f"{5 * trials:,} times each: with values of a normal distribution, and of an exponential one, which is",
            "skewed as a divergence per answer is.",
            "",
            "| examples | normal values | skewed values |",
            "|---:|---:|---:|",
            *scores,
            "",
            "## A comparison of arms",
            "",
            f"`limbeck compare` on {ARMS} arms that are equal in truth, with {SEEDS} seeds each and",
            f"{COMPARED_EXAMPLES} examples, {trials} times each. Intended are 95 % in the first column and 5 % at most",
            "in the second. The last column is the usual other way to test many differences, resampled maxima (max-T).",
            "",
            "| noise | an arm's interval holds the truth | any of the 15 pairs is separated | the same by max-T |",
            "|---|---:|---:|---:|",
            *compared,
            "",
        ]
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def held(kind: str, examples: int, trials: int) -> float:
    """Share of the intervals of a score that hold the truth."""
    rng, found = np.random.default_rng(examples), 0
    for trial in range(trials):
        values_E = rng.normal(size=examples) if kind == "normal" else rng.exponential(size=examples) - 1.0
        rows = [
            ScoredRow(id=str(n), weight=1.0, values={"forward_kl": float(value)}) for n, value in enumerate(values_E)
        ]
        score = summarise(rows, seed=trial)["forward_kl"]
        assert score.low is not None and score.high is not None
        found += score.low <= 0.0 <= score.high
    return found / trials


def compare(noise: Noise, trials: int) -> tuple[float, float, float]:
    """Shares: intervals of arms that hold the truth, trials with a separated pair, and those by resampled maxima."""
    counts_BE = draws(COMPARED_EXAMPLES, RESAMPLES, f"{COMPARED_EXAMPLES} examples")
    held = separated = by_maxima = 0
    for trial in range(trials):
        values_RE = noise.values(np.random.default_rng(trial)).reshape(ARMS * SEEDS, COMPARED_EXAMPLES)
        resampled = Resampled(
            sheet=ResampledMetric(
                arm_R=tuple(run // SEEDS for run in range(ARMS * SEEDS)),
                seed_R=tuple(run % SEEDS for run in range(ARMS * SEEDS)),
                value_R=values_RE.mean(1),
                drawn_BR=counts_BE @ values_RE.T / COMPARED_EXAMPLES,
                examples=COMPARED_EXAMPLES,
            )
        )
        for arm in range(ARMS):
            found = resampled.estimate(arm)
            assert found.low is not None and found.high is not None
            held += found.low <= 0.0 <= found.high
        separated += any(pair.separated for pair in resampled.pairs.values())
        by_maxima += separated_by_maxima(resampled)
    return held / (ARMS * trials), separated / trials, by_maxima / trials


def separated_by_maxima(resampled: Resampled) -> bool:
    """Whether any difference exceeds what the largest one of a resample does, each over its own error (max-T)."""
    drawn_AB = np.stack([resampled.drawn(arm) for arm in range(ARMS)])
    mean_A = np.array([resampled.mean(arm) for arm in range(ARMS)])
    first, second = np.triu_indices(ARMS, 1)
    apart_PB, apart_P = drawn_AB[first] - drawn_AB[second], mean_A[first] - mean_A[second]
    error_P = apart_PB.std(axis=1)
    largest_B = (np.abs(apart_PB - apart_P[:, None]) / error_P[:, None]).max(axis=0)
    return bool((np.abs(apart_P) / error_P > np.quantile(largest_B, CONFIDENCE)).any())


if __name__ == "__main__":
    main()
