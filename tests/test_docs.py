"""The pages of docs/: what is generated is current, what they say of the objectives holds, what they link exists."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml

from benchmarks import gallery, objectives_page
from limbeck.evaluation.groups import EVALUATION_GROUPS
from limbeck.evaluation.scores.metrics import METRICS
from limbeck.evaluation.tasks.generators import GENERATORS
from limbeck.objectives import OBJECTIVES, Temperature, build_objective, token_values
from limbeck.objectives.sequence.rules import RULES
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import ObjectiveSection, known_keys, load_recipe, objective_of, shipped_recipes
from limbeck.recipe.teacher import TeacherSection
from limbeck.rollouts.engines import ENGINES
from limbeck.rollouts.registry import SOURCES
from limbeck.teachers.combinations import COMBINATIONS
from limbeck.teachers.registry import TEACHERS
from limbeck.teachers.sees import SEES
from limbeck.teachers.store.codecs import CODECS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
PAGES = tuple(sorted(path.relative_to(DOCS).as_posix() for path in (*DOCS.glob("*.md"), *DOCS.glob("api/*.md"))))


def text_of(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


def gradient(name: str, student_NV: torch.Tensor, teacher_NV: torch.Tensor, tau: float = 1.0, **options: Any):
    student_NV = student_NV.detach().requires_grad_()
    objective = build_objective(name, **options)
    token_values(objective, student_NV, teacher_NV, temperature=tau).sum().backward()
    assert student_NV.grad is not None
    return student_NV.grad


def test_table_of_objectives_is_current() -> None:
    assert text_of("objectives.md") == objectives_page.page(), (
        "docs/objectives.md is not what the registry gives: run `python -m benchmarks.gallery --table`"
    )


def test_tables_of_evaluation_groups_are_current() -> None:
    said = "| group | what it measures |\n|---|---|\n"
    said += "".join(f"| `{name}` | {EVALUATION_GROUPS.summary(name)} |\n" for name in EVALUATION_GROUPS)
    said += "\n| group | options |\n|---|---|\n"
    said += "".join(f"| `{name}` | {', '.join(EVALUATION_GROUPS.options(name))} |\n" for name in EVALUATION_GROUPS)
    assert said in text_of("evaluation.md"), f"docs/evaluation.md lists other groups or options; write\n{said}"


def test_tables_of_the_teachers_axes_are_current() -> None:
    said = "| `teacher.sees` | what it is |\n|---|---|\n"
    said += "".join(f"| `{name}` | {SEES.summary(name)} |\n" for name in SEES)
    combined = "| `combine` | what it is |\n|---|---|\n"
    combined += "".join(f"| `{name}` | {COMBINATIONS.summary(name)} |\n" for name in COMBINATIONS)
    assert combined in text_of("teachers.md"), f"docs/teachers.md lists other combinations; write\n{combined}"
    supports = get_args(get_type_hints(TeacherSection)["support"])
    for key, names in (("where", TEACHERS), ("sees", SEES), ("support", supports)):
        said_of = next(line for line in text_of("teachers.md").splitlines() if f"| `teacher.{key}` |" in line)
        assert re.findall(r"`(\w+)`", said_of) == list(names), f"docs/teachers.md lists other values of teacher.{key}"
    assert said in text_of("teachers.md"), f"docs/teachers.md lists other views; write\n{said}"


def test_every_option_is_explained() -> None:
    silent = [
        line
        for line in objectives_page.generated().splitlines()
        if line.startswith("- `") and line.rstrip().endswith("`")
    ]
    assert not silent, "options without words under 'Attributes:' in the docstring"


def test_every_objective_hangs_in_the_gallery() -> None:
    shown = {exhibit.name for room in gallery.ROOMS.values() for exhibit in room}
    assert shown.isdisjoint(gallery.LEFT_OUT)
    assert shown | set(gallery.LEFT_OUT) == set(OBJECTIVES), "add the objective to ROOMS in benchmarks/gallery.py"


@pytest.mark.parametrize("name", [*gallery.ROOMS, "js-forms", "gradient-size"])
def test_pictures_are_small_and_whole(name: str) -> None:
    path = DOCS / "gallery" / f"{name}.svg"
    root = ElementTree.parse(path).getroot()
    assert path.stat().st_size < 40_000
    assert f"gallery/{name}.svg" in text_of("gallery.md") + text_of("temperature.md") + text_of(
        "choosing-an-objective.md"
    )
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(exhibit.title in titles for exhibit in gallery.ROOMS.get(name, ())), (
        "run `python -m benchmarks.gallery` to draw what ROOMS holds"
    )


@pytest.mark.parametrize("title", ["forward KL", "reverse KL", "CSD, student-student"])
def test_numbers_of_the_gallery_are_measured(title: str) -> None:
    exhibit = next(one for room in gallery.ROOMS.values() for one in room if one.title == title)
    fits = gallery.fit(exhibit.objective)
    written = [line for line in text_of("gallery.md").splitlines() if line.startswith(f"| {title} |")]
    found = [float(number) for line in written for number in re.findall(r"\d+\.\d+", line)]
    expected = [n for fit in fits[:-1] for n in (fit.mean, fit.width, fit.forward, fit.reverse)]
    expected += [n for fit in (fits[0], fits[-1]) for n in (fit.mean, fit.width)]
    assert found == pytest.approx(expected, abs=0.11), "run `python -m benchmarks.gallery`"


def test_modes_are_sought_and_covered_as_the_gallery_says() -> None:
    forward, reverse = (gallery.fit(build_objective(name)) for name in ("fkl", "rkl"))
    assert forward[0].width > 15 and abs(forward[0].mean - forward[-1].mean) < 0.1
    assert reverse[0].width < 4 and reverse[1].width > 12 and reverse[-1].width > 15


def test_gradients_relate_as_the_choosing_page_says() -> None:
    """Its table of sizes, for a student close to the teacher, and the identities of CSD far from it."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    far = teacher + 2 * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    near = teacher + 1e-6 * (far - teacher)
    unit = gradient("fkl", near, teacher)
    sizes = {
        "jeffreys": ({}, 2.0),
        "csd": ({}, 2.0),
        "todi": ({}, 1.5),
        "skl": ({}, 0.81),
        "srkl": ({}, 0.81),
        "js": ({}, 0.25),
        "ab": ({"alpha": 0.3, "beta": 0.7}, 1.0),
    }
    for name, (options, size) in sizes.items():
        torch.testing.assert_close(gradient(name, near, teacher, **options), size * unit, rtol=1e-3, atol=1e-12)
    for form, beta, size in (("gkd", 0.1, 0.09), ("gkd", 0.9, 0.09), ("normalized", 0.2, 1.0), ("endpoint", 0.5, 0.25)):
        found = gradient("js", near, teacher, form=form, beta=beta)
        torch.testing.assert_close(found, size * unit, rtol=1e-3, atol=1e-12)
    reverse, forward = gradient("rkl", far, teacher), gradient("fkl", far, teacher)
    torch.testing.assert_close(gradient("csd", far, teacher), 2 * reverse)
    jeffreys = token_values(build_objective("jeffreys"), far, teacher).unsqueeze(-1)
    teacher_teacher = gradient("csd", far, teacher, first="teacher", second="teacher")
    pair = gradient("csd", far, teacher, first="teacher", second="student")
    torch.testing.assert_close(pair, reverse + teacher_teacher / 2 + jeffreys * forward)
    d, q = far - teacher, far.softmax(-1)
    mean_q = (q * d).sum(-1, keepdim=True)
    pull = q * (mean_q - d.mean(-1, keepdim=True)) + (d - mean_q) / d.shape[-1]
    torch.testing.assert_close(gradient("csd", far, teacher, first="uniform", second="student"), reverse + pull)


def test_reverse_kl_at_scale_two_is_csd() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(3, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    (section,) = [b for b in blocks("choosing-an-objective.md", "yaml") if "rkl" in b]
    recipe = load_recipe({"teacher": {"model": "t"}, "student": {"model": "s"}, **yaml.safe_load(section)})
    temperature = Temperature(loss=recipe.objective.temperature, scale=recipe.objective.temperature_scale)
    token_values(objective_of(recipe), student, teacher, temperature=temperature).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, gradient("csd", student, teacher))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str) -> None:
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "__main__"})
    for section in blocks(page, "yaml"):
        given = yaml.safe_load(section)
        alone = {} if "teachers" in given else {"teacher": {"model": "t"}}
        recipe = load_recipe({**alone, "student": {"model": "s"}, **given})
        chosen = recipe.objective
        Temperature(
            loss=chosen.temperature,
            teacher=chosen.teacher_temperature,
            student=chosen.student_temperature,
            scale=chosen.temperature_scale,
        )
        objective_of(recipe)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_keys_exist(page: str) -> None:
    text = text_of(page)
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert not target or (DOCS / page).parent.joinpath(target).exists(), f"{page} links {target}"
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        assert f"### {anchor}\n" in text
    sections = {key.split(".")[0] for key in known_keys()}
    for key in re.findall(r"`([a-z]+\.[a-z_]+)(?=[`:=])", text):
        if key.split(".")[0] in sections and page != "methods.md":  # it has options of objectives too, and a test
            assert key in known_keys(), f"{page} names the key {key}"


@pytest.mark.parametrize("page", PAGES)
def test_objectives_named_in_tables_exist(page: str) -> None:
    """`name: x` in recipes' notation, wherever it stands in the text."""
    for name in re.findall(r"\{name: (\w+)", text_of(page)):
        assert name in {
            **OBJECTIVES,
            **RULES,
            **SOURCES,
            **GENERATORS,
            **SEES,
            **TEACHERS,
            **CODECS,
            **COMBINATIONS,
            **ENGINES,
        }


@pytest.mark.parametrize("page", [p for p in PAGES if p not in ("objectives.md", "methods.md")])
def test_lines_are_short(page: str) -> None:
    """But for tables, whose rows cannot be wrapped."""
    assert [line for line in text_of(page).splitlines() if len(line) > 125 and not line.startswith("| ")] == []


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("api/*.md")))
def test_names_of_the_api_pages_exist(page: str) -> None:
    """What `make docs` would refuse, without its tools."""
    for name in re.findall(r"^::: (\S+)$", text_of(f"api/{page}"), re.MULTILINE):
        parent, _, last = name.rpartition(".")
        found = hasattr(import_module(parent), last) or (hasattr(import_module(parent), "__path__") and find_spec(name))
        assert found, name


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_modules_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"(?<![\w/.-])((?:limbeck|tests|benchmarks|examples|docs)/[\w./-]*\w)", text):
        assert name.endswith("/NAME.yaml") or (ROOT / name).exists(), f"{page.name} names {name}"
    stages = {stage.name for stage in STAGES} | {"NAME"}
    assert set(re.findall(r"stages/(\w+)\.json", text)) <= stages
    for name in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert find_spec(name), f"{page.name} names {name}"


def test_every_shipped_recipe_has_its_row() -> None:
    cells = [line.split("|")[1] for line in text_of("recipes.md").splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([\w/-]+)`", cell)}
    assert {name for name in shipped_recipes() if not name.startswith("lab/")} <= names


def test_what_was_measured_here_has_its_page() -> None:
    text = text_of("choosing-an-objective.md")
    marks = re.findall(r"\*\*\[measured here\]\*\*(\s+\(\[[^\]]+\]\((results/[\w-]+\.md))?", text)
    assert len(marks) >= 12 and all((DOCS / page).is_file() for _, page in marks if page)
    # The list of marks at the top is the one that links nothing.
    assert sum(1 for _, page in marks if not page) == 1


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    listed = re.findall(r"[\w./-]+\.md", yaml.safe_dump(site["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_readme_links_what_exists_and_gives_the_measured_numbers() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", readme):
        assert (ROOT / target).exists(), target
    rows = [line for line in readme.splitlines() if re.match(r"\| [^|]+ \| [\d.]+ \|", line)]
    measured = text_of("results/quickstart.md").splitlines()
    assert len(rows) >= 5 and [row for row in rows if row not in measured] == []
    assert (DOCS / "report.png").stat().st_size < 200_000


def test_migration_table_names_every_axis_of_temperature() -> None:
    axes = {f"objective.{name}" for name in ObjectiveSection.__dataclass_fields__ if "temperature" in name}
    assert all(f"`{axis}`" in text_of("temperature.md") for axis in axes | {"responses.temperature"})
    for tool in ("GKDTrainer", "DistillationTrainer", "GOLD", "Liger", "ms-swift", "verl", "NeMo-RL", "axolotl"):
        assert tool in text_of("temperature.md")


def test_neutral_factors_are_those_of_the_registry() -> None:
    """The table in temperature.md says the factor the code takes at tau 3."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (tau\^2|tau|1) \|", text_of("temperature.md"), re.MULTILINE)
    said = {name: factor for names, factor in rows for name in re.findall(r"\w+", names)}
    for name, kind in OBJECTIVES.items():
        objective = kind()
        if "teacher" not in objective.reads or objective.order is None:
            continue
        if name in said:
            factor = {"1": 1.0, "tau": 3.0, "tau^2": 9.0}[said[name]]
            resolved = Temperature(loss=3.0).factor(objective.order)
            assert resolved is not None and math.isclose(resolved, factor)
    assert {"fkl", "rkl", "js", "skl", "srkl", "ab", "tv", "csd", "dld", "lskd", "akl", "todi"} <= said.keys()


def test_every_metric_is_explained() -> None:
    """In the words of the registry, with unit and direction."""
    page = " ".join(text_of("evaluation.md").split())
    directions = {"lower": "lower", "higher": "higher", "match": "nearer to the teacher", "context": "context"}
    for name, metric in METRICS.items():
        if name.removeprefix("teacher_") in METRICS and metric.meaning == "the same of the teacher":
            continue
        about = ", ".join(part for part in (metric.unit, directions[metric.better]) if part)
        assert f"- `{name}` ({about}): {' '.join(metric.meaning.split())}." in page, name
