"""The commands `limbeck store ...`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from limbeck.types import LimbeckError

if TYPE_CHECKING:
    from limbeck.teachers.store.base import Codec

store = typer.Typer(
    name="store",
    help="Keep a teacher's signals in a directory that any number of runs, students and machines train on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, a YAML file, or a run directory.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, e.g. prompts.limit=100.")
]
CodecOption = Annotated[
    str | None,
    typer.Option(
        "--codec",
        help="What is kept of each token: a name of `limbeck store codecs`, or e.g. '{name: topk, k: 64, bits: 9}'. "
        "Default: as the recipe's teacher.support.",
    ),
]
PathArgument = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@store.command()
def capture(
    recipe: RecipeArgument,
    path: PathArgument,
    overrides: Overrides = None,
    codec: CodecOption = None,
    update: Annotated[bool, typer.Option("--update", help="As of `limbeck run`.")] = False,
    debug: Debug = False,
) -> None:
    """Score a recipe's responses with its teacher into a store; what is there is kept, what is damaged made again."""
    del debug
    from limbeck.pipeline.store_capture import capture as capture_recipe
    from limbeck.recipe.load import load_recipe_or_run
    from limbeck.runtime.console import default_console

    console = default_console()
    chosen = _codec(codec)
    end = capture_recipe(load_recipe_or_run(recipe, overrides or ()), path, chosen, console=console, update=update)
    console.say(f"store: {end.added:,} responses added ({end.tokens:,} tokens), {end.found:,} were there")
    print(path)


@store.command()
def estimate(
    recipe: RecipeArgument, overrides: Overrides = None, codec: CodecOption = None, debug: Debug = False
) -> None:
    """Print how large the store of a recipe will be, before any model runs."""
    del debug
    from limbeck.pipeline.store_estimate import estimate_recipe
    from limbeck.recipe.load import load_recipe_or_run
    from limbeck.runtime.console import QuietConsole
    from limbeck.teachers.store.codecs import codec_text
    from limbeck.teachers.store.estimate import total_bytes

    found = estimate_recipe(load_recipe_or_run(recipe, overrides or ()), _codec(codec), console=QuietConsole())
    for part in found.parts:
        print(
            f"{codec_text(part.codec)}: {part.responses:,} responses, {part.tokens:,} tokens, "
            f"{part.per_token:,} bytes per token, {_size(part.bytes)}"
            + (f", of which {_size(part.shared)} are the head" if part.shared else "")
        )
    most = "" if found.exact else "at most "
    print(f"{most}{total_bytes(found.parts)} bytes ({_size(total_bytes(found.parts))})")


@store.command()
def verify(path: PathArgument, debug: Debug = False) -> None:
    """Read a whole store and name every file that is not what was written; exit code 1 where there is one."""
    del debug
    from limbeck.runtime.console import on_one_line
    from limbeck.teachers.store.reader import sealed_shards
    from limbeck.teachers.store.verifying import verify as verify_store

    found = verify_store(path)
    for fault in found:
        print(on_one_line(str(fault)))
    if found:
        print(f"{len(found)} files are damaged; run `limbeck store capture` of the recipe again, which makes them anew")
        raise typer.Exit(1)
    print(f"{len(sealed_shards(path))} shards are as they were written")


@store.command()
def inspect(path: PathArgument, debug: Debug = False) -> None:
    """Print what a store holds: teacher, template, codec, temperatures, responses, bytes per token."""
    del debug
    from limbeck.runtime.console import on_one_line
    from limbeck.teachers.store.inspecting import describe

    for key, value in describe(path).items():
        print(f"{on_one_line(key):<22} {on_one_line(value)}")


@store.command()
def merge(
    path: Annotated[Path, typer.Argument(metavar="STORE", help="Store to write; it may hold something already.")],
    sources: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores to add to it.")],
    debug: Debug = False,
) -> None:
    """Put what several stores of one teacher, template and codec hold into one, each text once."""
    del debug
    from limbeck.runtime.console import default_console
    from limbeck.teachers.store.merging import merge as merge_stores

    merge_stores(path, sources, say=default_console().say)
    print(path)


@store.command()
def codecs() -> None:
    """List the codecs with their options."""
    from limbeck.teachers.store.codecs import CODECS

    for name in CODECS:
        print(f"{name:<24} {CODECS.summary(name)}")
        for option in CODECS.options(name).values():
            print(f"{'':<24}   {option.name}: {option.kind} = {option.default}")


def _codec(text: str | None) -> Codec | None:
    """The codec of the option --codec."""
    from limbeck.recipe.yaml_text import parse
    from limbeck.teachers.store.codecs import CODECS, read_codec

    if text is None:
        return None
    value = parse(text, "--codec")
    if isinstance(value, str):
        return CODECS.build(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return read_codec(dict(value))
    raise LimbeckError(f"--codec is {text!r}; expected a name of {', '.join(CODECS)}, or a mapping of name and options")


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
