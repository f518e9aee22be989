"""Time and memory of one loss step, forward and backward, beside the products that no full-vocabulary method avoids.

    python -m benchmarks.loss_step                              N=2048, V=49152, every method
    python -m benchmarks.loss_step --n 512 2048 8192 --v 49152 151936 --out docs/results/loss-step.md
    python -m benchmarks.loss_step --device cuda --dtype bfloat16 --n 8192 --v 151936 --d 2048

The floor is four matrix products by torch.mm: both projections, and the gradients of hidden states and head. On AMD
CPUs with AVX-512 oneDNN multiplies faster than the MKL behind torch.mm, and limbeck takes it there, so that a whole
step can come out below the floor; "floor, in tiles" is the same four products by the library and in the tiles that
limbeck takes. Each method has a process of its own, which takes the floor and the method in turns. What counts is the
ratio of the fastest of each, the least disturbed by whatever else the machine does; the ratio of the medians stands
beside it. Memory is the peak above what the inputs hold, gradients included. Compilation is in the first call, which
stands apart. On a GPU all methods share a process: its memory is counted by the allocator, and nothing else is in its
way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from limbeck.evaluation.cost import settle
from limbeck.objectives import OBJECTIVES, Temperature, build_objective, fused_distillation_loss, token_values
from limbeck.objectives.fused.projection import prepare_projection
from limbeck.objectives.fused.tiles import plan_tiles
from limbeck.ops import onednn
from limbeck.runtime.memory import peak_memory_mib, reset_peak_memory
from limbeck.types import DenseSignal, Head

FLOOR_ROWS = 2048
TAU = 2.0
OTHERS = (
    "floor",
    "floor, in tiles",
    "autograd fkl",
    "autograd rkl",
    "autograd js",
    "autograd csd",
    "trl gkd js",
    "trl tiled fkl",
    "trl tiled rkl",
    "trl tiled js",
    "liger chunked js",
    "liger chunked js, compiled",
)
PLAIN = ("fkl", "rkl", "js", "skl", "csd")
SKIPPED = {"hidden"}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A student and a teacher of the same width, as hidden states and heads."""

    student_ND: Tensor
    student_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    label_N: Tensor

    @classmethod
    def draw(cls, n: int, v: int, d: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        weight_VD = normal(v, d) / d**0.5
        return cls(
            student_ND=(2 * normal(n, d)).to(dtype).requires_grad_(),
            student_VD=(weight_VD + normal(v, d) / (2 * d**0.5)).to(dtype).requires_grad_(),
            teacher_ND=(2 * normal(n, d)).to(dtype),
            teacher_VD=weight_VD.to(dtype),
            label_N=torch.randint(v, (n,), generator=g, device=device),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[2048], help="tokens")
    parser.add_argument("--v", type=int, nargs="+", default=[49152], help="vocabulary")
    parser.add_argument("--d", type=int, default=576, help="width")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="methods whose name contains one of these")
    parser.add_argument("--out", type=Path, help="write the table here (Markdown), and the plot beside it (SVG)")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(arguments.method, arguments.n[0], arguments.v[0], arguments)))
        return
    run = in_process if arguments.device == "cpu" else in_this_process
    known = [m for m in methods() if arguments.device == "cpu" or "in tiles" not in m]
    chosen = [m for m in known if not arguments.only or any(part in m for part in arguments.only)]
    tables = []
    for v in arguments.v:
        for n in arguments.n:
            found = {}
            for method in chosen:
                found[method] = run(method, n, v, arguments)
                print(f"N={n} V={v} {method}: {found[method]}", file=sys.stderr, flush=True)
            tables.append((n, v, found))
    text = "\n".join(table(n, v, arguments, found) for n, v, found in tables)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, "utf-8")
        arguments.out.with_suffix(".svg").write_text(plot(tables), "utf-8")


def methods() -> list[str]:
    ours = [name for name in OBJECTIVES if name not in SKIPPED]
    return [*OTHERS, *(f"limbeck {name}" for name in ours), *(f"limbeck {name}, no compiler" for name in PLAIN)]


def in_process(method: str, n: int, v: int, arguments: argparse.Namespace) -> dict[str, float | str]:
    command = [sys.executable, "-m", "benchmarks.loss_step", "--method", method, "--n", str(n), "--v", str(v)]
    command += ["--d", str(arguments.d), "--threads", str(arguments.threads), "--repeats", str(arguments.repeats)]
    command += ["--dtype", arguments.dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1][:120]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_this_process(method: str, n: int, v: int, arguments: argparse.Namespace) -> dict[str, float | str]:
    try:
        return measure(method, n, v, arguments)
    except Exception as error:
        return {"failed": (str(error).strip().splitlines() or [type(error).__name__])[0][:120]}
    finally:
        torch.cuda.empty_cache()


def measure(method: str, n: int, v: int, arguments: argparse.Namespace) -> dict[str, float | str]:
    """Seconds of the first call, of method and floor taken in turns, and the peak above the inputs in MiB."""
    inputs = Inputs.draw(n, v, arguments.d, arguments.device, getattr(torch, arguments.dtype))
    step = step_of(method, inputs)
    first = timed(step, inputs)
    # Memory first, while the floor's own buffers do not exist.
    extra = extra_mib(step, inputs)
    floor = floor_of(inputs)
    timed(floor, inputs)
    pairs = [(timed(floor, inputs), timed(step, inputs)) for _ in range(arguments.repeats)]
    floors, steps = zip(*pairs, strict=True)
    return {
        "first_s": first,
        "step_s": min(steps),
        "floor_s": min(floors),
        "ratio": min(steps) / min(floors),
        "median_ratio": statistics.median(steps) / statistics.median(floors),
        "extra_mib": extra,
    }


def timed(step: Callable[[], None], inputs: Inputs) -> float:
    _forget(inputs)
    settle(inputs.label_N.device)
    start = time.perf_counter()
    step()
    settle(inputs.label_N.device)
    return time.perf_counter() - start


def extra_mib(step: Callable[[], None], inputs: Inputs) -> float:
    """Peak of one step above what is held before it."""
    _forget(inputs)
    if inputs.label_N.is_cuda:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    resident = _resident_mib()
    reset_peak_memory()
    step()
    return peak_memory_mib() - resident


def _forget(inputs: Inputs) -> None:
    inputs.student_ND.grad = inputs.student_VD.grad = None


def _resident_mib() -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def floor_of(inputs: Inputs) -> Callable[[], None]:
    """The four products, at most 2048 tokens at a time, into buffers that exist already."""
    s, w, t, u = inputs.student_ND.detach(), inputs.student_VD.detach(), inputs.teacher_ND, inputs.teacher_VD
    rows = min(FLOOR_ROWS, s.shape[0])
    logits_NV, hidden_ND, head_VD = s.new_empty(rows, w.shape[0]), s.new_empty(rows, s.shape[1]), torch.zeros_like(w)

    def step() -> None:
        for start in range(0, s.shape[0], rows):
            part = slice(start, start + rows)
            count = s[part].shape[0]
            torch.mm(t[part], u.T, out=logits_NV[:count])
            torch.mm(s[part], w.T, out=logits_NV[:count])
            torch.mm(logits_NV[:count], w, out=hidden_ND[:count])
            torch.addmm(head_VD, logits_NV[:count].T, s[part], beta=float(start > 0), out=head_VD)

    return step


def tiled_floor_of(inputs: Inputs) -> Callable[[], None]:
    """The four products by the library and in the tiles and strips that the fused loss takes."""
    s, w, t, u = inputs.student_ND.detach(), inputs.student_VD.detach(), inputs.teacher_ND, inputs.teacher_VD
    student, teacher = (
        prepare_projection(hidden_ND, Head(weight_VD=head_VD, vocab_size=len(head_VD)), side)
        for hidden_ND, head_VD, side in ((s, w, "student"), (t, u, "teacher"))
    )
    rows = plan_tiles(len(s), len(w), (s.dtype, t.dtype), s.device, None).tile_rows
    buffer_NV, head_VD = torch.empty(rows, len(w)), torch.zeros_like(w)

    def step() -> None:
        head_VD.zero_()
        for part in (slice(start, start + rows) for start in range(0, s.shape[0], rows)):
            logits_NV = buffer_NV[: len(s[part])]
            teacher.into(t[part], logits_NV)
            student.into(s[part], logits_NV)
            onednn.product(logits_NV, w.T) if onednn.fits(logits_NV, w) else torch.mm(logits_NV, w)
            head_VD.addmm_(logits_NV.T, s[part])

    return step


def step_of(method: str, inputs: Inputs) -> Callable[[], None]:
    """One forward and backward of a method, from the hidden states on."""
    if method == "floor":
        return floor_of(inputs)
    if method == "floor, in tiles":
        return tiled_floor_of(inputs)
    kind, _, rest = method.partition(" ")
    if kind == "limbeck":
        return limbeck_step(inputs, *rest.split(", "))
    name = rest.partition(",")[0].split()[-1]
    if kind == "autograd":
        return lambda: token_values(build_objective(name), *logits(inputs), temperature=TAU).mean().backward()
    if rest.startswith("gkd"):
        return trl_gkd_step(inputs)
    return trl_tiled_step(inputs, name) if kind == "trl" else liger_step(inputs, compiled="compiled" in rest)


def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.student_ND @ inputs.student_VD.T, inputs.teacher_ND @ inputs.teacher_VD.T


def limbeck_step(inputs: Inputs, name: str, how: str = "") -> Callable[[], None]:
    objective, v = build_objective(name), inputs.student_VD.shape[0]
    head, teacher = (Head(weight_VD=w, vocab_size=v) for w in (inputs.student_VD, inputs.teacher_VD))
    signal = DenseSignal(hidden_ND=inputs.teacher_ND, head=teacher)
    # The alpha-beta divergence warns about its size at other temperatures; here only time counts.
    temperature = Temperature(loss=1.0 if name == "ab" else TAU)

    def step() -> None:
        fused_distillation_loss(
            inputs.student_ND,
            head,
            signal,
            objective,
            temperature=temperature,
            label_N=inputs.label_N,
            compile="off" if how else "auto",
        ).loss.backward()

    return step


def trl_gkd_step(inputs: Inputs) -> Callable[[], None]:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def step() -> None:
        student, teacher = logits(inputs)
        loss = GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], labels=inputs.label_N[None], beta=0.5, temperature=TAU
        )
        loss.backward()

    return step


def trl_tiled_step(inputs: Inputs, name: str) -> Callable[[], None]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = {"fkl": 0.0, "rkl": 1.0, "js": 0.5}[name]

    def step() -> None:
        value_N, _ = ChunkedDivergenceFunction.apply(
            inputs.student_ND, inputs.student_VD, None, inputs.teacher_ND, inputs.teacher_VD, None, beta, TAU
        )
        value_N.mean().backward()

    return step


def liger_step(inputs: Inputs, compiled: bool) -> Callable[[], None]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=TAU, compiled=compiled)

    def step() -> None:
        loss(inputs.student_ND, inputs.student_VD, inputs.teacher_ND, inputs.teacher_VD, inputs.label_N).backward()

    return step


def table(n: int, v: int, arguments: argparse.Namespace, found: dict[str, dict]) -> str:
    # A step takes seconds on two cores, milliseconds on a GPU.
    unit, factor, digits = ("s", 1, 2) if arguments.device == "cpu" else ("ms", 1000, 1)
    lines = [f"N={n}, V={v}, D={arguments.d}, {arguments.dtype}", ""]
    lines += [
        f"| method | time / floor | by medians | step, {unit} | floor beside it, {unit} | extra peak, MiB "
        "| first call, s |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for method, row in found.items():
        if "failed" in row:
            lines.append(f"| {method} | failed: {row['failed']} | | | | | |")
            continue
        lines.append(
            f"| {method} | {row['ratio']:.2f} | {row['median_ratio']:.2f} | {factor * row['step_s']:.{digits}f} "
            f"| {factor * row['floor_s']:.{digits}f} | {row['extra_mib']:.0f} | {row['first_s']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(tables: list[tuple[int, int, dict[str, dict]]]) -> str:
    """Bars of time over floor with the memory beside them, one panel a table, as an SVG that needs nothing else."""
    widest = max((row["ratio"] for *_, found in tables for row in found.values() if "ratio" in row), default=1.0)
    panels = [_panel(*one, widest) for one in tables]
    tops = [sum(height for _, height in panels[:i]) for i in range(len(panels) + 1)]
    moved = (f'<g transform="translate(0 {top})">{body}</g>' for (body, _), top in zip(panels, tops, strict=False))
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{tops[-1]}" '
    return "\n".join([f'{frame}font-family="sans-serif" font-size="12">', *moved, "</svg>"]) + "\n"


def _panel(n: int, v: int, found: dict[str, dict], widest: float) -> tuple[str, int]:
    """The bars of one table and their height in pixels.

    Args:
        widest: the ratio whose bar is as wide as the panel.
    """
    rows = sorted(((m, r) for m, r in found.items() if "ratio" in r), key=lambda row: row[1]["ratio"])
    height, left, wide = 22, 210, 560
    title = f"Loss step, time over floor (extra peak memory); N={n}, V={v}"
    parts = [f'<text x="{left}" y="20" font-size="14">{title}</text>']
    for i, (method, row) in enumerate(rows):
        top, width = 34 + i * height, wide * row["ratio"] / widest
        colour = "#2a78d6" if method.startswith("limbeck") else "#9a9a93"
        parts.append(f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{method}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{height - 6}" rx="3" fill="{colour}"/>')
        label = f"{row['ratio']:.2f} ({max(row['extra_mib'], 0) / 1024:.2f} GiB)"
        parts.append(f'<text x="{left + width + 6:.1f}" y="{top + 13}">{label}</text>')
    return "\n".join(parts), height * len(rows) + 60


if __name__ == "__main__":
    main()
