"""Where the student's responses are written while it trains: in its own process, or by servers that take its weights.

To add an engine: write the dataclass, add its line to `ENGINES`, and what it is asked to `limbeck.sampling.weights`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.fields import NEUTRAL, STRICT, Count, Positive
from limbeck.registry import Registry
from limbeck.rollouts.options import SOURCE_KEY, OnPolicyOptions, SourceOptions
from limbeck.types import LimbeckError

# Where the options stand in a recipe, as messages name them.
ENGINE_KEY = "responses.engine"


@dataclass(config=STRICT, kw_only=True)
class Engine:
    """What writes the student's responses while it trains.

    Class attributes:
        elsewhere: it is another process, which gets the student's weights before each round.
    """

    elsewhere: ClassVar[bool] = False

    def check(self, source: SourceOptions, named: str) -> None:
        """Refuse a response source that the engine cannot write for.

        Args:
            named: the name of the source in the recipe.

        Raises:
            LimbeckError: it asks for more than the student's own responses in rounds.
        """
        return


@dataclass(config=STRICT, kw_only=True)
class InProcess(Engine):
    """The process that trains, with the student as it is."""


@dataclass(config=STRICT, kw_only=True)
class Vllm(Engine):
    """vLLM servers, which take the student's newest weights from a folder before each round."""

    base_url: Annotated[str | tuple[str, ...], NEUTRAL]
    """Of the server, such as http://localhost:8000/v1; several get the same weights and share the prompts."""
    model: Annotated[str | None, NEUTRAL] = None
    """The server's name of the student; null takes the only model it offers."""
    folder: Annotated[str | None, NEUTRAL] = None
    """Where the student's weights are written, for the servers to read; null is `engine` in the run directory."""
    seen_as: Annotated[str | None, NEUTRAL] = None
    """The servers' path of that folder, where it is not the one on this machine."""
    concurrency: Annotated[Count, NEUTRAL] = 32
    """Prompts asked at a time, of each server."""
    timeout_s: Annotated[Positive, NEUTRAL] = 600.0
    """Seconds for one whole answer, and for taking new weights."""
    retries: Annotated[int, Field(ge=0), NEUTRAL] = 5
    """Further tries when a server is out of reach, full or too slow; then it is left out until the next round."""
    api_key_env: Annotated[str | None, NEUTRAL] = None
    """Name of the environment variable that holds the key; never the key itself."""

    elsewhere: ClassVar[bool] = True

    @property
    def addresses(self) -> tuple[str, ...]:
        """One address per server."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    def check(self, source: SourceOptions, named: str) -> None:
        if not self.addresses:
            raise LimbeckError(f"{ENGINE_KEY}.base_url is empty; give the address of a server that serves the student")
        if len(set(self.addresses)) < len(self.addresses):
            raise LimbeckError(f"{ENGINE_KEY}.base_url names a server twice; name each once")
        if not isinstance(source, OnPolicyOptions):
            raise LimbeckError(
                f"{ENGINE_KEY}=vllm writes the student's responses, but responses.source={named} has none; remove it, "
                f"or set {SOURCE_KEY}=student (or mixed, pairs)"
            )
        if source.by_teacher:
            raise LimbeckError(
                f"{ENGINE_KEY}=vllm has the student alone, but with responses.source={named} the teacher draws tokens "
                f"too; remove {ENGINE_KEY}, or let the student write alone"
            )
        if source.replays:
            raise LimbeckError(
                f"{ENGINE_KEY}=vllm writes rounds of responses, but responses.source={named} writes some of them anew "
                f"in every step; remove {ENGINE_KEY}, or set {SOURCE_KEY}=mixed with a refresh"
            )
        if source.round_steps == 1:
            raise LimbeckError(
                f"{ENGINE_KEY}=vllm takes the student's weights from a folder before each round, and with "
                f"{SOURCE_KEY}.refresh=step that is a whole model on disk in every step; set {SOURCE_KEY}.refresh to "
                "epoch or a number of steps"
            )


ENGINES: Registry[Engine] = Registry("engine", {"in_process": InProcess, "vllm": Vllm}, entry_points="limbeck.engines")
