"""The sections of a recipe: typed, strict, in the order of the stages. Their docstrings are in its JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.evaluation.tasks.generators import GENERATORS, ProblemGenerator
from limbeck.evaluation.tasks.problems import TaskName
from limbeck.fields import (
    NEUTRAL,
    SAME_ARM,
    STRICT,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Seed,
    Strings,
)
from limbeck.recipe.evaluation import EvaluateSection
from limbeck.recipe.member import MemberKey
from limbeck.recipe.optimizers import OPTIM, FusedAdamW, OptimSetting
from limbeck.recipe.preference import PAIRS_SETTING, PreferenceSection
from limbeck.recipe.response_engine import ENGINE
from limbeck.recipe.response_source import SOURCE
from limbeck.recipe.responses import DraftSection, ResponsesSection, ServerSection, VerifyJudgeSection, VerifySection
from limbeck.recipe.teacher import (
    COMBINE,
    ITSELF,
    SEES_SETTING,
    WHERE,
    AcrossSection,
    CombineSetting,
    Dtype,
    TeacherSection,
)
from limbeck.registry import Registry
from limbeck.rollouts.options import InitialAuthor
from limbeck.teachers.combinations import Mixing, Routing
from limbeck.teachers.hosted_options import OnApi

GENERATE: MemberKey[ProblemGenerator] = MemberKey(
    key="prompts.generate", registry=GENERATORS, default="chain", example="chain"
)
GenerateSetting = Annotated[ProblemGenerator, PlainValidator(GENERATE.read, json_schema_input_type=Any)]


@dataclass(config=STRICT, kw_only=True)
class LoraSection:
    r: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Strings = ()
    """Module names; empty for every linear layer but the head."""


@dataclass(config=STRICT, kw_only=True)
class QuantizeSection:
    """Weights in few bits: trained on the grid of the file that ships, or frozen there under adapters."""

    format: str
    """Of the linear layers: q4_0, q5_0, q8_0, q4_k, q6_k (as GGUF files keep them), int4_g32 or nf4."""
    weights: Literal["straight_through", "frozen"] = "straight_through"
    """Trained on their grid, the gradient passing the rounding as if there were none; or frozen on it, with
    student.lora trained beside them."""
    embeddings: str | None = "q8_0"
    """Format of the token embeddings and the head; null leaves them in float32."""
    fallback: str | None = None
    """Format of linear layers whose rows are no multiple of the format's block; null refuses such a student."""
    grid: Literal["nearest", "importance"] = "nearest"
    """How scales are chosen: as plain rounding does, or with errors weighted by the inputs of each layer on some
    training responses, as llama.cpp does with an importance matrix."""


@dataclass(config=STRICT, kw_only=True)
class WidthSection:
    """Sizes of a student of init width_prune, as model configurations call them; null leaves one as it is."""

    hidden_size: Count | None = None
    """Of the residual stream; the same dimensions stay in all blocks."""
    intermediate_size: Count | None = None
    """Neurons of each block's feed-forward layer."""
    num_attention_heads: Count | None = None
    """Heads of each block; those that share keys and values stay together, and a head keeps its size."""


@dataclass(config=STRICT, kw_only=True)
class StudentSection:
    model: str | None = None
    """Where the student comes from, as for the teacher; null takes the teacher itself (pruned, or scratch)."""
    revision: str | None = None
    init: Literal["pretrained", "teacher", "depth_prune", "width_prune", "scratch"] = "pretrained"
    """As loaded; a copy of the teacher; blocks removed; narrower; or the architecture of `model` with fresh weights."""
    layers: Count | None = None
    """Blocks to keep with init depth_prune; with width_prune those that are narrowed, the others are removed first."""
    keep: tuple[int, ...] = ()
    """The same blocks by number; empty lets limbeck measure which."""
    width: WidthSection | None = None
    """Sizes of init width_prune; what stays is measured by the size of activations on some training responses."""
    config: dict[str, Any] = field(default_factory=dict)
    """Changes to the model configuration with init scratch (num_hidden_layers, hidden_size, ...)."""
    dtype: Dtype = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    freeze_embeddings: bool = False
    """Leave input and output embeddings as they are: a pruned student has those of its teacher."""
    freeze_vision: bool = True
    """Leave the vision tower of an image-text model as it is: its features are computed once for each image."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of all weights; merged when the student is saved."""
    quantize: QuantizeSection | None = None
    """Keep the weights in few bits while they are trained, exactly as the exported file will; null keeps them whole."""

    @property
    def pruned(self) -> bool:
        """Whether it is cut out of a larger model."""
        return self.init in ("depth_prune", "width_prune")

    @property
    def measured(self) -> bool:
        """Whether responses decide what is cut."""
        return self.init == "width_prune" or (self.init == "depth_prune" and not self.keep)


@dataclass(config=STRICT, kw_only=True)
class PromptsSection:
    source: str = "builtin"
    """builtin, a JSONL, JSON or parquet file, a glob or folder of them, or a datasets directory or hub id."""
    eval_fraction: Fraction = 0.1
    """Share held out for evaluation, decided by a hash of each prompt."""
    eval_limit: Count | None = None
    """The most prompts that are held out, whatever the share: the others are trained on (of `heldout`, left out)."""
    heldout: str | None = None
    """Another source of the same forms, whose prompts are all held out, and none of `source`; a prompt that stands in
    both is refused."""
    limit: Annotated[int, Field(ge=2)] | None = None
    """Use only this many prompts, in the order of their hashes."""
    fields: dict[Literal["prompt", "completion", "category"], str] | None = None
    """For data in none of the known formats: its own names of the fields."""
    ignore_columns: Strings = ()
    """Columns of the data to leave out as if they were not there; `messages.weight` is a field of the turns."""
    generate: GenerateSetting | None = None
    """Make the prompts with a program instead of reading `source`: a name, or a mapping with name and options, such as
    {name: chain, longest: 8}."""
    task: TaskName | None = None
    """The source holds problems of this task, in the fields of its original data set: they are asked as the group
    `tasks` asks them, and responses.verify can check answers to them."""
    dataset_split: str = "train"
    """Part of a `datasets` source to read."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    split_seed: Seed = 0
    """Another seed gives another held-out share."""
    template: Literal["auto", "chat", "plain", "alpaca"] = "auto"
    """How a prompt becomes text; auto takes the tokenizer's chat template where there is one."""
    chat_options: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, such as {enable_thinking: false}."""
    control_tokens: Literal["error", "parse"] = "error"
    """What happens to text that spells a control token of the tokenizer."""
    loss_on: Literal["all", "last"] = "all"
    """Of a conversation that the data answers: every turn of the assistant is learnt from, or the last one alone. A
    model answers the last one."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a prompt that does not fit the window; dropped ones are counted and reported."""
    max_prompt_length: Count | None = None
    """The most tokens of a prompt, its template included; null leaves it to the window. A few long prompts can
    take most of the time and memory."""

    @property
    def problems_of(self) -> TaskName | None:
        """The task that the prompts are problems of; None where they are none."""
        return self.task if self.generate is None else self.generate.task


@dataclass(config=STRICT, kw_only=True)
class ObjectiveSection:
    """`name` and the temperatures are the same for all objectives; further keys are the objective's own options."""

    name: str = "fkl"
    """A name of the registry; see `limbeck objectives`."""
    temperature: Positive = 1.0
    """Of the loss, for both sides unless one is set apart."""
    teacher_temperature: Positive | None = None
    student_temperature: Positive | None = None
    temperature_scale: Literal["none", "tau", "tau2", "auto"] | Positive = "auto"
    """Factor on the loss; auto is the one that keeps gradients comparable over temperatures."""
    temperature_end: Positive | None = None
    """Where the temperature of the loss arrives at the end of training; null leaves it where it is."""
    temperature_shape: Literal["linear", "cosine"] = "cosine"
    """The way there."""
    temperature_adapt: NonNegative | None = None
    """One temperature per token around the loss temperature, by how far apart the two models are there (AdaKD's
    strength, 0.5 in the paper); null gives all tokens the same."""
    schedule: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Options of the objective that move in a line over training, such as {progress: [0.4, 1.0]} for taid."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(config=STRICT, kw_only=True)
class ContrastSection:
    """Objectives and weights by author of the response; `objective` is for the teacher's (and the data's)."""

    student: dict[str, Any] | None = None
    """The objective for the student's own responses, such as {name: srkl, alpha: 0.1}; null takes the same one."""
    beta: Literal["none", "constant", "code", "linear", "sawtooth"] = "none"
    """With any but none the loss is scale * ((1 - beta) * mean of the teacher's + beta * mean of the student's), and
    this is how beta moves: not at all; the released code's 0.5 to 0.75; in a line; the paper's saw-tooth."""
    beta_start: Annotated[float, Field(ge=0, le=1)] = 0.5
    beta_end: Annotated[float, Field(ge=0, le=1)] = 0.75
    scale: Positive = 2.0
    rule: dict[str, Any] | None = None
    """What responses say to their tokens: {name: adaptive_alpha}, {name: dpkd}, {name: minillm} or {name: importance},
    with options."""


@dataclass(config=STRICT, kw_only=True)
class SftSection:
    """A first stage on responses written before training, or on the data's; the main training follows."""

    source: Literal["responses", "data"] = "responses"
    """What it is taught from: the responses that are there before training (responses.initial_author), or the data's
    own answers, which the training itself does not see where the teacher answers."""
    num_train_epochs: Positive = 1.0
    learning_rate: Positive | Literal["auto"] | None = None
    """Null takes train.learning_rate; auto is searched for this stage apart."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "ce"})


@dataclass(config=STRICT, kw_only=True)
class LmSection:
    """Text of a second corpus, for a language-modelling loss beside the objective (MiniLLM, DistiLLM and CSD:
    OpenWebText, weight 1)."""

    source: str
    """A JSONL or parquet file, a glob or folder of them, or a datasets directory or hub id, with rows of plain text."""
    weight: NonNegative = 1.0
    """Factor on the mean cross-entropy per token, which is added to the loss."""
    text_field: str = "text"
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a block: documents are put one after another and cut into blocks."""
    per_device_batch_size: Count | None = None
    """Blocks of a micro-batch; null takes train.per_device_train_batch_size."""
    max_tokens: Count = 10_000_000
    """Read no more of the source than this."""
    dataset_split: str = "train"
    dataset_config: str | None = None


@dataclass(config=STRICT, kw_only=True)
class TrainSection:
    num_train_epochs: Positive = 1.0
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever the epochs."""
    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    max_tokens_per_batch: Annotated[Count | None, NEUTRAL] = None
    """Cut the responses of a step, as many as the two keys above say, into micro-batches of at most so many tokens,
    padding included, and not into so many rows: the same update with the memory of long rows bounded and fewer passes
    over short ones. A longer row is alone; null cuts by rows."""
    packing: Annotated[bool, NEUTRAL] = False
    """Put the rows of a micro-batch one after another where they would be padded, kept apart by attention (with bounds
    under flash_attention_2, with a mask elsewhere, which is slower than padding on a CPU); max_tokens_per_batch then
    counts tokens without padding. The same update, for steps whose rows differ in length."""
    learning_rate: Positive | Literal["auto"] = "auto"
    """Peak of the schedule; auto tries several on some steps that are taken back, and takes the best."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_min_lr"
    ] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    optim: OptimSetting = FusedAdamW()
    """What updates the weights: adamw_torch_fused, adamw_torch, adamw_bnb_8bit (with bitsandbytes), adafactor or sgd,
    or a mapping with name and options."""
    weight_decay: NonNegative = 0.01
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Positive = 1e-8
    reduction: Literal["token", "sequence"] = "token"
    """Mean over tokens, or over the tokens of each response and then over responses."""
    max_grad_norm: NonNegative = 1.0
    """0 switches clipping off."""
    gradient_checkpointing: bool = False
    bf16: bool = False
    """Mixed precision: float32 weights, bfloat16 matrix products, float32 losses."""
    sharding: Annotated[Literal["auto", "none", "full"], NEUTRAL] = "auto"
    """Shard the student, its gradients and moments over the ranks of a launch (full), or keep all on each (none);
    auto is full under an FSDP2 configuration of accelerate, else none. The updates are the same up to rounding."""
    compile: Literal["auto", "on", "off"] = "auto"
    """The loss's elementwise body through torch.compile; auto where a C++ compiler exists."""
    lm: LmSection | None = None
    """A language-modelling loss on text of its own in every step of the training, not of the first stage."""
    seed: Annotated[Seed, SAME_ARM] = 0
    save_steps: Annotated[Count, NEUTRAL] = 50
    save_total_limit: Annotated[Count, NEUTRAL] = 2
    logging_steps: Annotated[Count, NEUTRAL] = 1
    report_to: Annotated[Strings, NEUTRAL] = ()
    """Names of accelerate trackers (tensorboard, wandb, ...); metrics.jsonl is always written."""
    eval_steps: Count | None = None
    """Measure the loss on training prompts that are set aside, at the start, after every so many steps and at the end;
    null never."""
    eval_size: Count = 16
    """How many, by the hash of their ids, at most a tenth of all; never trained on, and not among the held-out ones."""
    load_best_model_at_end: bool = True
    """With eval_steps: hand on the student of the lowest of these losses, the start included; false: the last one."""
    early_stopping_patience: Count | None = None
    """With eval_steps: end the training after so many measurements in a row without a lower loss; null never."""
    early_stopping_threshold: NonNegative = 0.0
    """How much lower than the lowest so far a loss must be to count for early_stopping_patience."""
    push_to_hub: Annotated[bool, NEUTRAL] = False
    """At the end of a whole run, upload the student with its model card to the hub."""
    hub_model_id: Annotated[str | None, NEUTRAL] = None
    """owner/name of the repository there; it is made where it does not exist."""
    hub_private_repo: Annotated[bool, NEUTRAL] = True
    """Whether a repository that is made is private."""


@dataclass(config=STRICT, kw_only=True)
class Recipe:
    """One run from prompts to report."""

    name: Annotated[str, NEUTRAL] = "run"
    """Names the run; the run directory is runs/NAME unless output_dir says otherwise."""
    output_dir: Annotated[str | None, NEUTRAL] = None
    teacher: TeacherSection
    teachers: dict[str, TeacherSection] = field(default_factory=dict)
    """Several teachers by name, in the place of `teacher`; what they share (support, cache) is the same in all."""
    combine: CombineSetting | None = None
    """How several teachers are combined: a name of `limbeck combinations`, or a mapping with name and options."""
    student: StudentSection = field(default_factory=StudentSection)
    prompts: PromptsSection = field(default_factory=PromptsSection)
    responses: ResponsesSection = field(default_factory=ResponsesSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    contrast: ContrastSection = field(default_factory=ContrastSection)
    sft: SftSection | None = None
    train: TrainSection = field(default_factory=TrainSection)
    preference: PreferenceSection | None = None
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)

    @property
    def every_teacher(self) -> Mapping[str, TeacherSection]:
        """The sections of all teachers, by name; of one alone the name is empty."""
        return self.teachers or {"": self.teacher}

    @property
    def routing(self) -> Routing | None:
        """How each prompt is given one of several teachers; None where it is not."""
        return self.combine if isinstance(self.combine, Routing) else None

    @property
    def mixing(self) -> Mixing | None:
        """How several teachers score every response together; None where they do not."""
        return self.combine if isinstance(self.combine, Mixing) else None

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        """Columns of the data that teachers see, or are chosen by."""
        seen = (name for section in self.every_teacher.values() for name in section.sees.columns)
        return tuple(dict.fromkeys((*seen, *(self.combine.columns if self.combine else ()))))

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns of the data that are kept with the prompts: those that teachers read, and a checker of answers."""
        verify = self.responses.verify
        checked = () if verify is None or verify.column is None else (verify.column,)
        return tuple(dict.fromkeys((*self.teacher_columns, *checked)))

    @property
    def teacher_source(self) -> TeacherSection:
        """The section `teacher` with the model whose files it means."""
        return self.source_of(self.teacher)

    def source_of(self, teacher: TeacherSection) -> TeacherSection:
        """The section of a teacher with the model whose files it means: the student's, where that teaches itself or
        the teacher has no files."""
        elsewhere = isinstance(teacher.where, OnApi)
        if not (teacher.model in ITSELF or elsewhere) or self.student.model is None:
            return teacher
        own = self.student
        named = {"model": own.model, "revision": own.revision, "trust_remote_code": own.trust_remote_code}
        return replace(teacher, **named)

    @property
    def on_policy(self) -> bool:
        """Whether the student writes during training."""
        return self.responses.source.on_policy

    @property
    def documents(self) -> bool:
        """Whether the student learns from plain text, so that there are no prompts."""
        return self.responses.source.documents

    @property
    def base_author(self) -> InitialAuthor:
        """Author of the responses that are written before training."""
        return self.responses.source.initial_author or self.responses.initial_author

    @property
    def sft_on_data(self) -> bool:
        """Whether a first stage trains on answers of the data that the main training does not use."""
        return self.sft is not None and self.sft.source == "data" and self.base_author != "data"

    @property
    def sft_on_responses(self) -> bool:
        """Whether a first stage trains on the responses that are written before training."""
        return self.sft is not None and not self.sft_on_data

    @property
    def directory(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name


# Sections inside sections, and registries whose members are sections, for `sections_under`.
NESTED: dict[tuple[Any, str], Any] = {
    (Recipe, "teacher"): TeacherSection,
    (TeacherSection, "across"): AcrossSection,
    (Recipe, "student"): StudentSection,
    (StudentSection, "width"): WidthSection,
    (StudentSection, "lora"): LoraSection,
    (StudentSection, "quantize"): QuantizeSection,
    (Recipe, "prompts"): PromptsSection,
    (Recipe, "responses"): ResponsesSection,
    (ResponsesSection, "verify"): VerifySection,
    (VerifySection, "judge"): VerifyJudgeSection,
    (ResponsesSection, "server"): ServerSection,
    (ResponsesSection, "draft"): DraftSection,
    (Recipe, "objective"): ObjectiveSection,
    (Recipe, "contrast"): ContrastSection,
    (Recipe, "sft"): SftSection,
    (Recipe, "train"): TrainSection,
    (TrainSection, "lm"): LmSection,
    (Recipe, "preference"): PreferenceSection,
    (Recipe, "evaluate"): EvaluateSection,
    (EvaluateSection, "groups"): EVALUATION_GROUPS,
}

# Keys that hold a member of a registry; objectives and evaluation groups are read in ways of their own.
MEMBER_KEYS: dict[str, MemberKey[Any]] = {
    one.key: one for one in (WHERE, SEES_SETTING, COMBINE, GENERATE, SOURCE, ENGINE, OPTIM, PAIRS_SETTING)
}


def sections_under(section: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The sections at a key with their dotted place: one, or one for each member of a registry."""
    inner = NESTED.get((section, key))
    if isinstance(inner, Registry):
        yield from ((f"{key}.{name}", member) for name, member in inner.items())
    elif inner is not None:
        yield key, inner


# Keys of `objective` that are the same for all objectives.
AXES = tuple(f.name for f in fields(ObjectiveSection) if f.name != "options")
