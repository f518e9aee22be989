"""Start of this process: alone, or as a rank of a launch; launches that limbeck cannot serve are refused.

What a launcher wants is in the environment. Of the ways to spread a training, one works: a whole student on each rank
(DDP). What asks for another would train something else, hang or fail at the end, so it is refused before any work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limbeck.types import LimbeckError

# Variables with which launchers ask for what is not there, and what they ask for.
_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "FSDP_": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_DEEPSPEED_": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "MEGATRON_LM_": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism configuration",
    "PARALLELISM_CONFIG_": "accelerate's parallelism configuration",
}
# Where launchers that know nothing of torch say how many processes they have started.
_STARTED = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun or srun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "WORLD_SIZE": "a launcher",
}


def _remedy(processes: int | str = "N") -> str:
    return f"start it with `torchrun --nproc-per-node={processes} -m limbeck run RECIPE`"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes that train together.

    Attributes:
        rank: this one's number.
        ranks: how many there are.
        launcher: the program that started them; None where it is not known.
    """

    rank: int = 0
    ranks: int = 1
    launcher: str | None = None

    @property
    def wrapper(self) -> str:
        """Name of the wrapper that spreads the training over the ranks."""
        return "DDP" if self.ranks > 1 else "none"

    def line(self, per_device: int | None = None, accumulation: int = 1) -> str:
        """The first line of a run: ranks, wrapper, launcher and, where it trains, the effective batch."""
        ranks = f"{self.ranks} ranks" if self.ranks > 1 else "1 process"
        line = f"launch: {ranks}, wrapper {self.wrapper}{f', started by {self.launcher}' if self.launcher else ''}"
        if per_device is None:
            return line
        batch = per_device * accumulation * self.ranks
        return f"{line}; {batch} responses per step ({per_device} per device x {accumulation} accumulated x {ranks})"

    def record(self, per_device: int | None = None, accumulation: int = 1) -> dict[str, object]:
        """The same, for provenance.json."""
        record: dict[str, object] = {"ranks": self.ranks, "wrapper": self.wrapper, "launcher": self.launcher}
        if per_device is None:
            return record
        batch = {"per_device_batch": per_device, "accumulation": accumulation}
        return record | batch | {"effective_batch": per_device * accumulation * self.ranks}


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Description of how this process was started.

    Raises:
        LimbeckError: the launch asks for what limbeck cannot do, or fewer processes were started than it asks for.
    """
    _refuse_sharded(environment)
    _refuse_accumulation(environment)
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if "RANK" in environment:
        rank, ranks = _number("RANK", environment), _number("WORLD_SIZE", environment)
        if ranks > 1:
            _number("LOCAL_RANK", environment)
        if not 0 <= rank < ranks:
            raise LimbeckError(f"RANK is {rank} and WORLD_SIZE {ranks}; expected 0 <= RANK < WORLD_SIZE: {_remedy()}")
        by_torchrun = "TORCHELASTIC_RUN_ID" in environment
        launcher = "accelerate launch" if by_accelerate else "torchrun" if by_torchrun else None
        return Launch(rank=rank, ranks=ranks, launcher=launcher)
    for name, launcher in _STARTED.items():
        if environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1:
            raise LimbeckError(
                f"{launcher} has started {environment[name]} processes ({name}) that do not know of each other (RANK "
                f"is not set), so each would train alone; {_remedy(environment[name])}"
            )
    if by_accelerate and (asked := asked_of_accelerate()) > 1:
        raise LimbeckError(
            f"accelerate launch was asked for {asked} processes and has started 1, as it does on a CPU and where it "
            f"sees one device; {_remedy(asked)}, or ask for 1 (--num_processes 1)"
        )
    return Launch(launcher="accelerate launch" if by_accelerate else None)


def require_trained_by(kind: str, ranks: int, launch: Launch) -> None:
    """See that accelerate trains as the launch was understood.

    Args:
        kind: accelerate's name of how it spreads a training, such as MULTI_GPU.
        ranks: how many processes it trains with.

    Raises:
        LimbeckError: it does not.
    """
    # MULTI_CPU, MULTI_GPU, MULTI_XPU and so on: a whole student on each.
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise _unsupported(kind, "the distributed_type of accelerate's state")
    if ranks != launch.ranks:
        raise LimbeckError(
            f"the launch has {launch.ranks} processes and accelerate trains with {ranks}, so each would train alone; "
            f"{_remedy()}"
        )


def asked_of_accelerate() -> int:
    """Processes that the `accelerate launch` above this process was asked for; 1 where that cannot be found out.

    It says so nowhere but on its command line and in its configuration file.
    """
    import psutil

    for process in psutil.Process().parents():
        try:
            options = _options_of_accelerate(process.cmdline())
        except psutil.Error:
            continue
        if options is not None:
            return _processes_of(options)
    return 1


def _options_of_accelerate(command: Sequence[str]) -> Sequence[str] | None:
    """Options behind `accelerate launch` on a command line; None for any other command."""
    words = [os.path.basename(word) for word in command[:6]]
    for i, word in enumerate(words):
        of_its_own = word in ("accelerate-launch", "accelerate.commands.launch")
        if of_its_own or (word == "launch" and i > 0 and "accelerate" in words[i - 1]):
            return command[i + 1 :]
    return None


def _processes_of(options: Sequence[str]) -> int:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        asked = launch_command_parser().parse_args(list(options))
    except SystemExit:
        return 1
    if asked.num_processes is not None:
        return asked.num_processes
    if asked.config_file is None and (asked.cpu or not os.path.isfile(default_config_file)):
        return 1
    return getattr(load_config_from_file(asked.config_file), "num_processes", 1)


def _refuse_sharded(environment: Mapping[str, str]) -> None:
    for name, value in sorted(environment.items()):
        for start, what in _SHARDED.items():
            prefix = start.endswith("_")
            if (name.startswith(start) if prefix else name == start) and (prefix or _is_true(value)):
                raise _unsupported(what, name)


def _unsupported(what: str, where: str) -> LimbeckError:
    return LimbeckError(
        f"this launch asks for {what} ({where}), which limbeck cannot train with yet; expected a whole student on each "
        f"rank (DDP): {_remedy()}, or choose MULTI_GPU in accelerate's configuration"
    )


def _refuse_accumulation(environment: Mapping[str, str]) -> None:
    """accelerate would divide each gradient by it once more."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    if environment.get(name, "1") not in ("", "1"):
        raise LimbeckError(
            f"{name} is {environment[name]!r}, which the recipe says with train.gradient_accumulation_steps; "
            f"unset {name} and set that"
        )


def _is_true(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "on", "y", "t")


def _number(name: str, environment: Mapping[str, str]) -> int:
    value = environment.get(name, "")
    if not (value.isascii() and value.isdigit()):
        got = repr(value) if value else "not set"
        raise LimbeckError(f"RANK is set and {name} is {got}; expected a number: {_remedy()}")
    return int(value)
