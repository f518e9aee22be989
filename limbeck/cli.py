"""The command line: a whole run, its stages one by one, sweeps, comparison, export and lists."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.pipeline.store_verbs import store
from limbeck.types import LimbeckError

app = typer.Typer(
    name="limbeck",
    help="Distil a large language model: prompts, responses, teacher, student, evaluation, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(store)

# typer keeps the class of every mistake on the command line private; this is its public child's parent.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, a YAML file, or a run directory.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. train.max_steps=20.")
]
Update = Annotated[
    bool,
    typer.Option(
        "--update", help="Redo what other inputs made in this directory; the old results move to superseded/."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point. Errors that a user can correct give one line and exit code 2; a signal gives 128 + its number."""
    try:
        # Not `app()`: typer would turn an interruption into a silent exit and a wrong option into a page of help.
        with typer.main.get_command(app).make_context("limbeck", sys.argv[1:]) as context:
            context.command.invoke(context)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except _USAGE_ERROR as error:
        from limbeck.runtime.launcher import is_first_of_machine

        # Each rank of a launch has the same.
        _fail(_usage_line(error) if is_first_of_machine() else None)
    except KeyboardInterrupt as interrupt:
        if "--debug" in sys.argv:
            raise
        print("\nstopped; what is finished is on disk, and the same command continues", file=sys.stderr)
        sys.exit(128 + (interrupt.args[0] if interrupt.args else signal.SIGINT))
    except BrokenPipeError:
        # The reader of the output has ended (`limbeck objectives | head`). Python must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from limbeck.types import SaidElsewhere

        line = None if "--debug" in sys.argv else _line_of(error)
        if line is None:
            raise
        _fail(None if isinstance(error, SaidElsewhere) else line)


def _line_of(error: Exception) -> str | None:
    from limbeck.runtime.errors import explain

    return explain(error)


def _usage_line(error: Any) -> str:
    """A mistake in the command itself: its message and where to read on."""
    where = error.ctx.command_path if error.ctx is not None else "limbeck"
    said = error.format_message().strip()
    if "\n" in said:
        # The help page that a bare command asks for.
        print(said)
        sys.exit(2)
    return f"{said[0].lower()}{said[1:].rstrip('.')}; see `{where} --help`"


def _fail(message: str | None) -> None:
    """End with exit code 2, and a line where no other rank says it."""
    from limbeck.runtime.console import printable

    if message is not None:
        print(f"limbeck: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


def _run_until(recipe: str, overrides: list[str] | None, verb: str, update: bool) -> None:
    from limbeck.api import load
    from limbeck.pipeline.stage_order import STAGES
    from limbeck.runtime.launcher import said_once_a_machine

    with said_once_a_machine():
        loaded = load(recipe, *(overrides or []))
    run = _ran(loaded, STAGES, verb, update)
    if not int(os.environ.get("RANK", "0")):
        print(run.report if verb == "report" else run.root)


def _ran(recipe: Any, stages: Any, verb: str, update: bool) -> Any:
    from limbeck.pipeline.engine import run_pipeline
    from limbeck.runtime.console import default_console

    console = default_console()
    with warnings.catch_warnings():
        # A user reads what is wrong, not which of our lines noticed it.
        warnings.showwarning = lambda message, *_args, **_options: console.warn(" ".join(str(message).split()))
        return run_pipeline(recipe, stages=stages, until=verb, update=update, console=console)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(f"limbeck {version_of('limbeck')}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")] = False,
    update: Update = False,
    debug: Debug = False,
) -> None:
    """Make a whole run: prompts, responses, teacher's signal, training, evaluation, report."""
    del debug
    if print_config:
        from limbeck.api import load
        from limbeck.recipe.load import objective_of, to_yaml

        loaded = load(recipe, *(overrides or []))
        objective_of(loaded)
        print(to_yaml(loaded), end="")
        return
    _run_until(recipe, overrides, "report", update)


def _list_devices(wanted: bool) -> None:
    if wanted:
        from limbeck.models.devices import DEVICES

        _list(DEVICES)
        raise typer.Exit


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    devices: Annotated[str, typer.Option("--devices", help="Number and kind, such as 8xH100; see --list.")] = "cpu",
    price: Annotated[float | None, typer.Option("--price", help="Dollars per hour of one device.", min=0)] = None,
    answer: Annotated[
        int | None, typer.Option("--answer-tokens", help="Mean length of answers that are not written yet.", min=1)
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch", help="Print the commands that start the run: torchrun, accelerate, slurm or skypilot."
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the models and time the pieces of the recipe on this machine.")
    ] = False,
    probe_seconds: Annotated[
        float | None,
        typer.Option("--probe-seconds", help="Seconds that the pieces may take together (20)."),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option("--list", help="List the known devices and stop.", is_eager=True, callback=_list_devices),
    ] = False,
    debug: Debug = False,
) -> None:
    """Say what a run will take: memory per rank, disk, tokens, hours, money, and what would make it fit."""
    del list_, debug
    from limbeck.pipeline.plan.verb import PROBE_SECONDS, plan_text

    probe_s = PROBE_SECONDS if probe and probe_seconds is None else probe_seconds
    print(plan_text(recipe, overrides or (), devices, price, answer, launch=launch, probe_s=probe_s), end="")


@app.command()
def prompts(recipe: RecipeArgument, overrides: Overrides = None, update: Update = False, debug: Debug = False) -> None:
    """Read the prompts and split them into training and held-out."""
    del debug
    _run_until(recipe, overrides, "prompts", update)


@app.command()
def respond(recipe: RecipeArgument, overrides: Overrides = None, update: Update = False, debug: Debug = False) -> None:
    """Run the stages up to the responses: sample them from the teacher, or take those of the data."""
    del debug
    _run_until(recipe, overrides, "respond", update)


@app.command()
def teach(recipe: RecipeArgument, overrides: Overrides = None, update: Update = False, debug: Debug = False) -> None:
    """Run the stages up to the teacher's signal on every response token."""
    del debug
    _run_until(recipe, overrides, "teach", update)


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None, update: Update = False, debug: Debug = False) -> None:
    """Run the stages up to the trained student."""
    del debug
    _run_until(recipe, overrides, "train", update)


@app.command()
def prefer(recipe: RecipeArgument, overrides: Overrides = None, update: Update = False, debug: Debug = False) -> None:
    """Run the stages up to the student after preference tuning, where the recipe has a section preference."""
    del debug
    _run_until(recipe, overrides, "prefer", update)


@app.command()
def evaluate(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE|STUDENT", help="A recipe or a run; with --prompts, a model."),
    ],
    overrides: Overrides = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Evaluate a model on this file or data set, without a run.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="With --prompts: the model it is compared with.")
    ] = None,
    groups: Annotated[
        str | None, typer.Option("--groups", help="What is measured, e.g. fidelity,diversity (evaluate.groups).")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-evaluation-harness, e.g. ifeval,arc_easy.")
    ] = None,
    update: Update = False,
    debug: Debug = False,
) -> None:
    """Measure a student on held-out prompts: that of a run, or with --prompts any model beside any teacher."""
    del debug
    changes = [*(overrides or [])]
    if groups is not None:
        changes.append(f"evaluate.groups=[{groups}]")
    if lm_eval is not None:
        changes.append(f"evaluate.groups.tasks.lm_eval=[{lm_eval}]")
    if prompts is None:
        if teacher is not None:
            raise LimbeckError("--teacher goes with --prompts; of a run, name the teacher with teacher.model=...")
        _run_until(recipe, changes, "evaluate", update)
        return
    from limbeck.pipeline.standalone_evaluation import STANDALONE_STAGES, recipe_of

    print(_ran(recipe_of(recipe, teacher, prompts, changes), STANDALONE_STAGES, "report", update).report)


@app.command()
def sweep(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A shipped sweep's name, a YAML file, or a directory.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Changes to the recipe of all arms; sweep.KEY=VALUE to the sweep."
        ),
    ] = None,
    update: Update = False,
    debug: Debug = False,
) -> None:
    """Run many variants of one recipe: arms, seeds, tuned values. Results that they share are made once."""
    del debug
    from limbeck.sweep.runner import run_sweep

    end = run_sweep(sweep, *(overrides or []), update=update)
    print(end.page)
    if end.exit_code:
        raise typer.Exit(end.exit_code)


@app.command()
def report(recipe: RecipeArgument, overrides: Overrides = None, debug: Debug = False) -> None:
    """Write the report of a run as far as it has come."""
    del debug
    from limbeck.api import load
    from limbeck.report import write_report
    from limbeck.runtime.console import default_console
    from limbeck.runtime.rundir import RunDirectory

    found = RunDirectory(load(recipe, *(overrides or [])).directory)
    if not found.recipe.exists():
        raise LimbeckError(f"{found.root} is no run directory yet; start it with `limbeck run {recipe}`")
    # A run in progress writes the same page, and removes files that look half written.
    with found.locked(default_console().warn):
        print(write_report(found.root))


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; a sweep's directory stands for its runs.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Page to write; .md and .csv with the same numbers appear beside it.")
    ] = Path("compare.html"),
    metric: Annotated[
        str | None, typer.Option("--metric", help="What to rank by, such as rouge_l or distinct_2@T=0.7.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Rank runs on one page, with what other examples and other seeds could have changed."""
    del debug
    from limbeck.compare import write_comparison

    title = runs[0].resolve().name if len(runs) == 1 else f"{len(runs)} runs compared"
    print(write_comparison(runs, out, title=title, metric=metric))


@app.command()
def objectives() -> None:
    """List the objectives with their options."""
    from limbeck.objectives import OBJECTIVES

    _list(OBJECTIVES)


@app.command()
def sources() -> None:
    """List the response sources, which set who writes what the student is trained on, with their options."""
    from limbeck.rollouts.registry import SOURCES

    _list(SOURCES)


@app.command()
def engines() -> None:
    """List what can write the student's responses while it trains (responses.engine), with options."""
    from limbeck.rollouts.engines import ENGINES

    _list(ENGINES)


@app.command()
def groups() -> None:
    """List the evaluation groups with their options."""
    from limbeck.evaluation.groups import EVALUATION_GROUPS

    _list(EVALUATION_GROUPS)


@app.command()
def teachers() -> None:
    """List where a teacher can be (teacher.where), with options."""
    from limbeck.teachers.registry import TEACHERS

    _list(TEACHERS)


@app.command()
def views() -> None:
    """List what a teacher can see of a prompt (teacher.sees), with options."""
    from limbeck.teachers.sees import SEES

    _list(SEES)


@app.command()
def combinations() -> None:
    """List how several teachers can be combined (combine), with options."""
    from limbeck.teachers.combinations import COMBINATIONS

    _list(COMBINATIONS)


def _list(registry: Any) -> None:
    """Print the members of a registry, each with its options below."""
    for name in registry:
        print(f"{name:<24} {registry.summary(name)}")
        for option in registry.options(name).values():
            default = "" if option.default is None else f" = {option.default}"
            print(f"{'':<24}   {option.name}: {option.kind}{default}")


@app.command()
def doctor(
    teacher: Annotated[str, typer.Argument(help="Name, directory, hub id or GGUF file.")],
    student: Annotated[str, typer.Argument(help="Name, directory, hub id or GGUF file.")],
    teacher_revision: Annotated[
        str | None, typer.Option("--teacher-revision", help="Branch, tag or commit of a teacher on the hub.")
    ] = None,
    student_revision: Annotated[str | None, typer.Option("--student-revision", help="The same of the student.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the two models.")
    ] = False,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", help="Source of prompts that a pair with different tokens is tried on; see prompts.source."
        ),
    ] = "builtin",
    debug: Debug = False,
) -> None:
    """Report whether a pair can be distilled: tokenizers, vocabularies, heads, windows, templates."""
    del debug
    from rich.console import Console

    from limbeck.models.doctor import doctor as examine
    from limbeck.models.doctor import doctor_table
    from limbeck.pipeline.student_endings import doctor_says

    found = examine(
        teacher,
        student,
        teacher_revision=teacher_revision,
        student_revision=student_revision,
        trust_remote_code=trust_remote_code,
    )
    pair = {
        "teacher": {"model": teacher, "revision": teacher_revision, "trust_remote_code": trust_remote_code},
        "student": {"model": student, "revision": student_revision, "trust_remote_code": trust_remote_code},
    }
    says = doctor_says(found.teacher, found.student, pair)
    if not found.distillable:
        from limbeck.pipeline.across import foreseen

        says = (*says, foreseen(found.teacher, found.student, pair, prompts))
    Console().print(doctor_table(found, says))
    if not found.distillable:
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run, a model, or a LoRA adapter, which is merged.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist yet.")],
    format: Annotated[str, typer.Option("--format", help="safetensors or gguf (llama.cpp).")] = "safetensors",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, float16, bfloat16, in GGUF also q4_0, q5_0, q8_0, q4_k, q6_k. Default: as it is stored.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a student as safetensors or GGUF, read it back and compare; nothing appears that differs."""
    del debug
    from limbeck.export import export_model
    from limbeck.runtime.console import default_console

    say = default_console().say
    print(export_model(source, out, format=format, dtype=dtype, trust_remote_code=trust_remote_code, say=say).file)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    template: Annotated[str, typer.Option("--from", help="Shipped recipe, or file, to start from.")] = "quickstart",
) -> None:
    """Write a recipe of your own to start from."""
    from limbeck.recipe.files import recipe_text
    from limbeck.recipe.load import load_recipe

    if path.exists():
        raise LimbeckError(f"{path} exists; name another file, or delete it first")
    load_recipe(template)
    path.write_text(recipe_text(template), "utf-8")
    print(f"wrote {path}; run it with: limbeck run {path}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from limbeck.recipe.load import json_schema

    print(json.dumps(json_schema(), indent=2))
