"""Closed formulas of memory, disk and time beside what a model, a run and torch itself say."""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plan as pairs_page
from limbeck.models.devices import DEVICES, GIB, fleet_of
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.plan.case import case_of, student_size
from limbeck.pipeline.plan.disk import disk_of, measured_bytes, tokenizer_bytes
from limbeck.pipeline.plan.fits import _changes, change_of, fits, server_devices, ways_of
from limbeck.pipeline.plan.memory import activation_bytes, memory_of, peak
from limbeck.pipeline.plan.outcome import hosted_usd, plan, plan_of
from limbeck.pipeline.plan.page import text_of
from limbeck.pipeline.plan.rates import estimated, exchange_seconds
from limbeck.pipeline.plan.sizes import size_of
from limbeck.pipeline.plan.time import times_of
from limbeck.pipeline.plan.workload import Texts, Workload, assumed_workload, workload_of
from limbeck.pipeline.stage_order import STAGES
from limbeck.recipe.load import load_recipe
from limbeck.runtime.console import QuietConsole
from limbeck.teachers.placed import Placed
from limbeck.types import LimbeckError
from tests.pipeline.plan.pairs import CONFIGS, case_of_sizes, model_of
from tests.tiny_pair import TinyPair, write_model

CPU = fleet_of("cpu")


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    return {name: model_of(config) for name, config in CONFIGS.items()}


class TestDevices:
    def test_number_and_name(self) -> None:
        fleet = fleet_of("16xh100", usd_per_hour=2)
        assert (fleet.name, fleet.count, fleet.nodes, fleet.usd(3)) == ("H100", 16, 2, 96)
        assert fleet_of("A100-40GB").count == 1

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("8xH10", r"device 'H10' is unknown \(nearest: 'H100'\): choose from cpu, H100"),
            ("0xH100", "expected a number of devices and their name, such as 8xH100"),
            ("8 of H100", "expected a number of devices and their name"),
            ("0xH100", "the number from 1 to 1,000,000"),
            ("1000001xH100", "the number from 1 to 1,000,000"),
            ("9" * 5000 + "xH100", r"^--devices is '9{59} \.\.\. \(5007 characters\); .* the number from 1 to 1,"),
            ("8x" + "H" * 100_000, r"^device 'H{59} \.\.\. \(100002 characters\) is unknown: choose from cpu"),
        ],
    )
    def test_unknown(self, text: str, said: str) -> None:
        with pytest.raises(LimbeckError, match=said):
            fleet_of(text)

    @pytest.mark.parametrize("price", [math.inf, math.nan, -1.0])
    def test_a_price_is_a_number_of_dollars(self, price: float) -> None:
        with pytest.raises(LimbeckError, match=f"--price is {price}; expected dollars per hour of one device, such as"):
            fleet_of("H100", usd_per_hour=price)

    def test_each_has_what_a_plan_needs(self) -> None:
        for name in DEVICES:
            device = DEVICES.build(name)
            assert device.memory_gib > 0 and (device.host or min(device.bandwidth_gb_s, device.tflops) > 0)


class TestSizes:
    def test_of_large_models(self, large: dict[str, Any]) -> None:
        assert (large["8B"].parameters, large["70B"].parameters) == (8_030_261_248, 70_553_706_496)
        assert large["8B"].embeddings == 2 * 128_256 * 4096 and large["8B"].key == 1024
        # Two matrices of keys and values of 1,024 numbers in each of 32 blocks.
        assert large["8B"].kv_bytes(2) == 131_072

    @pytest.mark.parametrize(
        "section",
        [{}, {"freeze_embeddings": True}, {"lora": {"r": 4}}, {"lora": {"r": 4, "target_modules": ["q_proj"]}}],
    )
    def test_of_a_student(self, tiny: TinyPair, tmp_path: Path, section: dict[str, Any]) -> None:
        from limbeck.pipeline.checks import student_spec
        from limbeck.student.build import build_student

        recipe = load_recipe(tiny.tree(tmp_path / "run", student={"keep": [0, 2], "layers": None, **section}))
        context = RunContext(recipe)
        built = build_student(student_spec(context), teacher=context.teacher.weights())
        size = student_size(context)
        assert (size.model.parameters, size.trained) == (built.parameters, built.trainable)
        assert size.held == sum(parameter.numel() for parameter in built.model.parameters())


DEEP = {"model": None, "init": "depth_prune", "layers": 9}
NARROW = {"model": None, "init": "width_prune", "width": {"intermediate_size": 256}}


class TestMemory:
    @pytest.mark.parametrize("kv_heads", [2, 4])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_activations_are_what_autograd_keeps(self, kv_heads: int, checkpointing: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "llama",
            vocab_size=64,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
        )
        model = AutoModelForCausalLM.from_config(config).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch, length = 3, 64
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model.model(input_ids=torch.randint(64, (batch, length)))
        assert out.last_hidden_state.requires_grad
        case = case_of_sizes(
            size_of(model), size_of(model), "cpu", train={"bf16": False, "gradient_checkpointing": checkpointing}
        )
        predicted = activation_bytes(case, batch * length)
        if checkpointing:
            # One block is computed again in the backward pass, when nothing of the others is there.
            predicted -= activation_bytes(case.at(recipe__train__gradient_checkpointing=False), batch * length) / 6
        assert predicted == pytest.approx(sum(kept.values()), rel=0.1)

    def test_of_a_sharded_student(self, large: dict[str, Any]) -> None:
        """Weights, gradients and moments are shares; what is gathered is not."""
        terms = {}
        for devices in ("8xH100", "64xH100"):
            case = case_of_sizes(large["8B"], large["8B"], devices, train={"gradient_checkpointing": True})
            train = next(stage for stage in memory_of(case) if stage.stage == "train")
            terms[devices] = {term.name: term.bytes for term in train.terms}
        share = large["8B"].parameters * 4 / 8
        assert [terms["8xH100"][name] for name in ("parameters", "gradients", "optimizer")] == [share, share, 2 * share]
        assert terms["64xH100"]["parameters"] == share / 8
        assert terms["64xH100"]["gathered"] == terms["8xH100"]["gathered"] > 4 * large["8B"].embeddings

    @pytest.mark.parametrize(
        ("groups", "sections", "there"),
        [
            (["nll"], {}, {"student", "keys and values"}),
            (["fidelity"], {}, {"student", "teacher's head", "loss"}),
            (["fidelity", "rouge"], {}, {"teacher", "keys and values"}),
            ({"rouge": {"against": ["references"]}}, {}, {"teacher", "keys and values"}),
            ({"fidelity": {"whose": ["student"]}}, {}, {"student", "teacher", "loss"}),
            (["fidelity"], {"teacher": {"cache": False}}, {"student", "teacher", "loss"}),
            (["speculation"], {}, {"student", "teacher", "keys and values"}),
            (["fidelity"], {"student": DEEP}, {"student", "teacher's head", "loss"}),
            (["fidelity"], {"student": NARROW}, {"student", "teacher"}),
        ],
    )
    def test_the_evaluation_has_one_model_wherever_it_can(
        self, large: dict[str, Any], groups: Any, sections: dict[str, Any], there: set[str]
    ) -> None:
        case = case_of_sizes(large["32B"], large["8B"], "1xH100", evaluate={"groups": groups}, **sections)
        terms = {term.name: term.bytes for term in memory_of(case)[-1].terms}
        assert terms.keys() - {"context"} == there
        assert terms.get("teacher", case.teacher_bytes) == 2 * large["32B"].parameters
        assert terms.get("student", 4 * large["8B"].parameters) == 4 * large["8B"].parameters

    def test_a_rank_writes_its_own_share_of_a_step(self, large: dict[str, Any]) -> None:
        found = []
        for devices in ("1xH100", "64xH100"):
            case = case_of_sizes(large["8B"], large["8B"], devices, responses={"source": "student"})
            terms = {
                term.name: term.bytes for stage in memory_of(case) if stage.stage == "train" for term in stage.terms
            }
            found.append(terms["keys and values"])
        assert found[0] == found[1]


class TestFitting:
    def test_ways_of_a_70b_teacher(self, large: dict[str, Any]) -> None:
        case = case_of_sizes(large["70B"], large["8B"], "8xH100", train={"gradient_checkpointing": True})
        ways = {way.name: way for way in ways_of(case)}
        # 141 GB of weights on a device of 80, or an eighth of them on each.
        assert {name: way.fits for name, way in ways.items()} == {
            "local": False,
            "sharded": True,
            "served": True,
            "stored": True,
        }
        assert ways["sharded"].keys == "train.sharding=full teacher.where=sharded"
        sampled = case_of_sizes(large["70B"], large["8B"], "8xH100", responses={"source": "student"})
        assert next(way.keys for way in ways_of(sampled) if way.name == "sharded") == "train.sharding=full"
        assert not fits(case)
        change = change_of(case)
        assert change is not None and change.text.startswith("teacher.where={name: server") and fits(change.case)
        assert server_devices(case) == 4

    def test_a_teacher_on_a_rank(self, large: dict[str, Any]) -> None:
        """Whole, in few bits, as a share of its blocks, and as what it is given of a device."""
        model = large["70B"]
        case = case_of_sizes(model, large["8B"], "8xH100")
        assert case.teacher_held == 2 * model.parameters
        for bits, number in ((8, 1.0), (4, 0.5625)):
            few = case.at(recipe__teacher__bits=bits).teacher_held
            assert few == int(number * model.linears) + 2 * (model.parameters - model.linears)
        blocks, outside = 2 * model.blocks * model.block, 2 * model.outside
        assert case.at(where="sharded").teacher_held == outside + blocks // 8 + 4 * model.block
        placed = case.at(where="placed", recipe__teacher__where=Placed(memory={"cuda:0": "40GB", "cpu": "200GB"}))
        assert placed.teacher_held == pytest.approx(40e9 + 2 * model.block, rel=1e-3)
        # Without a limit what is free, and where that is too little, less two blocks and a tenth.
        free = case.at(where="placed", recipe__teacher__where=Placed())
        assert free.teacher_held == pytest.approx(0.9 * free.usable - 2 * model.block, rel=1e-3)
        fitting = case_of_sizes(large["8B"], large["8B"], "8xH100").at(where="placed")
        assert fitting.at(recipe__teacher__where=Placed()).teacher_held == fitting.teacher_bytes

    def test_the_students_texts_are_in_no_store(self, large: dict[str, Any]) -> None:
        case = case_of_sizes(large["8B"], large["8B"], "8xH100", responses={"source": "student"})
        stored = next(way for way in ways_of(case) if way.name == "stored")
        assert not stored.fits and stored.refused == "the student writes texts that no store has"

    @pytest.mark.parametrize(
        ("sections", "refused"),
        [
            ({}, {}),
            ({"student": {"model": None, "init": "depth_prune", "layers": 8}},
             dict.fromkeys(("served", "stored"), "the student is cut out of the teacher's weights")),
            ({"responses": {"source": "speculative"}},
             {"served": "the teacher writes together with another model",
              "stored": "the student writes texts that no store has"}),
            ({"teacher": {"bits": 4}}, {"served": "teacher.bits is of weights in this process"}),
            ({"train": {"optim": "adafactor"}}, {"sharded": "the optimizer updates no student that is sharded"}),
        ],
        ids=["plain", "cut", "together", "bits", "adafactor"],
    )  # fmt: skip
    def test_ways_that_a_run_refuses(self, large: dict[str, Any], sections: dict[str, Any], refused: Any) -> None:
        ways = ways_of(case_of_sizes(large["8B"], large["8B"], "8xH100", **sections))
        assert {way.name: way.refused for way in ways if way.refused} == refused
        whole = "sharded" in refused
        assert [way.case.sharded for way in ways] == [False, True, not whole, not whole]
        assert all(("train.sharding=full" in way.keys) is way.case.sharded for way in ways)

    def test_a_server_writes_what_the_teacher_writes(self, large: dict[str, Any]) -> None:
        for source, written in (("teacher", True), ("data", False), ("pairs", True)):
            case = case_of_sizes(large["8B"], large["8B"], "8xH100", responses={"source": source})
            served = next(way for way in ways_of(case) if way.name == "served")
            assert not served.refused and ("responses.server={base_url: ...}" in served.keys) is written

    def test_no_change_that_a_run_refuses(self, large: dict[str, Any]) -> None:
        def texts(**sections: Any) -> str:
            return " | ".join(
                one.text for one in _changes(case_of_sizes(large["8B"], large["8B"], "8xH100", **sections))
            )

        plain, pairs = texts(), texts(responses={"source": "pairs"})
        assert "batch_size=1 " in plain and "batch_size=2 " in pairs and "batch_size=1 " not in pairs
        live = {"model": "live", "cache": False, "sees": {"name": "system", "text": "You know all."}}
        for sections in ({"train": {"optim": "adafactor"}}, {"teacher": live, "student": {"init": "pretrained"}}):
            assert "sharding=full" in plain and "sharding=full" not in texts(**sections)
        cut = texts(student={"model": None, "init": "depth_prune", "layers": 8})
        assert "name: server" in plain and "teacher.where" not in cut and "teacher.where=sharded" in plain
        assert "teacher.where=sharded" not in texts(teacher={"cache_limit_gib": 1.0})

    def test_a_smaller_batch_is_the_same_step(self, large: dict[str, Any]) -> None:
        sections = {"per_device_train_batch_size": 256, "gradient_checkpointing": True}
        change = change_of(case_of_sizes(large["8B"], large["8B"], "8xH200", train=sections))
        assert change is not None and "train.gradient_accumulation_steps=" in change.text
        train = change.case.recipe.train
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 256

    def test_nothing_helps(self, large: dict[str, Any]) -> None:
        case = case_of_sizes(large["70B"], large["70B"], "1xL4")
        text = text_of(plan_of(case.at(fleet=fleet_of("1xL4"))))
        assert "no single change that is known makes it fit" in text

    def test_512_devices_quickly(self) -> None:
        started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sizes = {name: model_of(config) for name, config in CONFIGS.items()}
        made = plan_of(case_of_sizes(sizes["70B"], sizes["8B"], "512xH100", train={"max_steps": 1000}))
        assert time.process_time() - started < 30
        # In KiB: the embeddings of the teacher alone would take 4 GB.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10
        assert made.hours is not None and "512xH100" in text_of(made)


class TestTime:
    def test_twice_the_devices_half_the_time(self, large: dict[str, Any]) -> None:
        sections: dict[str, Any] = {"per_device_train_batch_size": 32, "gradient_checkpointing": True}
        found = []
        for devices in ("8xH100", "16xH100"):
            case = case_of_sizes(large["8B"], large["8B"], devices, train=sections)
            rates = estimated(case)
            assert rates is not None
            found.append({stage.stage: stage for stage in times_of(case, rates)}["train"])
        assert found[0].bound == "the products of the student"
        assert found[1].seconds == pytest.approx(found[0].seconds / 2, rel=0.03)
        # 6 x 8e9 x 50,000 x 0.98 x 712 operations, and a third more for what is computed again.
        products = 8 * 7.5e9 * 49_000 * 712 / (8 * 989e12 * 0.38)
        assert found[0].seconds == pytest.approx(products, rel=0.05)

    def test_gradients_are_exchanged_once_a_step(self, large: dict[str, Any]) -> None:
        """A whole student's, however many micro-batches a step has."""
        cases = [
            case_of_sizes(large["8B"], large["8B"], "8xH100", train={"gradient_accumulation_steps": micros})
            for micros in (1, 8)
        ]
        first, last = (exchange_seconds(case.at(sharded=False)) for case in cases)
        assert (
            first
            == last
            == pytest.approx(2 * cases[0].student.trained * 4 * 7 / 8 / (DEVICES.build("H100").link_gb_s * 1e9))
        )

    def test_as_many_prompts_are_set_aside_as_a_training_takes(self, large: dict[str, Any]) -> None:
        for prompts, size, expected in ((1000, 4, 4), (1000, 64, 64), (200, 64, 20), (70, 4, 0)):
            case = case_of_sizes(large["8B"], large["8B"], "1xH100", train={"eval_steps": 50, "eval_size": size})
            case = case.at(work=assumed_workload(prompts=prompts, prompt_tokens=10, answer=10, heldout=0.0))
            assert case.steps.aside == expected

    def test_no_speed_of_this_processor(self, large: dict[str, Any]) -> None:
        made = plan_of(case_of_sizes(large["8B"], large["8B"], "cpu"))
        assert made.hours is None and made.usd is None and "no speed of this device is known" in text_of(made)

    def test_a_hosted_teacher_costs_at_most(self, large: dict[str, Any]) -> None:
        where = {"name": "api", "base_url": "http://localhost:1", "price_per_million": [1.0, 10.0], "added_tokens": 0}
        sections = {"teacher": {"where": where, "cache": False}, "responses": {"source": "teacher"}}
        case = case_of_sizes(large["8B"], large["8B"], "8xH100", **sections)
        side = Texts(count=500, tokens=500 * 512, ids=500 * 712, longest=712)
        work = Workload(train=side, heldout=side, exact=False, asked_bytes=1_000_000)
        made = hosted_usd(case.at(work=work, teacher=None, where="api"))
        assert made is not None and float(made) == 1.0 + 10 * 0.512


def test_pairs_of_the_page_are_current(large: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_page, "sizes_of_pairs", lambda: large)
    assert pairs_page.table() in pairs_page.PAGE.read_text("utf-8"), "run python -m benchmarks.plan"


class TestDisk:
    @pytest.mark.parametrize(
        "sections",
        [
            {"train": {"save_total_limit": 1}},
            {"teacher": {"support": "topk_tail", "support_k": 8}, "student": {"lora": {"r": 4}},
             "train": {"save_steps": 6}},
            {"teacher": {"cache_dtype": "bfloat16"}, "sft": {"num_train_epochs": 1}, "student": {"layers": None,
             "init": "teacher"}, "train": {"eval_steps": 6}},
            {"responses": {"source": {"name": "student", "refresh": "epoch"}}, "train": {"num_train_epochs": 3}},
            {"responses": {"source": {"name": "pairs", "refresh": "epoch"}}, "train": {"num_train_epochs": 2},
             "contrast": {"student": {"name": "rkl"}}},
        ],
        ids=["pruned", "adapters", "whole", "rounds", "pairs"],
    )  # fmt: skip
    def test_is_what_a_run_leaves(self, tiny: TinyPair, tmp_path: Path, sections: dict[str, Any]) -> None:
        # Wide enough that weights and not the names of tensors take the room.
        teacher = write_model(tmp_path / "teacher", width=192)
        tree = tiny.tree(tmp_path / "run", **{"teacher": {}, **sections})
        tree["teacher"]["model"] = str(teacher)
        recipe = load_recipe(tree)
        run = run_pipeline(recipe, stages=STAGES, until="train", console=QuietConsole())
        context = RunContext(recipe, QuietConsole())
        work = workload_of(context)
        assert work.exact != recipe.on_policy
        parts = {part.name: part for part in disk_of(case_of(context, work, CPU))}
        best = sum(measured_bytes(path) for path in run.checkpoints.glob("best-*"))
        done = measured_bytes(run.checkpoints / "sft") if recipe.sft else 0
        found = {
            "signal": measured_bytes(run.signal),
            "checkpoints": measured_bytes(run.checkpoints) - best - done,
            "student": measured_bytes(run.student) - tokenizer_bytes(run.student),
        }
        found |= {"best student": best} if best else {}
        found |= {"rounds": measured_bytes(run.rounds)} if recipe.on_policy else {}
        found |= {"first stage": done} if done else {}
        assert set(parts) - {"other files"} == set(found)
        for name, bytes_ in found.items():
            # Headers and state.json are some kilobytes whatever the size of the model; beside rounds the texts lie too.
            assert parts[name].end == pytest.approx(bytes_, rel=0.01, abs=70_000 if name == "rounds" else 40_000), name

    @pytest.mark.parametrize("init", ["scratch", "teacher"])
    def test_a_sharded_student_of_no_files_is_written_first(self, tiny: TinyPair, tmp_path: Path, init: str) -> None:
        tree = tiny.tree(tmp_path / "run", student={"init": init, "layers": None}, train={"sharding": "full"})
        run_pipeline(load_recipe(tree), stages=STAGES, until="prompts", console=QuietConsole())
        context = RunContext(load_recipe(tree), QuietConsole())
        case = case_of(context, workload_of(context), fleet_of("2xH100"))
        parts = {part.name: part for part in disk_of(case)}
        assert ("start of the student" in parts) == (init == "scratch")
        if init == "scratch":
            start = parts["start of the student"]
            assert (start.end, start.most) == (0, case.student.model.parameters * 4)

    def test_answers_that_are_not_written_count_as_long_as_they_may_become(
        self, tiny: TinyPair, tmp_path: Path
    ) -> None:
        recipe = load_recipe(tiny.tree(tmp_path / "run"))
        most = workload_of(RunContext(recipe, QuietConsole()))
        assert not most.exact and most.tokens == 24 * 12
        shorter = workload_of(RunContext(recipe, QuietConsole()), answer=5)
        assert shorter.tokens == 24 * 5 and shorter.train.longest == most.train.longest - 7
        run_pipeline(recipe, stages=STAGES, until="respond", console=QuietConsole())
        exact = workload_of(RunContext(recipe, QuietConsole()))
        # Prompts are counted by a line through some of them.
        assert exact.ids - exact.tokens == pytest.approx(most.ids - most.tokens, rel=0.05)
        assert not (tmp_path / "run" / "signal").exists()

    def test_nothing_is_written(self, tiny: TinyPair, tmp_path: Path) -> None:
        made = plan(load_recipe(tiny.tree(tmp_path / "run")), CPU)
        assert not (tmp_path / "run").exists()
        text = text_of(made)
        assert "the recipe fits 1xcpu as it is" in text and "288 tokens of answers at most" in text
        assert peak(made.case).bytes < GIB
