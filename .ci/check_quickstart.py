"""Hold the quickstart's run directory against the figures the project promises for it."""

import json
import sys
from pathlib import Path


def main(run: Path) -> int:
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    student = json.loads((run / "student" / "student.json").read_text("utf-8"))
    stages = [json.loads(path.read_text("utf-8")) for path in sorted((run / "stages").glob("*.json"))]
    splits: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for line in (run / "prompts.jsonl").read_text("utf-8").splitlines():
        prompt = json.loads(line)
        splits[prompt["split"]].add(prompt.get("text") or json.dumps(prompt["messages"]))
    before = {name: score["mean"] for name, score in scores["before"].items()}
    after = {name: score["mean"] for name, score in scores["after"].items()}
    peak_mib = max(stage["peak_memory_mib"] for stage in stages)
    minutes = sum(stage["seconds"] for stage in stages) / 60
    checks = {
        f"student has {student['share']:.1%} of the parameters (at most 70 %)": student["share"] <= 0.70,
        f"forward KL {after['forward_kl']:.3f} nats/token (at most 1.0)": after["forward_kl"] <= 1.0,
        f"less than half of its start, {before['forward_kl']:.3f}": after["forward_kl"] < before["forward_kl"] / 2,
        f"top-1 agreement {after['top1_agreement']:.3f} (at least 0.60)": after["top1_agreement"] >= 0.60,
        f"peak memory {peak_mib} MiB (at most 4.5 GB)": peak_mib * 2**20 <= 4.5e9,
        f"{len(splits['train'])} training and {len(splits['heldout'])} held-out prompts share none": not (
            splits["train"] & splits["heldout"]
        )
        and len(splits["train"]) + len(splits["heldout"]) >= 400,
        "the report is written": (run / "report.html").stat().st_size > 10_000,
    }
    for text, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    # Time is the machine's as much as ours: a shared one may be twice as slow for an hour.
    print(f"{'ok  ' if minutes <= 12 else 'slow'} stages took {minutes:.1f} min (at most 12 on two quiet cores)")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
