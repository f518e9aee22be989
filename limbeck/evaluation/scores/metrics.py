"""The metrics of the evaluation: what each is called, its unit, which way is better, and what it means.

A new metric is one entry here, or in `metrics` of its group, and a value of that name in the rows its group measures.
What was measured under a
condition (another author's answers, a decoding temperature) is called METRIC@CONDITION.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric: its label, unit, direction and meaning.

    Attributes:
        unit: empty for shares and other pure numbers.
        better: "lower", "higher", "match" (the nearer to the teacher's own value the better), or "context" for a value
            that is neither good nor bad of the student, such as one of the teacher alone.
        teacher: the metric that holds the teacher's own value of the same quantity, where there is one.
        teacher_value: what the teacher would score against itself, where that is a constant.
    """

    label: str
    unit: str
    better: Literal["lower", "higher", "match", "context"]
    meaning: str
    teacher: str | None = None
    teacher_value: float | None = None


NATS = "nats/token"

# Texts of conditions; others, such as T=0.7, need none.
CONDITIONS = {
    "teacher": "on the teacher's answers",
    "student": "on the student's answers",
    "references": "on the references",
}

StandIn = Literal["llama_cpp", "imatrix"]
# Models that are measured in the student's place; of a condition their name is the last part: accuracy@gsm8k,llama_cpp.
STAND_INS: dict[str, str] = {
    "llama_cpp": "quantised by llama.cpp",
    "imatrix": "quantised by llama.cpp with an importance matrix",
}


def _of_both(name: str, metric: Metric) -> dict[str, Metric]:
    """The student's metric and the teacher's own value of it."""
    teacher = replace(metric, label=f"Teacher: {metric.label}", better="context", meaning="the same of the teacher")
    return {name: replace(metric, teacher=f"teacher_{name}"), f"teacher_{name}": teacher}


METRICS: dict[str, Metric] = {
    "forward_kl": Metric(
        label="Forward KL", unit=NATS, better="lower", teacher_value=0.0,
        meaning="KL(teacher ‖ student): how much of what the teacher would say the student misses",
    ),
    "reverse_kl": Metric(
        label="Reverse KL", unit=NATS, better="lower", teacher_value=0.0,
        meaning="KL(student ‖ teacher): how much the student says that the teacher would not",
    ),
    "forward_kl_at_least": Metric(
        label="Forward KL, at least", unit=NATS, better="lower", teacher_value=0.0,
        meaning="what is certain of `forward_kl` beside a teacher that says its likeliest tokens alone: all others "
        "count as one",
    ),
    "reverse_kl_at_least": Metric(
        label="Reverse KL, at least", unit=NATS, better="lower", teacher_value=0.0,
        meaning="the same of `reverse_kl`",
    ),
    "jensen_shannon_at_least": Metric(
        label="Jensen-Shannon divergence, at least", unit=NATS, better="lower", teacher_value=0.0,
        meaning="the same of `jensen_shannon`",
    ),
    "acceptance_at_least": Metric(
        label="Expected acceptance, at least", unit="", better="higher",
        meaning="`acceptance` if none of the tokens that the teacher does not say were shared",
    ),
    "acceptance_at_most": Metric(
        label="Expected acceptance, at most", unit="", better="higher", teacher_value=1.0,
        meaning="`acceptance` if as much of these tokens were shared as their mass allows",
    ),
    "teacher_entropy_at_least": Metric(
        label="Teacher entropy, at least", unit=NATS, better="context",
        meaning="what is certain of `teacher_entropy`: all tokens that the teacher does not say count as one",
    ),
    "teacher_nll_at_least": Metric(
        label="Teacher negative log-likelihood, at least", unit=NATS, better="context",
        meaning="`teacher_nll`, exact where the teacher says every token that followed",
    ),
    "jensen_shannon": Metric(
        label="Jensen-Shannon divergence", unit=NATS, better="lower", teacher_value=0.0,
        meaning="mean of both models' KL to their equal mixture; at most log 2 = 0.693",
    ),
    "total_variation": Metric(
        label="Total variation", unit="", better="lower", teacher_value=0.0,
        meaning="half the sum of |p - q|: the probability mass that lies on the wrong tokens",
    ),
    "acceptance": Metric(
        label="Expected acceptance", unit="", better="higher", teacher_value=1.0,
        meaning="1 - total variation: the share of draft tokens the teacher would accept in speculative decoding",
    ),
    "top1_agreement": Metric(
        label="Top-1 agreement", unit="", better="higher", teacher_value=1.0,
        meaning="share of positions where both models rank the same token first",
    ),
    "topk_agreement": Metric(
        label="Top-k agreement", unit="", better="higher", teacher_value=1.0,
        meaning="share of the teacher's k likeliest tokens that are among the student's "
        "(evaluate.groups.fidelity.top_k)",
    ),
    "student_entropy": Metric(
        label="Entropy", unit=NATS, better="match", teacher="teacher_entropy",
        meaning="uncertainty of the next-token distribution; best where it equals the teacher's",
    ),
    "teacher_entropy": Metric(
        label="Teacher entropy", unit=NATS, better="context",
        meaning="uncertainty of the teacher's next-token distribution",
    ),
    "entropy_gap": Metric(
        label="Entropy gap", unit=NATS, better="match", teacher_value=0.0,
        meaning="the student's entropy less the teacher's: below 0 the student is too sure, above it too unsure",
    ),
    "entropy_gap_size": Metric(
        label="Size of the entropy gap", unit=NATS, better="lower", teacher_value=0.0,
        meaning="mean distance of the two entropies, token by token: gaps of both signs do not cancel",
    ),
    "student_nll": Metric(
        label="Negative log-likelihood", unit=NATS, better="lower", teacher="teacher_nll",
        meaning="surprise at the tokens of the held-out responses",
    ),
    "teacher_nll": Metric(
        label="Teacher negative log-likelihood", unit=NATS, better="context",
        meaning="the teacher's surprise at the tokens of the held-out responses",
    ),
    "nll": Metric(
        label="Negative log-likelihood", unit=NATS, better="lower",
        meaning="surprise of the student alone at the tokens of the held-out answers, in its own tokens",
    ),
    **_of_both("perplexity", Metric(
        label="Perplexity", unit="", better="lower",
        meaning="exp of the mean negative log-likelihood of the tokens of plain text, in a model's own tokens",
    )),
    **_of_both("bits_per_byte", Metric(
        label="Bits per byte", unit="bits", better="lower",
        meaning="the surprise at plain text by its bytes, which compares models with different tokens",
    )),
    "student_ece": Metric(
        label="Calibration error", unit="", better="lower", teacher="teacher_ece",
        meaning="how far the confidence in the likeliest token is from how often that token followed, over 15 bins",
    ),
    "teacher_ece": Metric(
        label="Teacher calibration error", unit="", better="context",
        meaning="the same of the teacher: what its own confidence is worth on these answers",
    ),
    "ece_to_teacher": Metric(
        label="Calibration error to the teacher", unit="", better="lower", teacher_value=0.0,
        meaning="how far the student's confidence is from the teacher's probability of the same token, over 15 bins",
    ),
    "rouge_l": Metric(
        label="ROUGE-L", unit="F1", better="higher", teacher_value=1.0,
        meaning="longest common subsequence of the greedy answers of student and teacher, as F1 over stemmed words",
    ),
    **_of_both("rouge_l_references", Metric(
        label="ROUGE-L to the references", unit="F1", better="higher",
        meaning="sampled answers and the best of the data's references, mean over decoding seeds; papers give it x100",
    )),
    **_of_both("distinct_1", Metric(
        label="Distinct-1", unit="", better="match",
        meaning="share of distinct words among all words of the sampled answers to a prompt",
    )),
    **_of_both("distinct_2", Metric(
        label="Distinct-2", unit="", better="match",
        meaning="share of distinct word pairs among all word pairs of the sampled answers to a prompt",
    )),
    **_of_both("self_bleu", Metric(
        label="Self-BLEU", unit="", better="match",
        meaning="BLEU of each sampled answer with the prompt's other ones as references, 0 to 1; lower is more diverse",
    )),
    **_of_both("answer_words", Metric(
        label="Answer length", unit="words", better="match",
        meaning="mean length of the sampled answers",
    )),
    **_of_both("sample_nll", Metric(
        label="Surprise at its own samples", unit=NATS, better="match",
        meaning="mean negative log-probability at temperature 1 of the tokens sampled; at T=1 it estimates the entropy",
    )),
    **_of_both("sample_rouge_l", Metric(
        label="ROUGE-L of the samples", unit="F1", better="higher",
        meaning="mean over the sampled answers, beside the references or, without any, the teacher's greedy answers",
    )),
    "win_rate": Metric(
        label="Win rate", unit="", better="higher", teacher_value=0.5,
        meaning="how often the judge prefers the student's greedy answer to the teacher's; ties half, so 0.5 is par",
    ),
    "win_rate_references": Metric(
        label="Win rate over the references", unit="", better="higher",
        meaning="how often the judge prefers the student's greedy answer to the data's; ties half, so 0.5 is par",
    ),
    "win_rate_before": Metric(
        label="Win rate over the start", unit="", better="higher",
        meaning="how often the judge prefers the student's greedy answer to its own before training; 0.5 is no change",
    ),
    "win_rate_distilled": Metric(
        label="Win rate over the distilled student", unit="", better="higher",
        meaning="how often the judge prefers the student's greedy answer to its own before preference tuning; "
        "0.5 is no change",
    ),
    "judge_ties": Metric(
        label="Ties", unit="", better="context",
        meaning="share of pairs that count half: the judge says so, or says another thing when the order is changed",
    ),
    "judge_consistency": Metric(
        label="Consistency of the judge", unit="", better="higher",
        meaning="share of pairs where the judge says the same when the two answers change places",
    ),
    "judge_leans": Metric(
        label="Pairs leaning to the student", unit="", better="higher", teacher_value=0.5,
        meaning="share of pairs where the judge's mean probability of both orders is above 0.5 for the student",
    ),
    "draft_acceptance": Metric(
        label="Measured acceptance", unit="", better="higher", teacher_value=1.0,
        meaning="share of the student's drafts that the teacher kept in speculative decoding, of those it looked at",
    ),
    "tokens_per_pass": Metric(
        label="Tokens per pass", unit="tokens/pass", better="higher",
        meaning="tokens written for each pass of the teacher with the student drafting; 1 without a draft",
    ),
    "speculative_speedup": Metric(
        label="Speculative speed-up", unit="times", better="higher",
        meaning="seconds per token of the teacher alone over those with the student drafting, one prompt at a time; "
        "a time, so it differs from run to run",
    ),
    "expected_speedup": Metric(
        label="Expected speed-up", unit="times", better="higher",
        meaning="tokens per pass that the acceptance promises, over the measured cost of the drafts and of the pass "
        "that reads them",
    ),
    "break_even_acceptance": Metric(
        label="Break-even acceptance", unit="", better="context",
        meaning="the acceptance at which drafting costs what it saves, by the measured cost of both models' passes",
    ),
    "best_draft_tokens": Metric(
        label="Best number of drafts", unit="tokens", better="context",
        meaning="drafts per pass with the largest expected speed-up, by measured acceptance and costs; 0: drafting "
        "does not pay",
    ),
    "draft_cost": Metric(
        label="Cost of a draft", unit="teacher's steps", better="lower",
        meaning="seconds of a step of the student over those of a step of the teacher, on this machine",
    ),
    **_of_both("parameters", Metric(
        label="Parameters", unit="M", better="lower",
        meaning="millions of parameters, tied ones counted once",
    )),
    **_of_both("disk_size", Metric(
        label="Size on disk", unit="MB", better="lower",
        meaning="the weight files as they are stored",
    )),
    **_of_both("weight_memory", Metric(
        label="Memory of the weights", unit="MB", better="lower",
        meaning="parameters and buffers in the precision they were evaluated in",
    )),
    **_of_both("cache_size", Metric(
        label="Cache per token", unit="kB/token", better="lower",
        meaning="keys and values that each token of context keeps in memory",
    )),
    **_of_both("prefill_speed", Metric(
        label="Reading speed", unit="tokens/s", better="higher",
        meaning="prompt tokens read per second; the examples are repeats on this machine, never the same twice",
    )),
    **_of_both("decode_speed", Metric(
        label="Writing speed", unit="tokens/s", better="higher",
        meaning="tokens written per second, one by one; the examples are repeats on this machine, never the same twice",
    )),
    **_of_both("accuracy", Metric(
        label="Accuracy", unit="", better="higher",
        meaning="share of the answers to the problems of a task that are right",
    )),
    **_of_both("pass_at_k", Metric(
        label="pass@k", unit="", better="higher",
        meaning="chance that one of k answers is right, estimated without bias from all answers (Chen et al. 2021)",
    )),
}  # fmt: skip


def known_metrics() -> dict[str, Metric]:
    """METRICS, and what the groups of other packages measure."""
    from limbeck.evaluation.groups import EVALUATION_GROUPS

    found = dict(METRICS)
    for group in EVALUATION_GROUPS.values():
        found |= {name: metric for name, metric in group.metrics.items() if name not in METRICS}
    return found


def with_stand_in(condition: str, stand_in: str) -> str:
    """A condition that holds for a stand-in."""
    return f"{condition},{stand_in}" if condition else stand_in


def split_stand_in(name: str) -> tuple[str, str]:
    """METRIC@CONDITION or GROUP@CONDITION as of the student, and the stand-in that it is of; empty where of none."""
    bare, _, condition = name.partition("@")
    condition, _, last = condition.rpartition(",")
    if last not in STAND_INS:
        return name, ""
    return f"{bare}@{condition}" if condition else bare, last


def describe_metric(name: str) -> Metric:
    """The metric behind a name, with the condition of METRIC@CONDITION in its label and in the teacher's metric."""
    bare, _, condition = name.partition("@")
    metric = METRICS[bare] if bare in METRICS else known_metrics()[bare]
    if not condition:
        return metric
    teacher = None if metric.teacher is None else f"{metric.teacher}@{condition}"
    of_student, stand_in = split_stand_in(name)
    said = of_student.partition("@")[2]
    by = STAND_INS.get(stand_in)
    if by and metric.better == "context":
        # It is the teacher's own, in the table of a stand-in.
        by = f"beside the student {by}"
    texts = filter(None, (CONDITIONS.get(said, said), by))
    return replace(metric, label=f"{metric.label} ({', '.join(texts)})", teacher=teacher)
