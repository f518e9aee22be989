"""Start of this process: alone, or as a rank of a launch; launches that limbeck cannot serve are refused.

What a launcher wants is in the environment. Of the ways to spread a training, two work: a whole student on each rank
(DDP), and one that is sharded over the ranks by torch's fully_shard (FSDP2). What asks for another would train
something else, hang or fail at the end, so it is refused before any work.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from limbeck.types import LimbeckError, SaidElsewhere

Sharding = Literal["auto", "none", "full"]
FSDP = "ACCELERATE_USE_FSDP"
# Variables with which launchers ask for what is not there, and what they ask for.
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_DEEPSPEED_": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "MEGATRON_LM_": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism configuration",
    "PARALLELISM_CONFIG_": "accelerate's parallelism configuration",
}
# Of FSDP2, what would change memory or speed without a word, with the value that changes nothing, and the remedy.
_FSDP_OPTIONS = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: false and train.gradient_checkpointing=true",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "fsdp_activation_checkpointing_offload: false",
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
        fsdp2: whether that asks for a student that is sharded over the ranks.
        sharding: what the recipe says of that.
    """

    rank: int = 0
    ranks: int = 1
    launcher: str | None = None
    fsdp2: bool = False
    sharding: Sharding = "auto"

    @property
    def sharded(self) -> bool:
        """Whether the student is sharded over the ranks."""
        return self.ranks > 1 and (self.fsdp2 or self.sharding == "full")

    @property
    def wrapper(self) -> str:
        """Name of the wrapper that spreads the training over the ranks."""
        if self.ranks == 1:
            return "none"
        return "FSDP2" if self.sharded else "DDP"

    def with_sharding(self, sharding: Sharding) -> Launch:
        """The launch with what a recipe's train.sharding says.

        Raises:
            LimbeckError: the launch says otherwise.
        """
        if self.fsdp2 and sharding == "none":
            raise LimbeckError(
                f"this launch asks for a student that is sharded over the ranks ({FSDP}) and the recipe for a whole "
                "one on each (train.sharding=none); leave train.sharding out, or choose MULTI_GPU in accelerate's "
                "configuration"
            )
        return replace(self, sharding=sharding)

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
    _refuse_unsupported(environment)
    _refuse_accumulation(environment)
    fsdp2 = _asks_for_fsdp2(environment)
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if "RANK" in environment:
        rank, ranks = _number("RANK", environment), _number("WORLD_SIZE", environment)
        if ranks > 1:
            _number("LOCAL_RANK", environment)
        if not 0 <= rank < ranks:
            raise LimbeckError(f"RANK is {rank} and WORLD_SIZE {ranks}; expected 0 <= RANK < WORLD_SIZE: {_remedy()}")
        by_torchrun = "TORCHELASTIC_RUN_ID" in environment
        launcher = "accelerate launch" if by_accelerate else "torchrun" if by_torchrun else None
        return Launch(rank=rank, ranks=ranks, launcher=launcher, fsdp2=fsdp2)
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
    return Launch(launcher="accelerate launch" if by_accelerate else None, fsdp2=fsdp2)


def is_first_of_machine() -> bool:
    """Whether this is the first rank of its machine, or no rank."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def said_once_a_machine() -> Iterator[None]:
    """Let errors in the block, which all ranks of a machine meet, be said by the first of them alone."""
    try:
        yield
    except LimbeckError as error:
        if is_first_of_machine():
            raise
        raise SaidElsewhere(str(error)) from error


def require_meeting_place(environment: Mapping[str, str] = os.environ) -> None:
    """See that the machine of the first rank is known here, and on it, that the port where ranks meet is free.

    Raises:
        LimbeckError: without which the ranks would wait for one another.
    """
    address, port = _meeting_place(environment)
    try:
        socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LimbeckError(
            f"MASTER_ADDR is {address!r}, which this machine cannot resolve ({error}); give a name or an address of "
            "the machine of rank 0 that all others know"
        ) from None
    # torchrun itself listens there, for its ranks.
    if environment["RANK"] != "0" or environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise LimbeckError(
            f"MASTER_PORT is {port}, where another process of this machine listens; give all ranks another port, or "
            "end that process"
        ) from None


def _meeting_place(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port at which the ranks of a launch meet."""
    address, port = environment.get("MASTER_ADDR", ""), _number("MASTER_PORT", environment)
    if not address:
        raise LimbeckError(f"RANK is set and MASTER_ADDR is not; expected the machine of rank 0: {_remedy()}")
    if not 0 < port < 1 << 16:
        raise LimbeckError(f"MASTER_PORT is {port}; expected 1 to 65535: {_remedy()}")
    return address, port


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


def _asks_for_fsdp2(environment: Mapping[str, str]) -> bool:
    """Whether an accelerate configuration asks for FSDP2.

    Raises:
        LimbeckError: it asks for the first FSDP, or for something that limbeck does otherwise.
    """
    if not _is_true(environment.get(FSDP, "")):
        half = next((name for name in sorted(environment) if name.startswith("FSDP_")), None)
        if half is not None:
            raise _unsupported("FSDP", half)
        return False
    if environment.get("FSDP_VERSION") != "2":
        raise LimbeckError(
            f"this launch asks for FSDP ({FSDP}) in its first version, which limbeck cannot train with; expected a "
            "whole student on each rank (DDP) or FSDP2: set fsdp_version: 2 in accelerate's configuration, or "
            f"{_remedy()} and train.sharding=full"
        )
    for name, remedy in _FSDP_OPTIONS.items():
        if _is_true(environment.get(name, "")):
            raise LimbeckError(f"{name} is {environment[name]!r}, which limbeck does not do; set {remedy}")
    return True


def _refuse_unsupported(environment: Mapping[str, str]) -> None:
    for name, value in sorted(environment.items()):
        for start, what in _UNSUPPORTED.items():
            prefix = start.endswith("_")
            if (name.startswith(start) if prefix else name == start) and (prefix or _is_true(value)):
                raise _unsupported(what, name)


def _unsupported(what: str, where: str) -> LimbeckError:
    return LimbeckError(
        f"this launch asks for {what} ({where}), which limbeck cannot train with yet; expected a whole student on each "
        f"rank (DDP), or one that is sharded over them (FSDP2, train.sharding=full): {_remedy()}, or choose MULTI_GPU "
        "in accelerate's configuration"
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
