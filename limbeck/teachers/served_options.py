"""Options of a teacher behind a server, as a recipe sets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.client.openai import Server
from limbeck.client.pool import servers_at
from limbeck.fields import NEUTRAL, STRICT, Count, Positive
from limbeck.teachers.base import TeacherModel
from limbeck.types import Support

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress
    from limbeck.teachers.served import ServedTeacher

SECTION = "teacher.where"


@dataclass(config=STRICT, kw_only=True)
class OnServer:
    """A server scores the responses: the teacher's weights are not on this machine."""

    base_url: Annotated[str | tuple[str, ...], NEUTRAL]
    """Of the server, such as http://localhost:8000/v1; of several with the same model they share the requests."""
    model: str | None = None
    """The server's name of the teacher; null takes the only model it offers."""
    api: Literal["auto", "vllm", "sglang", "llamacpp"] = "auto"
    """How it is asked; auto takes the first way that it answers."""
    gives: Literal["auto", "hidden", "topk"] = "auto"
    """What it is asked for: hidden states, by which its whole distribution is known (vLLM, in its answers or by a
    folder that this machine sees too), or its likeliest tokens; auto takes what teacher.support needs."""
    folder: Annotated[str | None, NEUTRAL] = None
    """Where the folder that it writes hidden states into lies on this machine; null takes them from its answers, or the
    path that it names."""
    concurrency: Annotated[Count, NEUTRAL] = 8
    """Responses asked about at a time."""
    timeout_s: Annotated[Positive, NEUTRAL] = 120.0
    """Seconds for one whole answer."""
    retries: Annotated[int, Field(ge=0), NEUTRAL] = 5
    """Further tries when the server is out of reach, full or too slow."""
    api_key_env: Annotated[str | None, NEUTRAL] = None
    """Name of the environment variable that holds the key; never the key itself."""

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> ServedTeacher:
        """Open the teacher; nothing is asked yet."""
        from limbeck.teachers.served import ServedTeacher

        return ServedTeacher(model=model, device=device, progress=progress, where=self)

    def signal_for(self, support: Support) -> Literal["hidden", "topk"]:
        """What the server is asked for, where a run keeps some support of each position."""
        if self.gives != "auto":
            return self.gives
        return "hidden" if support in ("full", "sampled") else "topk"

    def servers(self) -> tuple[Server, ...]:
        """The servers, not asked anything yet.

        Raises:
            LimbeckError: as `servers_at`.
        """
        return servers_at(self.base_url, self, SECTION, "the teacher")
