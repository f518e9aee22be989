"""The section `teacher` of a recipe: the model, its location, and the support of its signal."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from limbeck.fields import STRICT, Count, NonNegative, Positive, Share
from limbeck.recipe.member import MemberKey
from limbeck.teachers.base import Bits, TeacherLocation
from limbeck.teachers.combinations import COMBINATIONS, COMBINE_KEY, Combination
from limbeck.teachers.in_process import InProcess
from limbeck.teachers.registry import TEACHERS
from limbeck.teachers.sees import SEES, SEES_KEY, StudentsPrompt, View

Dtype = Literal["float32", "bfloat16", "float16"]
WHERE: MemberKey[TeacherLocation] = MemberKey(
    key="teacher.where", registry=TEACHERS, default="in_process", example="in_process"
)
# Values of `teacher.model` that name the student itself, and those of them that change while it trains.
ITSELF = ("base", "live", "ema")
MOVING = ("live", "ema")
SEES_SETTING: MemberKey[View] = MemberKey(key=SEES_KEY, registry=SEES, default="column", example="column")
SeesSetting = Annotated[View, PlainValidator(SEES_SETTING.read, json_schema_input_type=Any)]
COMBINE: MemberKey[Combination] = MemberKey(key=COMBINE_KEY, registry=COMBINATIONS, default="column", example="column")
CombineSetting = Annotated[Combination, PlainValidator(COMBINE.read, json_schema_input_type=Any)]
WhereSetting = Annotated[TeacherLocation, PlainValidator(WHERE.read, json_schema_input_type=Any)]


# Keys of a teacher's section that hold a member of a registry.
OF_EACH_TEACHER: dict[str, MemberKey[Any]] = {"where": WHERE, "sees": SEES_SETTING}


@dataclass(config=STRICT, kw_only=True)
class AcrossSection:
    """A student with other tokens than the teacher: the two are compared where their tokens coincide."""

    outside: Literal["tail", "renormalised"] = "tail"
    """Tokens that only one of the two has: one class on each side, as defined for most objectives; or left out, the
    shared ones renormalised, as defined for all."""
    sorted_weight: NonNegative = 0.0
    """Beside the objective, the distance between the sorted probabilities of the tokens that only one of the two has
    (ULD, arXiv 2402.12030), at the positions that coincide, times this."""
    merged: Literal["leave_out", "chain"] = "leave_out"
    """Where one token of one side is several of the other: out of the loss, or compared by the probability of their
    text, the product of those of its tokens (which needs teacher.cache=false)."""


@dataclass(config=STRICT, kw_only=True)
class TeacherSection:
    model: str
    """Who: a named asset (smollm2-135m-instruct), a local directory, a hub id or a GGUF file; or the student itself:
    base (as it begins), live (as it is) or ema (the moving average of its weights)."""
    ema_decay: Share | None = None
    """Of the moving average: how much of it stays in a step; null is 0.95, as TRL's SDFT has it."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Dtype = "float32"
    """Precision the teacher runs in."""
    bits: Bits | None = None
    """Bits of the weights of its linear layers, rounded as they are read: 8 (int8, by torchao) or 4 (NF4, by
    bitsandbytes). What it says is what the rounded teacher says. Null keeps them in teacher.dtype."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless asked."""
    where: WhereSetting = InProcess()
    """Where: a name of `limbeck teachers`, or a mapping with name and options."""
    sees: SeesSetting = StudentsPrompt()
    """What it sees of a prompt: a name of `limbeck views`, or a mapping with name and options. The student is trained
    on its own prompt and the same answer."""
    across: AcrossSection | None = None
    """For a student with other tokens: {} compares the two where tokens coincide; null refuses all but text."""
    support: Literal["full", "topk_renorm", "topk_tail", "sampled"] = "full"
    """How much it says of each token: its whole distribution (by hidden states), its k most likely tokens renormalised
    or with one class for all others, or a sample of it. Held-out responses always get the whole one."""
    support_k: Count = 64
    """Tokens kept of each position with a top-k support; draws with a sampled one."""
    student_k: Annotated[int, Field(ge=0)] = 0
    """Of a top-k support: so many tokens that the student finds likeliest are kept beside them, chosen before training,
    or when the student has written. For objectives that weigh by the student (rkl, js, csd); the teacher is in this
    process, or behind vLLM or SGLang."""
    support_temperatures: tuple[Positive, ...] = ()
    """Loss temperatures that a sparse support is exact for; empty takes the objective's."""
    cache: bool = True
    """Write what it says to disk once; false runs the teacher beside the student in every epoch."""
    cache_dtype: Dtype | None = None
    """Precision of the hidden states on disk; null is the one that the teacher computes in, which loses nothing."""
    cache_limit_gib: Positive | None = None
    """GiB of disk at most for the signals of training responses: the teacher scores those of the next steps, as many as
    fit, and they go when the training has passed them. One behind a server scores the next ones while those before are
    trained, with half of the room for each. Each epoch is scored anew. Null keeps all of them."""

    def __post_init__(self) -> None:
        if self.cache_dtype is None:
            object.__setattr__(self, "cache_dtype", self.dtype)

    @property
    def kept_dtype(self) -> Dtype:
        """`cache_dtype`, which is known by now."""
        assert self.cache_dtype is not None
        return self.cache_dtype

    @property
    def keeps_whole(self) -> bool:
        """Whether what it says of all training responses is on disk at the same time."""
        return self.cache and self.cache_limit_gib is None

    @property
    def kept(self) -> int:
        """Tokens kept of each position with a top-k support, those that the student chose among them."""
        return self.support_k + self.student_k

    @property
    def decay(self) -> float:
        """The decay of the moving average."""
        return 0.95 if self.ema_decay is None else self.ema_decay
