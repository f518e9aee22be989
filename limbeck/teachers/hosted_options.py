"""Options of a hosted teacher, as a recipe sets them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from limbeck.client.openai import Server
from limbeck.fields import NEUTRAL, STRICT, Count, NonNegative, Positive
from limbeck.teachers.base import TeacherModel
from limbeck.teachers.hosted_asking import Api

if TYPE_CHECKING:
    import torch

    from limbeck.models.assets import DownloadProgress
    from limbeck.teachers.hosted import HostedTeacher

SECTION = "teacher.where"


@dataclass(config=STRICT, kw_only=True)
class OnApi:
    """A hosted service writes the answers, for money: `teacher.model` is the service's name of the model."""

    base_url: Annotated[str, NEUTRAL]
    """Of an OpenAI-compatible service, such as https://api.example.com/v1."""
    budget_usd: Annotated[NonNegative | None, NEUTRAL] = None
    """Dollars that this run may cost; no request is sent that might exceed them."""
    price_per_million: Annotated[tuple[NonNegative, NonNegative] | None, NEUTRAL] = None
    """Dollars for a million tokens that it reads and a million that it writes, such as [0.15, 0.6]."""
    api: Api = "chat"
    """Conversations, or texts to continue."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Likeliest tokens that it says of each position of its answers, for objectives that read the teacher; needs a
    student with the service's tokens. 0 asks for answers alone."""
    added_tokens: Annotated[int, Field(ge=0), NEUTRAL] = 64
    """Tokens that the service adds to a prompt of its own accord at most, for the most that a request can cost."""
    concurrency: Annotated[Count, NEUTRAL] = 8
    """Prompts asked at a time."""
    timeout_s: Annotated[Positive, NEUTRAL] = 120.0
    """Seconds for one whole answer."""
    retries: Annotated[int, Field(ge=0), NEUTRAL] = 5
    """Further tries when the service is out of reach, full or too slow."""
    api_key_env: Annotated[str | None, NEUTRAL] = None
    """Name of the environment variable that holds the key; never the key itself."""

    def open(self, model: TeacherModel, *, device: torch.device, progress: DownloadProgress | None) -> HostedTeacher:
        """Open the teacher; nothing is asked yet."""
        from limbeck.teachers.hosted import HostedTeacher

        return HostedTeacher(model=model, device=device, progress=progress, where=self)

    def server(self) -> Server:
        """The service, not asked anything yet."""
        return Server.at(self.base_url, self, SECTION)
