"""The terms of a sharded training held against torch's own memory tracker, on eight ranks that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from limbeck.pipeline.plan.memory import memory_of
from limbeck.training.sharding import shard
from tests.pipeline.plan.pairs import CONFIGS, case_of_sizes, model_of

RANKS, ROWS, LENGTH = 8, 4, 712
CONFIG = CONFIGS["8B"] | {"num_hidden_layers": 2}


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A mesh of ranks that exchange nothing; made before tensors are fake, since its numbers are read."""
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        made = device_mesh.init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
        monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *_args, **_options: made)
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("mesh")
def test_terms_of_a_sharded_training() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from transformers import AutoConfig, AutoModelForCausalLM

    def bytes_of(kind: str) -> dict[str, int]:
        (found,) = tracker.get_tracker_snapshot(kind).values()  # type: ignore[arg-type]
        return {str(getattr(name, "value", name)): size for name, size in found.items()}

    options: dict[str, Any] = dict(CONFIG)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        rank = SimpleNamespace(device=torch.device("cpu"), num_processes=RANKS)
        shard(model, rank, bf16=True)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters())
        tracker = FSDPMemTracker(model, optimizer)
        with tracker:
            ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16):
                model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float().mean().backward()
            before, peak = bytes_of("current"), bytes_of("peak")
            optimizer.step()
            after = bytes_of("current")

    size = model_of(CONFIG)
    (stage,) = (stage for stage in memory_of(case_of_sizes(size, size, f"{RANKS}xH100")) if stage.stage == "train")
    terms = {term.name: term.bytes for term in stage.terms}
    assert before["Sharded Param"] == pytest.approx(terms["parameters"], rel=0.01)
    assert before["Sharded Grad"] == pytest.approx(terms["gradients"], rel=0.01)
    assert after["OptState"] == pytest.approx(terms["optimizer"], rel=0.01)
    # Activations and gathered gradients are added, though their largest moments are not the same one.
    planned = sum(terms[name] for name in ("parameters", "gathered", "activations"))
    assert 0.75 * planned < peak["Total"] < planned
