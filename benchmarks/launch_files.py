"""The files of examples/launch/: what `limbeck plan --launch` prints for a run on two nodes of eight devices.

python -m benchmarks.launch_files          # writes them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from limbeck.models.devices import fleet_of
from limbeck.models.launchers import LAUNCHERS, Job, vllm_command
from limbeck.runtime.files import write_text

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "launch"
FILES: Mapping[str, str] = {
    "torchrun": "torchrun.sh",
    "accelerate": "accelerate.yaml",
    "slurm": "slurm.sh",
    "skypilot": "skypilot.yaml",
}


def launch_files() -> dict[str, str]:
    """The text of each file by its name."""
    job = Job(
        name="kd",
        arguments=("kd", "output_dir=/mnt/shared/runs/kd", "train.bf16=true", "train.sharding=full"),
        fleet=fleet_of("16xH100"),
        hours=2,
        sharded=True,
    )
    texts = {FILES[name]: LAUNCHERS.build(name).text(job) for name in LAUNCHERS if name in FILES}
    server = vllm_command("Qwen/Qwen2.5-32B-Instruct", devices=4, blocks=64, window=2048, hidden=True)
    return texts | {"vllm.sh": server}


def main() -> None:
    for name, text in launch_files().items():
        write_text(FOLDER / name, text)


if __name__ == "__main__":
    main()
