"""The alarms of on-policy training: the metrics that each reads, its meaning, the remedy, and when it goes off.

The student writes its own next lesson, so a fault feeds on itself: what it is taught on a loop is one more loop. The
loss may fall all the while, for on such text student and teacher agree. `limbeck.rollouts.monitor.Watch` raises these
alarms, the report explains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COUNT = "responses/count"
TRUNCATED = "responses/truncated"
REPEATED = "responses/repeated"
LENGTH = "responses/length"
EMPTY = "responses/empty"
LOG_Q = "log_q/student"
# Of responses that an engine wrote, once a round: mean and largest distance, in nats, of the log-probabilities that it
# gave of its tokens from the student's here, and the mean that rounding explains.
ENGINE_GAP, ENGINE_GAP_MOST, ENGINE_GAP_LIMIT = "engine/gap", "engine/gap_max", "engine/gap_limit"

# A level is a running average over some 20 steps: a shorter one follows single batches, a longer one sees a collapse
# when it is over.
ALARM_GAIN = 0.1
# Steps with few responses move a level less, so that it always rests on some 128 of them: a share of 15 % then has a
# standard error of 3 %, far below the thresholds.
FULL_STEP = 64 * ALARM_GAIN
# The first steps make the baseline: fewer would be a matter of luck, and the student changes most at the beginning.
START = 10
# No alarm before so many values of a metric were seen: by then 65 % of the level are newer than the baseline.
QUIET = 20
# Repetition that never was low is no rise. It is said when the student had time to unlearn it, as a pruned one has to.
PATIENCE = 60

# Healthy answers loop in a few percent of cases; a quarter more than at best is neither noise nor style.
REPEATED_RISE, REPEATED_WELL, REPEATED_MOST = 0.25, 0.12, 0.5
# Under nine in ten some answers still end by themselves, and the end can be learned from them.
TRUNCATED_MOST, TRUNCATED_WELL = 0.9, 0.75
# Where half of the answers are cut off their mean length is that of the limit, no baseline for anything.
LENGTH_CUT = 0.5
# Style moves length by a third or so; beyond a factor of two the answers have changed their kind.
LENGTH_FACTOR, LENGTH_WELL = 2.0, 1.7
# Sharper than the teacher by half AND half of what it was: mode-seeking objectives alone stay above.
ENTROPY_SHARE, ENTROPY_WELL = 0.5, 0.65
# The tail is 1 % of the tokens: of a thousand tokens it wavers by some 15 %, its level by 4 %.
TAIL_GROWTH, TAIL_WELL, TAIL_MEAN = 1.5, 1.25, 1.1
# One nat: the student finds each token of its own answers a third as likely as it did.
LOG_Q_FALL, LOG_Q_WELL = 1.0, 0.5
EMPTY_MOST, EMPTY_WELL = 0.1, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmKind:
    """An alarm in words.

    Attributes:
        keys: the metrics it reads; the first is the one that went wrong.
        meaning: one sentence, without the final stop; so is `remedy`.
    """

    keys: tuple[str, ...]
    meaning: str
    remedy: str


ALARMS: Mapping[str, AlarmKind] = {
    "repetition": AlarmKind(
        keys=(REPEATED,),
        meaning="The student's responses loop, and it is now taught on loops",
        remedy="train on more responses of the teacher, lower train.learning_rate, or sample with temperature 1 and "
        "top_p 1; a student that loops from the start needs a phase on the teacher's responses first",
    ),
    "truncation": AlarmKind(
        keys=(TRUNCATED,),
        meaning="Nearly all of the student's responses are cut off at the limit, so it hardly ever sees an end",
        remedy="raise responses.max_new_tokens; if the responses ramble, train on the teacher's responses first, and "
        "check that the template's end of turn is among the stop tokens",
    ),
    "length_drift": AlarmKind(
        keys=(LENGTH,),
        meaning="The student's responses have become a different length, which a token mean rewards or punishes unseen",
        remedy="read the responses below; mix in responses of the teacher, or average by sequence instead of by token",
    ),
    "entropy_collapse": AlarmKind(
        keys=("student_entropy", "teacher_entropy"),
        meaning="The student is far surer than the teacher: it keeps to few continuations and its samples lose variety",
        remedy="take an objective that covers more (forward or skew KL, Jensen-Shannon) or mix it in, sample with "
        "temperature 1, and lower train.learning_rate",
    ),
    "kl_tail": AlarmKind(
        keys=("kl_p99", "forward_kl", "loss"),
        meaning="A few tokens drift far from the teacher while the mean looks well; whole responses follow",
        remedy="take a bounded or skewed divergence (Jensen-Shannon, total variation, skew KL), clip the gradient, and "
        "look for responses that the teacher would never write",
    ),
    "log_q_collapse": AlarmKind(
        keys=(LOG_Q,),
        meaning="The student finds its own responses ever less likely: it is pushed away, but not towards anything",
        remedy="weigh the student's responses less against the teacher's, take an objective that is bounded on them "
        "(skew reverse KL instead of DPKD), and sample new responses more often",
    ),
    "empty": AlarmKind(
        keys=(EMPTY,),
        meaning="The student ends its responses before it has said anything",
        remedy="check the prompt template and its generation prompt, drop empty responses of data or teacher, and "
        "train on the teacher's responses first",
    ),
    "engine_gap": AlarmKind(
        keys=(ENGINE_GAP, ENGINE_GAP_LIMIT),
        meaning="The engine that writes the student's responses computes other numbers than the student here, by more "
        "than rounding explains, so that what is trained on is not quite the student's own",
        remedy="start the server with the precision of the training (--dtype) and without --quantization and "
        "--logprobs-mode, or weigh the tokens with contrast.rule={name: importance}",
    ),
}

LOSS_CLIMBS = "loss_climbs"
# Of trainings on responses that never change; see `limbeck.training.loss_alarm`.
OFF_POLICY_ALARMS: Mapping[str, AlarmKind] = {
    LOSS_CLIMBS: AlarmKind(
        keys=("loss", "forward_kl"),
        meaning="The loss has climbed away from its best: the updates are larger than the student bears",
        remedy="set train.learning_rate=auto, or a tenth of what it is, and add --update; with train.eval_steps the "
        "best student on the way is handed on",
    ),
}
# For the report, which explains them.
EVERY_ALARM: Mapping[str, AlarmKind] = {**ALARMS, **OFF_POLICY_ALARMS}
