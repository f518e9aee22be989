"""What a launch is understood as, and what is refused before any work."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from limbeck.runtime import launcher as module
from limbeck.runtime.errors import explain
from limbeck.runtime.launcher import Launch, launched, require_meeting_place, require_trained_by
from limbeck.training import launch as student_launch
from limbeck.types import LimbeckError
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair
from tests.training.play import settings

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}


def test_who_started_how_many() -> None:
    assert launched({}) == Launch(rank=0, ranks=1, launcher=None)
    assert launched(TORCHRUN) == Launch(rank=1, ranks=4, launcher="torchrun")
    assert launched(TORCHRUN | BY_ACCELERATE) == Launch(rank=1, ranks=4, launcher="accelerate launch")
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) == Launch()
    # srun and mpirun may start ranks that torch knows of, and what is set to no changes nothing.
    known = {"SLURM_STEP_NUM_TASKS": "4", "OMPI_COMM_WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "false"}
    assert launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0"} | known) == Launch(rank=3, ranks=4)
    assert launched({"SLURM_STEP_NUM_TASKS": "1", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}) == Launch()


def test_a_launch_in_one_line_and_in_provenance() -> None:
    two = Launch(rank=0, ranks=2, launcher="torchrun")
    step = "24 responses per step (4 per device x 3 accumulated x 2 ranks)"
    assert two.line(4, 3) == f"launch: 2 ranks, wrapper DDP, started by torchrun; {step}"
    assert two.record(4, 3) == {
        **{"ranks": 2, "wrapper": "DDP", "launcher": "torchrun"},
        **{"per_device_batch": 4, "accumulation": 3, "effective_batch": 24},
    }
    assert Launch().line() == "launch: 1 process, wrapper none"
    assert Launch().record() == {"ranks": 1, "wrapper": "none", "launcher": None}


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}


def test_a_student_that_is_sharded_over_the_ranks() -> None:
    """By accelerate's configuration or the recipe; of one process there is nothing to shard."""
    asked = launched(TORCHRUN | FSDP2)
    assert (asked.fsdp2, asked.sharded, asked.wrapper) == (True, True, "FSDP2")
    assert asked.with_sharding("auto").sharded and asked.with_sharding("full").sharded
    with pytest.raises(LimbeckError, match=r"asks for a student that is sharded .*train.sharding=none"):
        asked.with_sharding("none")
    plain = launched(TORCHRUN)
    assert [plain.with_sharding(name).wrapper for name in ("auto", "none", "full")] == ["DDP", "DDP", "FSDP2"]
    assert launched(FSDP2).with_sharding("full").wrapper == "none"


REFUSED = [
    (FSDP2 | {"FSDP_VERSION": "1"}, r"asks for FSDP \(ACCELERATE_USE_FSDP\) in its first version.*fsdp_version: 2"),
    (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS is 'true'.* set fsdp_offload_params: false"),
    (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set .*train.gradient_checkpointing=true"),
    ({"ACCELERATE_USE_FSDP": "true"}, r"asks for FSDP \(ACCELERATE_USE_FSDP\).*expected a whole student on each rank"),
    ({"FSDP_VERSION": "2"}, r"asks for FSDP \(FSDP_VERSION\)"),
    ({"ACCELERATE_USE_DEEPSPEED": "True"}, r"asks for DeepSpeed \(ACCELERATE_USE_DEEPSPEED\)"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "asks for DeepSpeed"),
    ({"ACCELERATE_USE_MEGATRON_LM": "1"}, "asks for Megatron-LM"),
    ({"MEGATRON_LM_TP_DEGREE": "2"}, "asks for Megatron-LM"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for accelerate's parallelism configuration"),
    ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "asks for accelerate's parallelism configuration"),
    (TORCHRUN | {"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, r"set that$"),
    ({"RANK": "0"}, "WORLD_SIZE is not set; expected a number"),
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'; expected a number"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "expected 0 <= RANK < WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, r"a launcher has started 2 processes \(WORLD_SIZE\).*--nproc-per-node=2 "),
    ({"OMPI_COMM_WORLD_SIZE": "8"}, "mpirun has started 8 processes.* each would train alone"),
    ({"PMI_SIZE": "2"}, "has started 2 processes"),
    ({"SLURM_STEP_NUM_TASKS": "2"}, "srun has started 2 processes"),
]


@pytest.mark.parametrize(("environment", "said"), REFUSED, ids=str)
def test_launches_that_would_train_something_else(environment: dict[str, str], said: str) -> None:
    with pytest.raises(LimbeckError, match=said) as caught:
        launched(environment)
    assert "\n" not in str(caught.value)


MEETING = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'; expected a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; expected 1 to 65535"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not; expected the machine of rank 0"),
        (
            {"MASTER_ADDR": "no.such.host.invalid"},
            r"is 'no\.such\.host\.invalid', which this machine cannot",
        ),
        ({"MASTER_ADDR": "a" * 70 + ".example"}, "which this machine cannot resolve"),
    ],
)
def test_ranks_that_could_not_meet_are_told(changes: dict[str, str], said: str) -> None:
    with pytest.raises(LimbeckError, match=said) as caught:
        require_meeting_place(MEETING | changes)
    assert "\n" not in str(caught.value)


def test_a_port_that_another_process_listens_on_is_named_by_the_first_rank() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        there = MEETING | {"MASTER_PORT": str(other.getsockname()[1])}
        with pytest.raises(LimbeckError, match="where another process of this machine listens; give all ranks another"):
            require_meeting_place(there)
        # It is that of torchrun, or of the first rank itself.
        require_meeting_place(there | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
        require_meeting_place(there | {"RANK": "1"})
    require_meeting_place(there)


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("/bin/python /bin/accelerate launch --cpu --num_processes 2 -m limbeck run kd", 2),
        ("/bin/python -m accelerate.commands.launch --num_processes=3 train.py --num_processes 9", 3),
        ("/bin/python /bin/accelerate-launch --num-processes 4 train.py", 4),
        ("/bin/python -m accelerate.commands.accelerate_cli launch --cpu -m limbeck run kd", 1),
        ("accelerate launch --config_file CONFIG -m limbeck run kd", 6),
        ("accelerate launch --no-such-option", 1),
        ("/bin/python -m limbeck run launch", None),
        ("bash -c launch", None),
    ],
)
def test_what_accelerate_was_asked_for(
    command: str, asked: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 6\nuse_cpu: true\n"
    )
    options = module._options_of_accelerate(command.replace("CONFIG", str(config)).split())
    assert (None if options is None else module._processes_of(options)) == asked
    capsys.readouterr()


def test_fewer_processes_than_accelerate_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.asked_of_accelerate() == 1
    assert launched(BY_ACCELERATE) == Launch(launcher="accelerate launch")
    monkeypatch.setattr(module, "asked_of_accelerate", lambda: 2)
    with pytest.raises(LimbeckError, match=r"asked for 2 processes and has started 1.*torchrun --nproc-per-node=2 "):
        launched(BY_ACCELERATE)
    # Only where accelerate started this process.
    assert launched({}) == Launch()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA", "TP"])
def test_what_accelerates_state_says_has_the_last_word(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it was switched on."""
    for known in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        require_trained_by(known, 1, Launch())
    with pytest.raises(LimbeckError, match="the launch has 2 processes and accelerate trains with 1"):
        require_trained_by("NO", 1, Launch(ranks=2))
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "distributed_type", type("Kind", (), {"value": kind}), raising=True)
    with pytest.raises(LimbeckError, match=rf"asks for {kind} \(the distributed_type of accelerate's state\)"):
        student_launch.accelerator(settings(), tmp_path, run_name="x", tracker_config={})


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_the_command_refuses_them_before_any_work(
    name: str, tiny: TinyPair, limbeck: CommandServer, tmp_path: Path
) -> None:
    for verb in ("run", "prompts", "train"):
        end = limbeck.run(verb, tiny.recipe(tmp_path / "run"), env={name: "true"})
        assert end.code == 2 and f"({name})" in end.error_line and len(end.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_that_was_lost_is_one_line() -> None:
    torch = sys.modules["torch"]
    said = "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:12203: Connection reset by peer."
    for error in (RuntimeError(said), torch.distributed.DistBackendError("NCCL error: remote process exited")):
        line = explain(error)
        assert line is not None and "another rank of this launch has ended" in line and "\n" not in line
    assert explain(RuntimeError("shapes do not match")) is None
