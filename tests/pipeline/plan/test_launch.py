"""Commands that start a planned run: read by the programs that they are for."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from limbeck.models.devices import fleet_of
from limbeck.models.launchers import LAUNCHERS, Job, require_even, vllm_command
from limbeck.pipeline.plan.verb import plan_text
from limbeck.types import LimbeckError
from tests.limbeck_command import CommandServer
from tests.tiny_pair import TinyPair


def job(devices: str, hours: float | None = None) -> Job:
    arguments = ("my recipe.yaml", "objective={name: js, beta: 0.5}")
    return Job(name="mine", arguments=arguments, fleet=fleet_of(devices), hours=hours)


def launched(line: str) -> list[str]:
    """What torchrun starts of a command line, after torchrun's own parser has read it."""
    from torch.distributed.run import get_args_parser

    words = shlex.split(line)
    options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert options.module and options.training_script == "limbeck"
    return [options.nnodes, options.nproc_per_node, *options.training_script_args]


@pytest.mark.parametrize(("devices", "nodes", "each"), [("2xcpu", "1:1", "2"), ("16xH100", "2", "8")])
def test_torchrun(devices: str, nodes: str, each: str) -> None:
    text = LAUNCHERS.build("torchrun").text(job(devices))
    line = text.strip().splitlines()[-1]
    assert launched(line) == [nodes, each, "run", "my recipe.yaml", "objective={name: js, beta: 0.5}"]


@pytest.mark.parametrize("launch", sorted(LAUNCHERS))
@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("9xH100", "9xH100, which 2 nodes of at most 8 cannot share evenly, .* devices such as 8xH100 or 10xH100"),
        ("23xH100", "23xH100, which 3 nodes of at most 8 .* devices such as 21xH100 or 24xH100"),
    ],
)
def test_nodes_that_cannot_have_as_many_ranks_each(launch: str, devices: str, said: str) -> None:
    """Before anything is read of the recipe: the plan would count other ranks than are started."""
    with pytest.raises(LimbeckError, match=said):
        plan_text("nowhere.yaml", (), devices, None, None, launch=launch)


@pytest.mark.parametrize("devices", ["1xH100", "7xH100", "14xH100", "24xH100", "9xcpu"])
def test_as_many_ranks_as_devices(devices: str) -> None:
    planned = job(devices)
    require_even(planned.fleet)
    assert planned.nodes * planned.per_node == planned.fleet.count


def test_slurm(tmp_path: Path) -> None:
    text = LAUNCHERS.build("slurm").text(job("64xH100", hours=5))
    path = tmp_path / "job.sh"
    path.write_text(text, "utf-8")
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "#SBATCH --nodes=8\n" in text and "#SBATCH --gpus-per-node=8\n" in text
    assert "#SBATCH --time=8:00:00\n" in text
    line = text.strip().splitlines()[-1]
    assert launched(line)[:2] == ["8", "8"] and line.startswith("srun ")


def test_skypilot(tmp_path: Path) -> None:
    task = yaml.safe_load(LAUNCHERS.build("skypilot").text(job("16xA100")))
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "A100:8"
    assert launched(task["run"].replace('"$(echo "$SKYPILOT_NODE_IPS" | sed -n 1p)"', "first"))[:2] == ["2", "8"]
    path = tmp_path / "job.sh"
    path.write_text(task["run"], "utf-8")
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_a_name_of_any_characters_is_a_name_of_a_job() -> None:
    named = replace(job("8xH100"), name="große Lehrer, v1.5_b")
    assert "\n#SBATCH --job-name=gro-e-Lehrer--v1.5_b\n" in LAUNCHERS.build("slurm").text(named)
    assert yaml.safe_load(LAUNCHERS.build("skypilot").text(named))["name"] == "gro-e-Lehrer--v1.5_b"


def test_server_of_hidden_states() -> None:
    text = vllm_command("big", devices=4, blocks=80, window=713, hidden=True)
    words = shlex.split(text.replace("\\\n", " "))
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[:3] == ["vllm", "serve", "big"] and options["--tensor-parallel-size"] == "4"
    layers = json.loads(options["--speculative-config"])["draft_model_config"]["hf_config"]
    assert layers == {"eagle_aux_hidden_state_layer_ids": [80]}
    assert json.loads(options["--kv-transfer-config"])["kv_role"] == "kv_producer"
    assert "speculative" not in vllm_command("big", devices=1, blocks=80, window=713, hidden=False)


def test_command(limbeck: CommandServer, tiny: TinyPair, tmp_path: Path) -> None:
    recipe = str(tiny.recipe(tmp_path / "run"))
    shown = limbeck.run("plan", recipe, "train.max_steps=4", "--devices", "2xA100", "--price", "1")
    assert shown.code == 0 and shown.stderr == "" and "2xA100" in shown.stdout and "$2.00 per hour" in shown.stdout
    refused = limbeck.run("plan", recipe, "--devices", "8xH10")
    assert refused.code == 2 and refused.stderr.count("\n") == 1 and "nearest: 'H100'" in refused.stderr


def test_commands_of_a_plan(tiny: TinyPair, tmp_path: Path) -> None:
    recipe = str(tiny.recipe(tmp_path / "run"))
    printed = plan_text(recipe, (), "2xcpu", None, None, launch="torchrun")
    assert printed == f"torchrun --nproc-per-node=2 -m limbeck run {recipe}\n"
    served = "teacher.where={name: server, base_url: http://localhost:1/v1}"
    printed = plan_text(recipe, [served], "2xA100", None, None, launch="torchrun")
    assert f"\nvllm serve {tiny.teacher}" in printed
    with pytest.raises(LimbeckError, match=r"launcher 'slrum' is unknown \(nearest: 'slurm'\)"):
        plan_text(recipe, (), "2xcpu", None, None, launch="slrum")
