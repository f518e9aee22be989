"""Recipes: what a run is asked to do. Typed sections, YAML in and out, dotted overrides, unknown keys refused.

A recipe is one YAML file; its sections are the stages of the story in their order. `load_recipe` merges file and
overrides and validates them; every mistake is one `LimbeckError` line that names the key and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from limbeck import recipe_mistakes, recipe_text
from limbeck.flow import LimbeckError

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
Probability = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Strings = tuple[str, ...]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(config=_STRICT, kw_only=True)
class TeacherSection:
    model: str
    """A named asset (smollm2-135m-instruct), a local directory, a hub id or a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: Dtype = "float32"
    """Precision the teacher runs in."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless asked."""


@dataclass(config=_STRICT, kw_only=True)
class LoraSection:
    r: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Strings = ()
    """Module names; empty for every linear layer but the head."""


@dataclass(config=_STRICT, kw_only=True)
class StudentSection:
    model: str | None = None
    """Where the student comes from, as for the teacher; null takes the teacher itself (depth_prune, scratch)."""
    revision: str | None = None
    init: Literal["pretrained", "depth_prune", "scratch"] = "pretrained"
    """As loaded; blocks removed; or the architecture of `model` with fresh weights."""
    layers: Count | None = None
    """Blocks to keep with init depth_prune."""
    keep: tuple[int, ...] = ()
    """Blocks to keep by number with init depth_prune; empty lets limbeck measure which."""
    config: dict[str, Any] = field(default_factory=dict)
    """Changes to the model configuration with init scratch (num_hidden_layers, hidden_size, ...)."""
    dtype: Dtype = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False
    freeze_embeddings: bool = False
    """Leave input and output embeddings as they are: a pruned student speaks its teacher's language already."""
    lora: LoraSection | None = None
    """Train low-rank adapters instead of all weights; merged when the student is saved."""


@dataclass(config=_STRICT, kw_only=True)
class PromptsSection:
    source: str = "builtin"
    """builtin, a JSONL file, or a datasets directory or hub id."""
    eval_fraction: Fraction = 0.1
    """Share held out for evaluation, decided by a hash of each prompt."""
    limit: Annotated[int, Field(ge=2)] | None = None
    """Use only this many prompts, in the order of their hashes."""
    fields: dict[Literal["prompt", "completion", "category"], str] | None = None
    """For data in none of the known formats: its own names of the fields."""
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
    too_long: Literal["error", "drop"] = "error"
    """What happens to a prompt that does not fit the window; dropped ones are counted and reported."""


@dataclass(config=_STRICT, kw_only=True)
class ResponsesSection:
    author: Literal["teacher", "data"] = "teacher"
    """Who writes what the student learns from: sampled from the teacher, or the completions of the data."""
    max_new_tokens: Count = 256
    temperature: NonNegative = 1.0
    """Of sampling alone; 0 is greedy. Never enters the loss."""
    top_p: Probability = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    stop: Strings = ()
    batch_size: Count = 48
    seed: Seed = 0


@dataclass(config=_STRICT, kw_only=True)
class SignalSection:
    cache: bool = True
    """Write the teacher's signal to disk once; false runs the teacher beside the student in every epoch."""
    dtype: Dtype = "float32"
    """Precision of the cached hidden states."""
    support: Literal["full", "topk_renorm", "topk_tail", "sampled"] = "full"
    """What training sees of the teacher: every token (by hidden states), its k most likely tokens renormalised or with
    one class for all others, or a sample of it."""
    k: Count = 64
    """Tokens kept of each position with a top-k support; draws with a sampled one."""
    temperatures: tuple[Positive, ...] = ()
    """Loss temperatures a sparse signal is exact for; empty takes the objective's."""


@dataclass(config=_STRICT, kw_only=True)
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
    """One temperature a token around the loss temperature, by how far apart the two models are there (AdaKD's strength,
    0.5 in the paper); null gives all tokens the same."""
    schedule: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Options of the objective that move in a line over training, such as {progress: [0.4, 1.0]} for taid."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(config=_STRICT, kw_only=True)
class TrainSection:
    num_train_epochs: Positive = 1.0
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever the epochs."""
    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive = 1e-4
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "cosine_with_min_lr"
    ] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.01
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Positive = 1e-8
    max_grad_norm: NonNegative = 1.0
    """0 switches clipping off."""
    gradient_checkpointing: bool = False
    bf16: bool = False
    """Mixed precision: float32 weights, bfloat16 matrix products, float32 losses."""
    compile: Literal["auto", "on", "off"] = "auto"
    """The loss's elementwise body through torch.compile; auto where a C++ compiler exists."""
    seed: Seed = 0
    save_steps: Count = 50
    save_total_limit: Count = 2
    logging_steps: Count = 1
    report_to: Strings = ()
    """Names of accelerate trackers (tensorboard, wandb, ...); metrics.jsonl is always written."""


@dataclass(config=_STRICT, kw_only=True)
class EvaluateSection:
    """What is measured and how; a list alone, `evaluate: [fidelity, rouge]`, stands for its groups."""

    groups: tuple[Literal["fidelity", "rouge"], ...] = ("fidelity", "rouge")
    max_new_tokens: Count = 64
    """Length of the greedy answers that are compared."""
    prompts: Count | None = None
    """Greedy answers for at most this many held-out prompts; null for all."""
    samples: Annotated[int, Field(ge=0)] = 6
    """Answers shown side by side in the report."""
    batch_size: Count = 32


@dataclass(config=_STRICT, kw_only=True)
class Recipe:
    """One run from prompts to report."""

    name: str = "run"
    """Names the run; the run directory is runs/NAME unless output_dir says otherwise."""
    output_dir: str | None = None
    teacher: TeacherSection
    student: StudentSection = field(default_factory=StudentSection)
    prompts: PromptsSection = field(default_factory=PromptsSection)
    responses: ResponsesSection = field(default_factory=ResponsesSection)
    signal: SignalSection = field(default_factory=SignalSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)

    @property
    def directory(self) -> Path:
        return Path(self.output_dir) if self.output_dir else Path("runs") / self.name


_ADAPTER = TypeAdapter(Recipe)
_AXES = tuple(f.name for f in fields(ObjectiveSection) if f.name != "options")


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes in the package."""
    folder = resources.files("limbeck") / "recipes"
    return tuple(sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")))


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A validated recipe from a shipped name, a YAML file or a mapping, with `section.key=value` overrides on top.

    Raises:
        LimbeckError: unknown recipe, broken YAML, unknown key (with the nearest known one), wrong type or value.
    """
    tree = dict(recipe) if isinstance(recipe, Mapping) else _read(recipe)
    if isinstance(groups := tree.get("evaluate"), list | tuple):
        tree["evaluate"] = {"groups": groups}
    for override in overrides:
        _apply(tree, override)
    return _validate(tree)


def _read(recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if str(recipe) in shipped_recipes():
        name, text = str(recipe), (resources.files("limbeck") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    elif path.is_file():
        name = path.stem
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise LimbeckError(f"{path} is not UTF-8 text; a recipe is a YAML file") from None
    else:
        near = recipe_mistakes.nearest(str(recipe), shipped_recipes())
        raise LimbeckError(
            f"no recipe {str(recipe)!r}: neither a file nor a shipped recipe ({', '.join(shipped_recipes())}){near}"
        )
    tree = recipe_text.parse(text, f"recipe {recipe}")
    if not isinstance(tree, dict):
        got = "nothing" if tree is None else type(tree).__name__
        raise LimbeckError(f"recipe {recipe} holds {got}; expected sections such as 'teacher:' and 'student:'")
    return {"name": name, **tree}


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise LimbeckError(f"override {override!r} has no value; write section.key=value, e.g. train.max_steps=20")
    value = recipe_text.parse(text, f"the value of override {override!r}")
    if key == "evaluate" and isinstance(value, list):
        key = "evaluate.groups"
    *parents, leaf = key.split(".")
    node = tree
    for depth, part in enumerate(parents):
        child = node.get(part)
        if child is None:
            child = {}
        if not isinstance(child, Mapping):
            raise LimbeckError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        # A copy, so that a mapping handed in by a caller is never changed.
        node[part] = dict(child)
        node = node[part]
    node[leaf] = value


def _validate(tree: dict[str, Any]) -> Recipe:
    tree = recipe_text.plain(tree)
    objective = tree.get("objective")
    if isinstance(objective, dict) and "options" not in objective:
        options = {k: v for k, v in objective.items() if k not in _AXES}
        tree["objective"] = {k: v for k, v in objective.items() if k in _AXES} | {"options": options}
    try:
        # Through JSON, where strict mode still reads a mapping as a section and a list as a tuple.
        recipe = _ADAPTER.validate_json(json.dumps(tree))
    except ValidationError as error:
        raise LimbeckError(recipe_mistakes.explain(error, known_keys())) from None
    _check_consistency(recipe)
    return recipe


def _check_consistency(recipe: Recipe) -> None:
    parts = Path(recipe.name).parts
    if not parts or ".." in parts or Path(recipe.name).is_absolute() or not recipe.name.isprintable():
        raise LimbeckError(f"name: got {recipe.name!r}; expected a plain name, a path belongs in output_dir")
    reserved = sorted({*_AXES, "options"} & recipe.objective.options.keys())
    if reserved:
        raise LimbeckError(f"objective.options holds {reserved[0]!r}; write it as objective.{reserved[0]}")
    _check_axes(recipe)
    student = recipe.student
    if student.init == "pretrained" and student.model is None:
        raise LimbeckError("student.model is missing; name a model, or set student.init=depth_prune to cut the teacher")
    if student.init == "depth_prune" and (student.layers is None) == (not student.keep):
        raise LimbeckError("student.init=depth_prune needs student.layers (how many) or student.keep (which), not both")
    if student.init != "depth_prune" and (student.layers is not None or student.keep):
        raise LimbeckError(f"student.layers and student.keep belong to init depth_prune, not to init {student.init}")
    if student.init != "scratch" and student.config:
        raise LimbeckError(f"student.config belongs to init scratch, not to init {student.init}")


def _check_axes(recipe: Recipe) -> None:
    """Temperature and support: what excludes what."""
    objective, signal = recipe.objective, recipe.signal
    apart = next((s for s in ("teacher_temperature", "student_temperature") if getattr(objective, s) is not None), None)
    for moving in ("temperature_end", "temperature_adapt"):
        if apart is not None and getattr(objective, moving) is not None:
            raise LimbeckError(f"objective.{moving} moves both sides at once; remove objective.{apart}")
    if signal.support == "full":
        if signal.temperatures:
            raise LimbeckError("signal.temperatures belongs to a sparse signal.support; the full one knows them all")
        return
    if not signal.cache:
        raise LimbeckError(
            f"signal.support={signal.support} is what is kept on disk, but signal.cache is false; "
            "set signal.cache=true or signal.support=full"
        )
    if objective.temperature_end is not None and signal.support != "topk_renorm":
        raise LimbeckError(
            f"objective.temperature_end moves the temperature off the grid that signal.support={signal.support} holds; "
            "use signal.support=full or topk_renorm"
        )


def signal_temperatures(recipe: Recipe) -> tuple[float, ...]:
    """The loss temperatures that a sparse signal of this recipe is made for."""
    objective = recipe.objective
    teacher = objective.temperature if objective.teacher_temperature is None else objective.teacher_temperature
    return tuple(sorted({*recipe.signal.temperatures} or {teacher}))


def build_objective(recipe: Recipe) -> Any:
    """The recipe's objective from the registry; its unknown options are refused with the nearest known one."""
    from limbeck.objectives import OBJECTIVES
    from limbeck.objectives import build_objective as build

    section = recipe.objective
    own = [f.name for f in fields(OBJECTIVES[section.name])] if section.name in OBJECTIVES else []
    for key in section.options:
        if section.name in OBJECTIVES and key not in own:
            # What is misspelt may be an option of the objective or a key of the section, which is the same for all.
            near = recipe_mistakes.nearest(key, [f"objective.{known}" for known in (*_AXES, *own)])
            has = f"the options {', '.join(own)}" if own else "no options"
            raise LimbeckError(f"unknown key 'objective.{key}' (objective {section.name!r} has {has} of its own){near}")
    return build(section.name, **section.options)


def known_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe, without the objectives' own options."""

    def walk(section: Any, prefix: str) -> Iterable[str]:
        for f in fields(section):
            yield prefix + f.name
            nested = _SECTIONS.get((section, f.name))
            if nested is not None:
                yield from walk(nested, f"{prefix}{f.name}.")

    return tuple(walk(Recipe, ""))


_SECTIONS: dict[tuple[Any, str], Any] = {
    (Recipe, "teacher"): TeacherSection,
    (Recipe, "student"): StudentSection,
    (StudentSection, "lora"): LoraSection,
    (Recipe, "prompts"): PromptsSection,
    (Recipe, "responses"): ResponsesSection,
    (Recipe, "signal"): SignalSection,
    (Recipe, "objective"): ObjectiveSection,
    (Recipe, "train"): TrainSection,
    (Recipe, "evaluate"): EvaluateSection,
}


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested mappings, every default spelled out; the objective's options stand beside its name."""
    assert is_dataclass(recipe)
    tree: dict[str, Any] = recipe_text.plain(asdict(recipe))
    tree["objective"] |= tree["objective"].pop("options")
    return tree


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives the same recipe."""
    return recipe_text.dump(as_tree(recipe))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe for editors, with the options of every registered objective."""
    from limbeck.objectives import OBJECTIVES

    schema = _ADAPTER.json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "limbeck recipe"
    groups = schema["$defs"]["EvaluateSection"]["properties"]["groups"]
    schema["properties"]["evaluate"] = {
        "anyOf": [schema["properties"]["evaluate"], {k: v for k, v in groups.items() if k in ("type", "items")}]
    }
    section = schema["$defs"]["ObjectiveSection"]
    del section["properties"]["options"]
    section["properties"]["name"]["enum"] = sorted(OBJECTIVES)
    for objective in OBJECTIVES.values():
        for option in fields(objective):
            section["properties"].setdefault(option.name, {})
    return schema
