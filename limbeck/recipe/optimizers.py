"""What updates the student's weights: the members of `train.optim`, under the names of transformers' TrainingArguments.

To add one: write the dataclass and its line of `OPTIMIZERS`. What it keeps of each weight is in checkpoints by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field, PlainValidator
from pydantic.dataclasses import dataclass

from limbeck.fields import STRICT
from limbeck.recipe.member import MemberKey
from limbeck.registry import Registry
from limbeck.types import LimbeckError

if TYPE_CHECKING:
    import torch

OPTIM_KEY = "train.optim"
Groups = list[dict[str, Any]]


class AdamSettings(Protocol):
    """The keys of `train` that moments are kept by."""

    @property
    def adam_beta1(self) -> float: ...
    @property
    def adam_beta2(self) -> float: ...
    @property
    def adam_epsilon(self) -> float: ...


@dataclass(config=STRICT, kw_only=True)
class Optimizer(ABC):
    """What updates weights by their gradients.

    Class attributes:
        package: what is installed for it beside limbeck.
        shards: it updates a student that is sharded over ranks.
        adam: it reads the keys adam_beta1, adam_beta2 and adam_epsilon.
    """

    package: ClassVar[str | None] = None
    shards: ClassVar[bool] = False
    adam: ClassVar[bool] = False

    @abstractmethod
    def build(self, groups: Groups, *, rate: float, settings: AdamSettings) -> torch.optim.Optimizer:
        """The optimizer of some groups of weights, each with its weight decay."""

    @abstractmethod
    def state_bytes(self, weights: int, number: int, width: int) -> float:
        """Bytes that it keeps of so many weights in numbers of so many bytes.

        Args:
            width: of the student; no matrix is much narrower.
        """


def _adam_options(settings: AdamSettings) -> dict[str, Any]:
    return {"betas": (settings.adam_beta1, settings.adam_beta2), "eps": settings.adam_epsilon}


@dataclass(config=STRICT, kw_only=True)
class AdamW(Optimizer):
    """AdamW, some operations for all weights at a time."""

    shards: ClassVar[bool] = True
    adam: ClassVar[bool] = True
    fused: ClassVar[bool] = False

    def build(self, groups: Groups, *, rate: float, settings: AdamSettings) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=rate, fused=self.fused, **_adam_options(settings))

    def state_bytes(self, weights: int, number: int, width: int) -> float:
        return 2 * weights * number


@dataclass(config=STRICT, kw_only=True)
class FusedAdamW(AdamW):
    """AdamW in one kernel."""

    fused: ClassVar[bool] = True


@dataclass(config=STRICT, kw_only=True)
class AdamW8bit(Optimizer):
    """AdamW of bitsandbytes, with moments in 8 bits (Dettmers et al. 2022); matrices under 4096 weights keep 32."""

    package: ClassVar[str | None] = "bitsandbytes"
    adam: ClassVar[bool] = True

    def build(self, groups: Groups, *, rate: float, settings: AdamSettings) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit as Implementation  # type: ignore[import-not-found]

        return Implementation(groups, lr=rate, **_adam_options(settings))

    def state_bytes(self, weights: int, number: int, width: int) -> float:
        # Two bytes, and a float32 for each 256 of them.
        return 2 * weights * (1 + 4 / 256)


@dataclass(config=STRICT, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern 2018): of a matrix one number for each row and column."""

    def build(self, groups: Groups, *, rate: float, settings: AdamSettings) -> torch.optim.Optimizer:
        from transformers.optimization import Adafactor as Implementation

        # The rate is that of the schedule, as TrainingArguments have it, not one of Adafactor's own.
        return Implementation(groups, lr=rate, scale_parameter=False, relative_step=False)

    def state_bytes(self, weights: int, number: int, width: int) -> float:
        return 2 * weights / width * number


@dataclass(config=STRICT, kw_only=True)
class Sgd(Optimizer):
    """Stochastic gradient descent."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the last update that is kept in the next one."""

    shards: ClassVar[bool] = True

    def build(self, groups: Groups, *, rate: float, settings: AdamSettings) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=rate, momentum=self.momentum)

    def state_bytes(self, weights: int, number: int, width: int) -> float:
        return weights * number if self.momentum else 0


OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimizer",
    {
        "adamw_torch_fused": FusedAdamW,
        "adamw_torch": AdamW,
        "adamw_bnb_8bit": AdamW8bit,
        "adafactor": Adafactor,
        "sgd": Sgd,
    },
    entry_points="limbeck.optimizers",
)
OPTIM: MemberKey[Optimizer] = MemberKey(
    key=OPTIM_KEY, registry=OPTIMIZERS, default="adamw_torch_fused", example="adamw_torch"
)
# An optimizer, from its name or a mapping.
OptimSetting = Annotated[Optimizer, PlainValidator(OPTIM.read, json_schema_input_type=Any)]


def require_optimizer(optim: Optimizer, *, sharded: bool) -> None:
    """Refuse an optimizer whose library is not there, or that cannot update a sharded student.

    Raises:
        LimbeckError: naming the remedy.
    """
    name = OPTIM.name_of(optim)
    if optim.package is not None and find_spec(optim.package) is None:
        raise LimbeckError(
            f"{OPTIM_KEY}={name} needs {optim.package}, which is not installed; run pip install {optim.package}, or "
            f"leave {OPTIM_KEY} out"
        )
    if sharded and not optim.shards:
        able = ", ".join(known for known, member in OPTIMIZERS.items() if member.shards)
        raise LimbeckError(
            f"{OPTIM_KEY}={name} updates no student that is sharded over ranks; set {OPTIM_KEY} to one of {able}, or "
            "train.sharding=none"
        )
