"""Keys that change nothing are said once, on the field: fingerprints and comparisons agree with it, key by key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import ConfigDict, TypeAdapter, ValidationError

from limbeck.compare.runs import gather
from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.fields import NEUTRAL
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.keys import neutral_keys, same_arm_keys
from limbeck.recipe.load import Recipe, known_keys, load_recipe, member_keys, to_yaml
from limbeck.recipe.preference import PreferenceSection
from limbeck.recipe.responses import ResponsesSection
from limbeck.recipe.sections import MEMBER_KEYS, PromptsSection, TrainSection
from limbeck.recipe.teacher import TeacherSection
from limbeck.teachers.in_process import InProcess
from limbeck.teachers.registry import TEACHERS
from limbeck.types import LimbeckError
from tests.compare.compare_runs import write_arm_run
from tests.tiny_pair import TinyPair

SECTIONS = {f"{prefix}" for prefix in known_keys() if any(key.startswith(f"{prefix}.") for key in known_keys())}
LEAVES = [key for key in known_keys() if key not in SECTIONS]
# What these name is in the fingerprints as weights, not how it was found.
FOUND_ELSEWHERE = {f"{section}.{key}" for section in ("teacher", "student", "responses.draft")
                   for key in ("revision", "trust_remote_code")}  # fmt: skip
MEMBERS: dict[str, tuple[Any, ...]] = {
    "responses.source": ("student", "data", {"name": "mixed", "share": 0.7}, {"name": "text", "max_tokens": 9}),
    "responses.engine": ({"name": "vllm", "base_url": "http://localhost:9/v1"}, "in_process"),
    "teacher.where": (
        "none",
        {"name": "server", "base_url": "http://localhost:9/v1", "model": "teacher"},
        {"name": "api", "base_url": "http://localhost:9/v1"},
        {"name": "placed", "memory": {"cpu": "1GiB"}},
        "sharded",
    ),
    "teacher.sees": ("column", {"name": "system", "text": "Be short."}),
    "combine": (
        {"name": "mean_log_p"},
        {"name": "mean_p"},
        {"name": "rule", "patterns": {"one": "say"}, "otherwise": "two"},
    ),
    "preference.pairs": ({"name": "teacher", "samples": 3}, {"name": "teacher", "margin": 0.5}),
    "prompts.generate": ("chain", {"name": "chain", "longest": 5}),
    "train.optim": ("sgd", {"name": "sgd", "momentum": 0.5}),
}
MEMBER_SECTIONS: dict[str, type] = {
    "responses.source": ResponsesSection,
    "responses.engine": ResponsesSection,
    "teacher.where": TeacherSection,
    "teacher.sees": TeacherSection,
    "combine": Recipe,
    "preference.pairs": PreferenceSection,
    "train.optim": TrainSection,
    "prompts.generate": PromptsSection,
}
PLAIN = (True, False, 1, 2, 3, 7, 0.25, 0.5, 0.75, "x", None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    return TinyPair.write(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def bases(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> list[Recipe]:
    """Recipes that between them have every section and every group."""
    folder = tmp_path_factory.mktemp("runs")
    # Of quantised students alone.
    groups: dict[str, Any] = {name: {} for name in EVALUATION_GROUPS if name != "recovery"}
    groups["judge"] = {"base_url": "http://localhost:1/v1"}
    common: dict[str, Any] = {
        "evaluate": {"groups": groups},
        "sft": {"num_train_epochs": 2.0},
    }
    served = tiny.tree(folder / "served", **common, responses={"server": {"base_url": "http://localhost:1/v1"}})
    served["student"] = {"init": "scratch", "model": str(tiny.teacher), "lora": {"r": 2}}
    drafted = tiny.tree(
        folder / "drafted", **common, responses={"source": "mixed", "draft": {"model": str(tiny.teacher)}}
    )
    drafted["student"] = {"init": "teacher", "quantize": {"format": "q8_0"}}
    drafted["evaluate"] = {"groups": groups | {"recovery": {}}}
    sparse = tiny.tree(folder / "sparse", **common, teacher={"support": "topk_tail", "support_k": 5})
    sparse["student"] = {"init": "width_prune", "width": {"intermediate_size": 40}}
    text = folder / "text.jsonl"
    text.write_text('{"text": "Some text to learn from."}\n' * 20, "utf-8")
    answered = folder / "answered.jsonl"
    answered.write_text(
        "".join(f'{{"prompt": "What is {i}?", "completion": "It is {i}."}}\n' for i in range(20)), "utf-8"
    )
    data = tiny.tree(
        folder / "data",
        **common,
        responses={"source": "data"},
        train={"lm": {"source": str(text)}},
        teacher={"across": {}},
    )
    data["prompts"]["source"] = str(answered)
    data["preference"] = {}
    checked = tiny.tree(folder / "checked", **common, responses={"verify": {"samples": 2}}, teacher={"across": {}})
    checked["prompts"] |= {"task": "gsm8k", "source": str(folder / "problems.jsonl")}
    problems = (f'{{"question": "What is {i} + 1?", "answer": "#### {i + 1}"}}\n' for i in range(20))
    (folder / "problems.jsonl").write_text("".join(problems), "utf-8")
    judge = {"base_url": "http://localhost:1/v1"}
    judged = tiny.tree(folder / "judged", **common, responses={"verify": {"samples": 2, "by": "judge", "judge": judge}})
    by_column = tiny.tree(folder / "by_column", **common, responses={"verify": {"by": "math", "column": "result"}})
    itself = tiny.tree(folder / "itself", **common, responses={"source": "student"})
    itself["teacher"] = {"model": "ema", "cache": False, "sees": {"name": "system", "text": "Be short."}}
    itself["student"] = {"model": str(tiny.teacher)}
    several = tiny.tree(folder / "several", **common)
    one = several.pop("teacher")
    several |= {
        "teachers": {"one": one, "two": one},
        "combine": {"name": "rule", "patterns": {"one": "a"}, "otherwise": "two"},
        "student": {"model": str(tiny.teacher)},
    }
    return [load_recipe(tree) for tree in (served, drafted, sparse, data, checked, judged, by_column, itself, several)]


def others(section: type, name: str, now: Any) -> Iterator[Any]:
    """Other values that a key may have."""
    if (section, name, now) == (Recipe, "combine", None):
        return  # Nothing is to be combined.
    for key, values in MEMBERS.items():
        if (section, name) == (MEMBER_SECTIONS[key], key.rpartition(".")[2]):
            yield from (value for value in values if MEMBER_KEYS[key].read(value) != now)
            return
    if (section, name) == (Recipe, "teachers"):
        yield from ({**now, named: replace(one, dtype="bfloat16")} for named, one in now.items())
        return
    hint = get_type_hints(section, include_extras=True)[name]
    adapter = TypeAdapter(hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    words = [word for part in literals(hint) for word in part]
    singles = [*words, *PLAIN, {}, {"a": 1}, {"prompt": "x"}, {"gsm8k": "x"}, {"name": "rkl"}, {"name": "dpkd"}]
    pairs = [(one,) for one in [*words, *PLAIN]] + [(2.0, 3.0)]
    for value in [*singles, *pairs, {"alpha": (0.1, 0.2)}]:
        try:
            adapter.validate_python(value)
        except ValidationError:
            continue
        if value != now:
            yield value


def literals(hint: Any) -> Iterator[tuple[Any, ...]]:
    if get_origin(hint) is Literal:
        yield get_args(hint)
    for part in get_args(hint):
        yield from literals(part)


def section_at(recipe: Recipe, path: list[str]) -> Any:
    return reduce(inside, path, recipe)


def inside(section: Any, name: str) -> Any:
    """What a section has under a name, if it is there; the groups are a mapping of which not all bases have all."""
    if section is None:
        return None
    return section.get(name) if isinstance(section, dict) else getattr(section, name)


def with_value(section: Any, path: list[str], value: Any) -> Any:
    """A section with another value at a dotted place."""
    inner = with_value(inside(section, path[0]), path[1:], value) if path[1:] else value
    return section | {path[0]: inner} if isinstance(section, dict) else replace(section, **{path[0]: inner})


def prints(recipe: Recipe) -> dict[str, str] | str:
    """The fingerprints of all stages, or why there are none."""
    try:
        return RunContext(recipe).fingerprints(STAGES)
    except (LimbeckError, OSError) as error:
        return str(error)


def changed(base: Recipe, key: str) -> Iterator[bool]:
    """Of some other values of a key: whether any fingerprint heeds it."""
    path = key.split(".")
    section = section_at(base, path[:-1])
    if section is None:
        return
    before = prints(base)
    assert isinstance(before, dict), before
    for value in islice(others(type(section), path[-1], getattr(section, path[-1])), 4):
        yield prints(with_value(base, path, value)) != before


@pytest.mark.parametrize("key", LEAVES)
def test_fingerprints_leave_out_the_neutral_keys_and_no_other(bases: list[Recipe], key: str) -> None:
    # Each costs as much as reading a recipe's models: no more are asked for than are needed.
    seen = (heeded for base in bases for heeded in changed(base, key))
    first = next(seen, None)
    assert first is not None, f"nothing else can be said for {key}: teach `others` a value"
    if key in neutral_keys():
        assert not first and not any(seen)
    elif key not in FOUND_ELSEWHERE:
        assert first or any(seen), f"{key} changes no fingerprint: is it one more neutral key?"


@pytest.mark.parametrize("key", [key for key in LEAVES if key != "train.seed"])
def test_two_seeds_that_differ_in_a_marked_key_are_one_arm(bases: list[Recipe], tmp_path: Path, key: str) -> None:
    path = key.split(".")
    base, value = next(
        (base, value)
        for base in bases
        if (section := section_at(base, path[:-1])) is not None
        for value in others(type(section), path[-1], getattr(section, path[-1]))
    )
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        recipe = replace(base, name="same", train=replace(base.train, seed=seed))
        folder.mkdir()
        (folder / "recipe.resolved.yaml").write_text(to_yaml(with_value(recipe, path, value) if seed else recipe))
    arms = gather(folders, None, tmp_path).arms
    assert len(arms) == (1 if key in same_arm_keys() else 2)


def test_the_price_of_a_judge_makes_no_other_arm(tmp_path: Path) -> None:
    prices = [None, [0.15, 0.6]]
    judged = [{"evaluate.groups.judge": {"price_per_million": price}} for price in prices]
    folders = [
        write_arm_run(tmp_path / f"run{n}", seed=n, name="same", recipe=recipe) for n, recipe in enumerate(judged)
    ]
    (arm,) = gather(folders, None, tmp_path).arms
    assert [member.seed for member in arm.members] == [0, 1]


def test_values_that_read_the_same_are_two_arms(tmp_path: Path) -> None:
    values = ["2", 2, 0.12345678, 0.12345679]
    folders = [
        write_arm_run(tmp_path / f"run{n}", recipe={"train.learning_rate": value}) for n, value in enumerate(values)
    ]
    names = [arm.name for arm in gather(folders, None, tmp_path).arms]
    assert names == [f"learning_rate={rest}" for rest in ("2", "2 (2)", "0.12345678", "0.12345679")]


def test_the_marked_keys() -> None:
    connection = {"base_url", "concurrency", "timeout_s", "retries", "api_key_env"}
    assert neutral_keys() == {
        *("name", "output_dir", "train.save_steps", "train.save_total_limit", "train.logging_steps", "train.report_to"),
        *("train.push_to_hub", "train.hub_model_id", "train.hub_private_repo", "train.sharding"),
        *("train.max_tokens_per_batch", "train.packing"),
        *(f"responses.server.{key}" for key in connection),
        *(f"evaluate.groups.judge.{key}" for key in connection | {"price_per_million"}),
        *(f"responses.engine.{key}" for key in connection | {"model", "folder", "seen_as"}),
        *(f"preference.pairs.{key}" for key in connection),
        *(f"responses.verify.judge.{key}" for key in connection),
        *("preference.save_steps", "preference.save_total_limit"),
        *(
            "teacher.where.max_tokens_per_batch",
            "teacher.where.path",
            "teacher.where.folder",
            *(f"teacher.where.{key}" for key in connection),
        ),
        *(f"teacher.where.{key}" for key in ("budget_usd", "price_per_million", "added_tokens", "memory")),
    }
    batches = {"responses.batch_size", "responses.cache_gib", "evaluate.batch_size"}
    assert same_arm_keys() - neutral_keys() == {"train.seed", *batches}
    assert same_arm_keys() <= {*LEAVES, *member_keys()}


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Somewhere else."""

    address: Annotated[str, NEUTRAL] = "here"
    depth: int = 1

    def open(self, model: Any, *, device: Any, progress: Any) -> Any:
        return InProcess().open(model, device=device, progress=progress)


def test_marks_of_a_member_from_outside_are_heeded(tiny: TinyPair, tmp_path: Path) -> None:
    TEACHERS.register("elsewhere", Elsewhere)
    try:
        assert "teacher.where.address" in neutral_keys() and "teacher.where.depth" not in neutral_keys()
        base = tiny.tree(tmp_path / "run", teacher={"where": {"name": "elsewhere"}})
        plain, moved, deeper = (
            prints(load_recipe(base, [f"teacher.where.{more}"])) for more in ("depth=1", "address=there", "depth=2")
        )
        assert plain == moved != deeper
    finally:
        TEACHERS.unregister("elsewhere")
