"""A student sharded over two processes (gloo) is trained as a whole one on each, which test_two_processes.py checks."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from limbeck.models.loading import load_model
from limbeck.models.quantization.files import BLOCKS_FILE
from limbeck.training import checkpoints, trained_weights
from limbeck.training.checkpoint_shards import read_whole, shards_in
from tests.distributed.authors import SCENARIOS
from tests.distributed.drawn import STUDENTS, play_student
from tests.distributed.recipes import NAMES, play_recipe
from tests.distributed.test_command import LAUNCHER, play
from tests.distributed.test_command import ended as end_of
from tests.distributed.test_launches import ACCELERATE
from tests.distributed.test_two_processes import ended
from tests.distributed.updates import UPDATES, kept_bytes, play_update, uneven
from tests.limbeck_command import CommandServer, KillAt, all_end
from tests.models.tiny import save_gguf
from tests.tiny_pair import TinyPair
from tests.tiny_vision import write_questions, write_vision_model
from tests.training.play import identical, largest_gap, metrics, tiny_lora, tiny_model, weights

FSDP2 = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
num_machines: 1
num_processes: 2
mixed_precision: 'no'
"""


@pytest.mark.parametrize("name", [*UPDATES, "hidden"])
def test_a_sharded_student_gets_the_update_of_a_whole_one(played: Path, name: str) -> None:
    sharded = played / "sharded"
    assert largest_gap(ended(sharded, name), ended(played, name)) < 1e-10
    assert identical(ended(sharded, name, 0), ended(sharded, name, 1))
    for one, two in zip(metrics(played / name), metrics(sharded / name), strict=True):
        assert (one["step"], one["tokens"], one["learning_rate"]) == (two["step"], two["tokens"], two["learning_rate"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_sharded_student_writes_what_a_whole_one_writes(played: Path, name: str) -> None:
    sharded = played / "sharded"
    said = [(folder / name / "written-rank0.json").read_text() for folder in (sharded, played)]
    assert said[0] == said[1] and "student" in said[0]
    assert largest_gap(ended(sharded, name), ended(played, name)) < 1e-10


def test_products_in_bfloat16_are_those_of_a_whole_student(played: Path) -> None:
    whole, sharded = metrics(played / "bf16"), metrics(played / "sharded" / "bf16")
    assert [line["loss"] for line in sharded] == pytest.approx([line["loss"] for line in whole], rel=1e-3)
    assert all(weight.dtype.itemsize == 4 for weight in ended(played / "sharded", "bf16").values())


def test_a_wish_on_one_rank_stops_both_and_both_continue_bit_for_bit(played: Path) -> None:
    sharded = played / "sharded"
    assert identical(ended(sharded, "straight"), ended(sharded, "continued"))
    assert [line["step"] for line in metrics(sharded / "continued")] == [1, 2, 3, 4, 5]
    # The last step is kept too: gathering and saving come after it.
    assert sorted(p.name for p in (sharded / "continued" / "checkpoints").iterdir()) == ["step-000003", "step-000005"]


def test_nan_on_one_rank_stops_both_before_the_update(played: Path) -> None:
    sharded = played / "sharded"
    for rank in range(2):
        message = json.loads((sharded / f"messages-rank{rank}.json").read_text())["poisoned"]
        assert message.startswith("step 3:") and "step-000002" in message
        end = {f"student.{name}": weight for name, weight in ended(sharded, "poisoned", rank).items()}
        assert identical(read_whole(sharded / "poisoned" / "checkpoints" / "step-000002", end), end)


def test_each_rank_keeps_its_half_alone(played: Path, tmp_path: Path) -> None:
    """Of weights, gradients and moments, in the first training of both."""
    with kept_bytes() as whole:
        play_update(UPDATES[0], tmp_path, played / "model")
    for rank in range(2):
        kept = json.loads((played / "sharded" / f"bytes-rank{rank}.json").read_text())
        assert 0.45 * whole[0] < kept[0] <= 0.55 * whole[0]


def test_each_rank_writes_its_half_alone_and_one_that_is_damaged_is_seen(played: Path, tmp_path: Path) -> None:
    """Both files, read by one process; then a bit of one of them; then only one."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(played / "sharded" / "continued" / "checkpoints", folder)
    files = shards_in(folder / "step-000005")
    sizes = [file.stat().st_size for file in files]
    assert len(files) == 2 and max(sizes) <= 0.6 * sum(sizes)
    assert checkpoints.usable(folder) == folder / "step-000005"
    student = tiny_lora(1, dropout=0.5)
    checkpoints.restore_student(folder / "step-000005", student)
    assert identical(weights(student), ended(played / "sharded", "continued"))
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    assert checkpoints.usable(folder) == folder / "step-000003"
    shards_in(folder / "step-000003")[0].unlink()
    assert checkpoints.usable(folder) is None


def test_each_rank_keeps_its_half_of_the_best_student_alone(played: Path) -> None:
    start = weights(tiny_model(1))
    for kind in (played, played / "sharded"):
        assert identical(ended(kind, "ruined"), start)
    best = played / "sharded" / "ruined" / "checkpoints" / "best-000000"
    sizes = [file.stat().st_size for file in shards_in(best)]
    assert trained_weights.has(best) and len(sizes) == 2 and max(sizes) <= 0.6 * sum(sizes)
    whole = {f"student.{name}": weight for name, weight in start.items()}
    assert identical(read_whole(best, whole), whole)


def test_the_first_rank_alone_gathers_the_whole_weights_in_files(played: Path) -> None:
    gathered = played / "gathered"
    assert identical(load_file(gathered / "model.safetensors"), weights(uneven()))
    assert not (gathered / "files").exists()


def test_shipped_recipes_end_with_the_student_of_one_process(tiny: TinyPair, tmp_path: Path) -> None:
    pair = tiny.teacher.parent
    halved = ("train.per_device_train_batch_size=2", "train.sharding=full")
    play(*LAUNCHER, "tests.distributed.recipes", str(pair), str(tmp_path / "two"), *halved)
    for name in NAMES:
        one = load_file(play_recipe(name, pair, tmp_path / "one") / "student" / "model.safetensors")
        two = load_file(tmp_path / "two" / name / "student" / "model.safetensors")
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5)
    # Of a few bits the file that ships holds the whole weights, not those of one rank.
    one, two = (load_file(tmp_path / which / "recover" / "student" / BLOCKS_FILE) for which in ("one", "two"))
    assert one.keys() == two.keys()
    differing = sum(int((one[name] != two[name]).sum()) for name in one)
    assert differing <= 1e-3 * sum(blocks.numel() for blocks in one.values())


def write_experts(folder: Path, teacher: Any) -> None:
    """A mixture of experts with the teacher's tokens, which files hold one by one and memory in one tensor."""
    own = teacher.model.config
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=own.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=own.max_position_embeddings,
        eos_token_id=own.eos_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)


def test_students_that_no_files_hold_are_written_once_and_read_by_slices(tiny: TinyPair, tmp_path: Path) -> None:
    """Fresh weights, narrower ones, those of a GGUF file, fused experts, a model that reads images; as `drawn` itself
    checks, by slices on each rank."""
    pair = shutil.copytree(tiny.teacher.parent, tmp_path / "pair")
    teacher: Any = load_model(pair / "teacher")
    save_gguf(pair / "student.gguf", teacher.model, tokenizer=teacher.tokenizer, tied=True)
    write_experts(pair / "experts", teacher)
    for who, seed in (("teacher", 1), ("student", 2)):
        write_vision_model(pair / "seeing" / who, "qwen2_vl", seed=seed)
    write_questions(pair / "seeing", 24)
    halved = ("train.per_device_train_batch_size=2", "train.sharding=full")
    play(*LAUNCHER, "tests.distributed.drawn", str(pair), str(tmp_path / "two"), *halved)
    for name in STUDENTS:
        one = load_file(play_student(name, pair, tmp_path / "one") / "student" / "model.safetensors")
        two = load_file(tmp_path / "two" / name / "kd" / "student" / "model.safetensors")
        assert one.keys() == two.keys()
        for key, tensor in one.items():
            torch.testing.assert_close(
                two[key], tensor, rtol=0, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
            )


def test_a_training_goes_on_with_another_number_of_ranks(
    limbeck: CommandServer, tiny: TinyPair, tmp_path: Path
) -> None:
    """Two of accelerate's own FSDP2 configuration, killed; one process, killed; two with train.sharding."""
    (tmp_path / "config.yaml").write_text(FSDP2)
    by_accelerate = (*ACCELERATE, "--config_file", str(tmp_path / "config.yaml"), "-m")
    run, straight = tmp_path / "run", tmp_path / "straight"
    # Rounding must not be divided by rounding.
    train = {"max_steps": 8, "save_steps": 2, "adam_epsilon": 1e-4, "learning_rate": 1e-3}
    recipe = str(tiny.recipe(run, sft={}, train=train))
    halved = "train.per_device_train_batch_size=2"
    dying = ("tests.distributed.dying", str(run), "checkpoints/.step-000004*", "train", recipe, halved)
    died = end_of(*by_accelerate, *dying, DIES="0")
    assert died.returncode != 0 and "wrapper FSDP2, started by accelerate launch" in died.stderr, died.stderr[-3000:]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000002"]
    wrong = limbeck.run("train", recipe, "train.per_device_train_batch_size=3")
    assert wrong.code == 2 and "per_device_train_batch_size is 2 there and 3 here" in wrong.stderr
    killed = limbeck.run("train", recipe, killed=KillAt(run, "checkpoints/.step-000006.partial/state.json", 0))
    assert killed.code == -signal.SIGKILL and (run / "checkpoints" / "step-000004").exists(), killed
    said = all_end(limbeck.launch("train", recipe, halved, "train.sharding=full"))
    assert not any("superseded" in end.stderr for end in said)
    assert [line["step"] for line in metrics(run)] == list(range(1, 9))
    assert limbeck.run("train", recipe, f"output_dir={straight}").code == 0
    assert {line["step"]: line["loss"] for line in metrics(run)} == pytest.approx(
        {line["step"]: line["loss"] for line in metrics(straight)}, rel=1e-6
    )
    one, two = (load_file(folder / "student" / "model.safetensors") for folder in (straight, run))
    assert largest_gap(one, two) < 1e-6
    # The last step is kept too, as it was saved.
    end = {f"student.{name}": weight for name, weight in two.items()}
    assert identical(read_whole(run / "checkpoints" / "step-000008", end), end)
