"""What each codec of a store costs: bytes per token beside the gradient it leaves and the student it trains.

    python -m benchmarks.store                     # writes docs/results/store.md; the same command goes on after a stop
    python -m benchmarks.store train.max_steps=2 teacher.model=MODEL student.layers=2 --out DIR --page FILE --seeds 0

The quickstart's teacher answers its prompts, and these texts are captured with every codec. The cosine
is that between two gradients in the hidden states of the student before training, on some of the captured texts: to
the signal of the same kind in full precision (what packing costs), and to the whole distribution (what the kind
costs too). The KL is that of students trained from each store with the same steps, on held-out texts, from the
teacher to the student over the whole vocabulary, as a mean over seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.compare.charts import Curve, Point, Scale, lay_out, linear, mark_label
from limbeck.compare.svg import svg_figure
from limbeck.models.forward import hidden_states
from limbeck.models.heads import head_of
from limbeck.objectives import build_objective, fused_distillation_loss
from limbeck.pipeline.capturing import signal_for
from limbeck.pipeline.context import RunContext
from limbeck.pipeline.engine import run_pipeline
from limbeck.pipeline.initial_student import build_initial_student
from limbeck.pipeline.stage_order import STAGES
from limbeck.pipeline.stages.respond import load_responses
from limbeck.pipeline.store_capture import capture
from limbeck.pipeline.store_identity import frame_of
from limbeck.recipe.load import load_recipe, recipe_tree
from limbeck.report.curves import Axis
from limbeck.rollouts.collate import collate
from limbeck.runtime.console import default_console
from limbeck.runtime.files import read_json, write_json, write_text
from limbeck.student.saving import save_student
from limbeck.teachers.store.addresses import addresses_of, seed_of
from limbeck.teachers.store.base import Codec
from limbeck.teachers.store.codecs import codec_text
from limbeck.teachers.store.dense import Hidden, Svd
from limbeck.teachers.store.reader import Store, codec_name
from limbeck.teachers.store.sparse import Sampled, TopK
from limbeck.types import DenseSignal, Head, Signal

ROOT = Path(__file__).resolve().parents[1]
CODECS: tuple[Codec, ...] = (
    Hidden(),
    Hidden(dtype="bfloat16"),
    *(Svd(rank=rank) for rank in (32, 64, 128, 256)),
    *(TopK(k=k) for k in (16, 64, 256)),
    *(TopK(k=64, bits=bits) for bits in (6, 8, 12, 32)),
    *(Sampled(draws=draws) for draws in (12, 50)),
)
OBJECTIVES = ("fkl", "rkl", "js")
SUPPORTS = {"dense": "full", "topk": "topk_tail", "sampled": "sampled"}
COMPARED_RESPONSES = 16


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What was measured of a codec.

    Attributes:
        bytes: per token, as the seals of the shards say, index included.
        unpacked, whole: cosines by objective.
        kl: on held-out texts, one for each seed.
    """

    codec: Codec
    bytes: float
    unpacked: Mapping[str, float]
    whole: Mapping[str, float]
    kl: Sequence[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, e.g. train.max_steps=100")
    parser.add_argument("--out", type=Path, default=Path("runs/store"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "store.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arms = [measure(codec, arguments.out, arguments.overrides, arguments.seeds) for codec in fitting(arguments)]
    picture = arguments.page.with_suffix(".svg")
    write_text(picture, draw(arms))
    write_text(arguments.page, page(arms, picture.name, arguments))
    print(arguments.page)


def fitting(arguments: argparse.Namespace) -> list[Codec]:
    """The codecs that make sense for the teacher: not every one has so many tokens or hidden states."""
    frame = frame_of(RunContext(load_recipe(tree_of(arguments.out / "texts", arguments.overrides))))
    largest = {"k": frame.vocab_size, "rank": frame.width}
    return [codec for codec in CODECS if all(getattr(codec, name, 0) <= most for name, most in largest.items())]


def tree_of(output: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The quickstart's recipe, measured by fidelity alone, with a learning rate of its own and changes on top."""
    changes = ["evaluate.groups=[fidelity]", "train.learning_rate=3.0e-4", "train.eval_steps=null"]
    return recipe_tree("quickstart", [*changes, *overrides]) | {"output_dir": str(output)}


def measure(codec: Codec, out: Path, overrides: Sequence[str], seeds: Sequence[int]) -> Arm:
    """One codec: its store, its gradients, its students; each is made once."""
    folder = out / codec_text(codec).replace(" ", "-").replace("=", "")
    record, console = folder / "gradients.json", default_console()
    recipe = load_recipe(tree_of(out / "texts", overrides))
    capture(recipe, folder / "store", codec, console=console)
    if not record.exists():
        write_json(record, gradients(RunContext(recipe), Store(folder / "store")))
    found = read_json(record)
    trees = [arm_tree(folder, seed, codec, overrides) for seed in seeds]
    runs = [run_pipeline(load_recipe(tree), stages=STAGES, console=console) for tree in trees]
    kl = [read_json(run.root / "scores.json")["after"]["forward_kl"]["mean"] for run in runs]
    return Arm(codec=codec, bytes=found["bytes"], unpacked=found["unpacked"], whole=found["whole"], kl=kl)


def arm_tree(folder: Path, seed: int, codec: Codec, overrides: Sequence[str]) -> dict[str, Any]:
    """A run from the store of a codec; its student was cut out before, since no weights of the teacher are there."""
    tree = tree_of(folder / f"seed{seed}", [*overrides, f"train.seed={seed}"])
    teacher: dict[str, Any] = {"where": {"name": "store", "path": str(folder / "store")}}
    teacher["support"] = SUPPORTS[codec.kind]
    if isinstance(codec, TopK | Sampled):
        teacher["support_k"] = codec.k if isinstance(codec, TopK) else codec.draws
    tree["teacher"] |= teacher
    student = {"init": "pretrained", "model": str(initial_student(folder.parent)), "freeze_embeddings": True}
    return tree | {"student": student}


def initial_student(out: Path) -> Path:
    return out / "student"


def gradients(context: RunContext, store: Store) -> dict[str, Any]:
    """Size of a store, and cosines of its gradients on some of its training texts."""
    codec, frame = store.manifest.codec, store.manifest.frame
    responses = list(load_responses(context, "train").values())
    some = responses[:: -(-len(responses) // COMPARED_RESPONSES)]
    student, teacher = build_initial_student(context), context.teacher
    if not (initial := initial_student(store.path.parent.parent)).exists():
        save_student(student.model, student.tokenizer, initial)
    head = head_of(student.model, frame.vocab_size)
    read = store.head(codec, torch.device("cpu"))
    parts: dict[str, list[list[Tensor]]] = {name: [[], [], []] for name in OBJECTIVES}
    for response in some:
        batch = collate([response], [0], pad_id=0)
        with torch.no_grad():
            states_ND = hidden_states(student.model, batch)
        dense = teacher.signal(batch)
        assert isinstance(dense, DenseSignal)
        (address,) = addresses_of(batch)
        unpacked = signal_for(codec, frame, dense, seed=seed_of(address))
        stored = store.signal(batch, {} if read is None else {codec_name(codec): read})
        for name in objectives_of(codec):
            for place, signal in enumerate((stored, unpacked, dense)):
                parts[name][place].append(gradient(name, states_ND, head, signal))
    joined = {name: [torch.cat(some) for some in three] for name, three in parts.items() if three[0]}
    shards = [seal for seal in store.seals.values() if seal["codec"]["name"] == codec_name(codec)]
    return {
        "bytes": sum(seal["bytes"] for seal in shards) / sum(seal["tokens"] for seal in shards),
        "unpacked": {name: cosine(stored, unpacked) for name, (stored, unpacked, _) in joined.items()},
        "whole": {name: cosine(stored, dense) for name, (stored, _, dense) in joined.items()},
    }


def objectives_of(codec: Codec) -> tuple[str, ...]:
    """The objectives that are defined on what a codec keeps."""
    return ("fkl",) if isinstance(codec, Sampled) else OBJECTIVES


def gradient(objective: str, states_ND: Tensor, head: Head, signal: Signal) -> Tensor:
    inner_ND = states_ND.detach().clone().requires_grad_()
    loss = fused_distillation_loss(inner_ND, head, signal, build_objective(objective), compile="off").loss
    (grad_ND,) = torch.autograd.grad(loss, inner_ND)
    return grad_ND.double().flatten()


def cosine(one: Tensor, two: Tensor) -> float:
    return float(one @ two / (one.norm() * two.norm()))


def page(arms: Sequence[Arm], picture: str, arguments: argparse.Namespace) -> str:
    command = " ".join(["python -m benchmarks.store", *arguments.overrides])
    said = (__doc__ or "").split("\n\n")[-1].strip()
    lines = [
        "| codec | bytes per token | 1 - cosine to unpacked: " + ", ".join(OBJECTIVES) + " | 1 - cosine to whole: "
        + ", ".join(OBJECTIVES) + " | held-out KL | each seed |",
        "|---|---:|---|---|---:|---|",
    ]  # fmt: skip
    for arm in arms:
        cells = (", ".join(f"{max(0.0, 1 - found[name]):.1e}" for name in found) for found in (arm.unpacked, arm.whole))
        seeds = ", ".join(f"{kl:.4f}" for kl in arm.kl)
        lines.append(
            f"| `{codec_text(arm.codec)}` | {arm.bytes:,.0f} | {' | '.join(cells)} "
            f"| {statistics.mean(arm.kl):.4f} | {seeds} |"
        )
    head = f"# The codecs of a store\n\n`{command}`, seeds {', '.join(map(str, arguments.seeds))}.\n\n{said}\n\n"
    return f"{head}![bytes per token against cosine and KL]({picture})\n\n" + "\n".join(lines) + "\n"


def draw(arms: Sequence[Arm]) -> str:
    """Two charts over the bytes: what is lost of forward KL's gradient, and the students."""
    kinds = {
        name: [arm for arm in arms if codec_name(arm.codec) == name] for name in ("hidden", "svd", "topk", "sampled")
    }
    floor = 1e-8
    measures = {
        "gradient": ("1 - cosine to the whole gradient", lambda arm: max(floor, 1 - arm.whole["fkl"])),
        "kl": ("held-out KL (nats per token)", lambda arm: statistics.mean(arm.kl)),
    }
    plates = []
    for name, (title, value) in measures.items():
        curves = [
            Curve(
                name=kind,
                tone=tone,
                dotted=True,
                points=[
                    Point(x=arm.bytes, y=value(arm), title=codec_text(arm.codec))
                    for arm in sorted(some, key=lambda arm: arm.bytes)
                ],
            )
            for tone, (kind, some) in enumerate(kinds.items())
            if some
        ]
        across, up = ([getattr(p, axis) for curve in curves for p in curve.points] for axis in ("x", "y"))
        plates.append(
            lay_out(
                name=name,
                title=title,
                unit="",
                x_label="bytes per token",
                curves=curves,
                x=logarithmic(across, steps=(1, 2, 5)),
                y=logarithmic(up, steps=(1,), every=2) if name == "gradient" else linear(up),
                ends=False,
            )
        )
    return svg_figure("The codecs of a store", "what is kept of each token, by its size on disk", plates)


def logarithmic(values: Sequence[float], *, steps: Sequence[int], every: int = 1) -> Scale:
    """A logarithmic axis around some numbers, with marks at some steps of every so many powers of ten."""
    low, high = math.log(min(values)), math.log(max(values))
    pad = 0.05 * (high - low)
    powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    marks = [step * 10.0**power for power in powers if power % every == 0 for step in steps]
    inside = [mark for mark in marks if low - pad <= math.log(mark) <= high + pad]
    axis = Axis(low=low - pad, high=high + pad, marks=())
    return Scale(axis=axis, log=True, marks=tuple((mark, mark_label(mark)) for mark in inside))


if __name__ == "__main__":
    main()
