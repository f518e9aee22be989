"""Commands that start a run on the devices of a plan. To add one: write the dataclass, add its line to `LAUNCHERS`."""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from dataclasses import dataclass

from limbeck.models.devices import Fleet
from limbeck.registry import Registry
from limbeck.types import LimbeckError

PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is started.

    Attributes:
        arguments: behind `limbeck run`: the recipe and its changes.
        fleet: one that nodes can share evenly (`require_even`).
        hours: how long it takes at most; None where that is not known.
        sharded: whether the student is sharded over the ranks.
    """

    name: str
    arguments: tuple[str, ...]
    fleet: Fleet
    hours: float | None = None
    sharded: bool = False

    @property
    def label(self) -> str:
        """The name in characters that schedulers take."""
        return re.sub(r"[^A-Za-z0-9._-]", "-", self.name)

    @property
    def line(self) -> str:
        """`-m limbeck run` with its arguments, for a shell."""
        return shlex.join(("-m", "limbeck", "run", *self.arguments))

    @property
    def per_node(self) -> int:
        return self.fleet.count // self.nodes

    @property
    def nodes(self) -> int:
        return nodes_of(self.fleet)


def nodes_of(fleet: Fleet) -> int:
    """How many machines have the devices; a processor's ranks are all on one."""
    return 1 if fleet.device.host else fleet.nodes


def require_even(fleet: Fleet) -> None:
    """See that all nodes of some devices have as many: a launcher starts as many ranks on each.

    Raises:
        LimbeckError: names the nearest numbers of devices that can be shared evenly.
    """
    if fleet.count % nodes_of(fleet) == 0:
        return
    usual = fleet.device.per_node
    # Full nodes are even, so neither way is long.
    around = [range(fleet.count - 1, 0, -1), range(fleet.count + 1, fleet.count + usual + 1)]
    near = [next(n for n in numbers if n % -(-n // usual) == 0) for numbers in around]
    raise LimbeckError(
        f"--devices is {fleet}, which {nodes_of(fleet)} nodes of at most {usual} cannot share evenly, and a launcher "
        f"starts as many ranks on each; expected devices such as {near[0]}x{fleet.name} or {near[1]}x{fleet.name}"
    )


@dataclass(frozen=True, kw_only=True)
class Launcher(ABC):
    """A way to start a run on one or more nodes."""

    @abstractmethod
    def text(self, job: Job) -> str:
        """A command, or a file for one."""


@dataclass(frozen=True, kw_only=True)
class Torchrun(Launcher):
    """Commands of torchrun, one on each node."""

    def text(self, job: Job) -> str:
        if job.nodes == 1:
            return f"torchrun --nproc-per-node={job.per_node} {job.line}\n"
        return (
            f"# on each of {job.nodes} nodes that share the run directory; FIRST_NODE is the name of the first\n"
            f"{_rendezvous(job, '$FIRST_NODE')}\n"
        )


@dataclass(frozen=True, kw_only=True)
class Accelerate(Launcher):
    """A configuration for accelerate, and the command that reads it."""

    def text(self, job: Job) -> str:
        import yaml

        # On any device: for MULTI_CPU accelerate starts one process, whatever it was asked for.
        config: dict[str, object] = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "FSDP" if job.sharded else "MULTI_GPU",
            "num_machines": job.nodes,
            "num_processes": job.fleet.count,
            "main_process_port": PORT,
            "mixed_precision": "no",
        }
        if job.sharded:
            config["fsdp_config"] = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        where = "# saved as accelerate.yaml"
        node = ""
        if job.nodes > 1:
            where += f" on each of {job.nodes} nodes that share the run directory; NODE is its number, the first is 0"
            node = ' --machine_rank "$NODE" --main_process_ip "$FIRST_NODE"'
            config["same_network"] = True
        command = f"# accelerate launch --config_file accelerate.yaml{node} {job.line}"
        return f"{where}\n{command}\n{yaml.safe_dump(config, sort_keys=False)}"


@dataclass(frozen=True, kw_only=True)
class Slurm(Launcher):
    """A file for sbatch."""

    def text(self, job: Job) -> str:
        lines = [
            "#!/bin/bash",
            f"#SBATCH --job-name={job.label}",
            f"#SBATCH --nodes={job.nodes}",
            "#SBATCH --ntasks-per-node=1",
        ]
        if not job.fleet.device.host:
            lines.append(f"#SBATCH --gpus-per-node={job.per_node}")
        if job.hours is not None:
            lines.append(f"#SBATCH --time={_hours(job.hours)}")
        lines += [
            "set -euo pipefail",
            # Not by `head`: that ends first, and under pipefail the job with it where the list is still being written.
            'FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
            f"srun {_rendezvous(job, '$FIRST_NODE', '$SLURM_JOB_ID')}",
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Skypilot(Launcher):
    """A task of SkyPilot, for `sky launch`."""

    def text(self, job: Job) -> str:
        import yaml

        resources: dict[str, object] = {"disk_tier": "high"}
        if not job.fleet.device.host:
            resources["accelerators"] = f"{job.fleet.name}:{job.per_node}"
        first = '"$(echo "$SKYPILOT_NODE_IPS" | sed -n 1p)"'
        task = {
            "name": job.label,
            "resources": resources,
            "num_nodes": job.nodes,
            "workdir": ".",
            "setup": "pip install -e .",
            "run": _rendezvous(job, first, "$SKYPILOT_TASK_ID"),
        }
        return yaml.safe_dump(task, sort_keys=False, width=1000)


LAUNCHERS: Registry[Launcher] = Registry(
    "launcher",
    {"torchrun": Torchrun, "accelerate": Accelerate, "slurm": Slurm, "skypilot": Skypilot},
    entry_points="limbeck.launchers",
)


def _rendezvous(job: Job, host: str, name: str = "limbeck") -> str:
    """torchrun of one node among several, which meet at a port of the first."""
    where = f"{host}:{PORT}" if host.startswith('"') else f'"{host}:{PORT}"'
    return (
        f"torchrun --nnodes={job.nodes} --nproc-per-node={job.per_node} --rdzv-backend=c10d --rdzv-id={name} "
        f"--rdzv-endpoint={where} {job.line}"
    )


def _hours(hours: float) -> str:
    """A limit for Slurm, half as long again, in whole hours."""
    return f"{max(1, round(hours * 1.5 + 0.5))}:00:00"


def vllm_command(model: str, *, devices: int, blocks: int, window: int, hidden: bool) -> str:
    """The command of a server of the teacher.

    Args:
        blocks: of the teacher; the states behind the last one are asked for.
        hidden: whether it hands over hidden states, and not its likeliest tokens alone.
    """
    parts = [f"vllm serve {shlex.quote(model)} --max-model-len {window}"]
    if devices > 1:
        parts.append(f"--tensor-parallel-size {devices}")
    if hidden:
        speculative = (
            '{"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": '
            f'{{"hf_config": {{"eagle_aux_hidden_state_layer_ids": [{blocks}]}}}}}}'
        )
        transfer = (
            '{"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer", '
            '"kv_connector_extra_config": {"shared_storage_path": "/mnt/shared/states"}}'
        )
        parts += [f"--speculative-config {shlex.quote(speculative)}", f"--kv-transfer-config {shlex.quote(transfer)}"]
    return " \\\n  ".join(parts) + "\n"
