"""One command for whoever has a GPU: what Veneer computes there, what it waits for, how long it
takes and how much memory, beside the frozen base, PEFT, TRL, Liger, Unsloth and vLLM where they are
installed. At most 10 minutes.

    make gpu
    python benchmarks/gpu.py                    all parts, into benchmarks/results/gpu-NAME.json
    python benchmarks/gpu.py --only checks      one part; printed, and kept only with --out
    python benchmarks/gpu.py --device cpu --quick --out FOLDER      every part at a toy's size

Each part runs in a process of its own within a limit of seconds, so none takes another's memory or
time; what a part has answered before its limit counts. Parts for which no time is left are skipped,
and the result says which.

Nothing is predicted: no run on a GPU has been seen yet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # tests/

TOTAL = 580  # seconds, of ten minutes
#: a part that would have less than this is skipped
LEAST = 15
MAIN = (
    "frozen base",
    "veneer",
    "veneer, dropout",
    "veneer, bf16 adapters",
    "veneer, model's own loss",
    "peft",
    "peft, dropout",
    "peft, bf16 adapters",
    "peft + trl",
)


@dataclass(frozen=True)
class Part:
    """The work of one process: ``limit`` in seconds; a model, its storage, and the candidates."""

    name: str
    limit: int
    model: str = ""
    storage: str = "bf16"
    candidates: tuple[str, ...] = MAIN


#: in the order of their worth
PARTS = (
    Part("checks", 150),
    Part("smollm2-135m", 45, "smollm2-135m"),
    Part("llama-1b", 45, "llama-1b"),
    Part("llama-1b, nf4", 50, "llama-1b", "nf4"),
    Part("qwen3-moe-1b", 50, "qwen3-moe-1b"),
    Part("decode", 60),
    Part(
        "llama-8b",
        70,
        "llama-8b",
        candidates=("frozen base", "veneer", "peft", "peft, bf16 adapters"),
    ),
    Part(
        "llama-8b, nf4",
        70,
        "llama-8b",
        "nf4",
        ("frozen base", "veneer", "peft", "peft, bf16 adapters"),
    ),
    Part("liger", 45, "llama-1b", candidates=("frozen base", "veneer", "peft + liger")),
    Part("unsloth", 70, "smollm2-135m", candidates=("frozen base", "veneer", "unsloth")),
    Part("qwen3-moe-8b", 60, "qwen3-moe-8b", candidates=("frozen base", "veneer", "peft")),
    Part("decode beside vllm", 150),
)


def run_part(section: Part, device: str, quick: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """The answers of a part, one after the other."""
    start = time.monotonic()
    if section.name == "unsloth":  # which wants to be first
        with contextlib.suppress(Exception):  # what it says is asked for again, and then told
            __import__("unsloth")
    import gpu_place

    target = gpu_place.find(device, quick)
    until = start + 0.8 * seconds  # the rest is for what has begun
    if section.name == "checks":
        from tests.cuda import gpu_checks
        from tests.cuda.gpu_compare import CHECKS

        for name in CHECKS:
            if time.monotonic() > until:
                yield {"check": name, "found": "skipped", "text": "no time was left"}
            else:
                yield gpu_checks.run(target, name)
        return
    import gpu_speed

    if section.name.startswith("decode"):
        yield {"decode": gpu_speed.decode(target, until, apart=section.name != "decode")}
    else:
        yield {
            "steps": gpu_speed.steps(
                target, section.model, section.storage, section.candidates, until
            )
        }


def child(arguments: Sequence[str], timeout: float) -> tuple[list[dict[str, Any]], str]:
    """(the answers of a process of this program, what went wrong)."""
    environment = dict(os.environ)
    if "checks" not in arguments and "cuda" in arguments:
        # several GPUs that are seen are a trainer's to use
        visible = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        environment["CUDA_VISIBLE_DEVICES"] = visible[0]
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment,
        )
        errors = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        output, problem = done.stdout, errors[-1] if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        raw: Any = late.stdout or b""  # bytes, whatever was asked for
        output, problem = (
            raw if isinstance(raw, str) else raw.decode(),
            f"ended after {timeout:.0f} s",
        )
    marked = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    return [json.loads(line) for line in marked], problem


#: begins a line that is an answer; libraries print others
MARK = "gpu-answer "


def collect(
    sections: Sequence[Part], device: str, quick: bool, total: float, ask: Callable[..., Any]
) -> dict[str, Any]:
    """All parts within ``total`` seconds."""
    end = time.monotonic() + total
    result: dict[str, Any] = {"checks": [], "steps": [], "decode": [], "skipped": []}
    for section in sections:
        remaining = end - time.monotonic()
        if remaining < LEAST:
            result["skipped"].append({"part": section.name, "why": f"{total:.0f} s were over"})
            print(f"{section.name}: skipped, no time is left", flush=True)
            continue
        seconds = min(section.limit, remaining)
        start = time.monotonic()
        answers, problem = ask(
            [
                *("--part", section.name),
                *("--seconds", f"{seconds:.0f}"),
                *("--device", device),
                *(["--quick"] if quick else []),
            ],
            seconds + 15,  # a process starts its clock when torch is imported
        )
        for answer in answers:
            if "check" in answer:
                result["checks"].append(answer)
            elif "skipped" in answer:
                result["skipped"].append({"part": section.name, "why": answer["skipped"]})
            else:
                for kind, case in answer.items():
                    result[kind].append({**case, "part": section.name})
        if problem:
            result["skipped"].append({"part": section.name, "why": problem})
        note = f"; {problem}" if problem else ""
        print(
            f"{section.name}: {len(answers)} answers in {time.monotonic() - start:.0f} s{note}",
            flush=True,
        )
    return result


def show(result: dict[str, Any]) -> None:
    lines = [
        f"{row['found']}: {row['check']}: {row['text']}"
        for row in result["checks"]
        if row["found"] != "right"
    ]
    lines += [f"skipped: {row['part']}: {row['why']}" for row in result["skipped"]]
    for case in [*result["steps"], *result["decode"]]:
        lines.append(", ".join(f"{key} {value}" for key, value in case["setting"].items()))
        lines += [f"  {name:<26} {numbers_of(row)}" for name, row in case["rows"].items()]
    print("\n".join(lines))


def numbers_of(row: dict[str, Any]) -> str:
    if "why" in row:
        return f"–  {row['why']}"
    ratio = f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})" if "ratio" in row else "–"
    peak = "" if row["peak"] is None else f"{row['peak'] / 2**20:9,.0f} MiB"
    return f"{ratio:<18} {row['seconds'] * 1000:9.1f} ms {row['tokens']:10,.0f} tokens/s {peak}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: Sequence[str] | None = None, ask: Callable[..., Any] = child) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda (CUDA_VISIBLE_DEVICES=1: another one), mps or cpu"
    )
    parser.add_argument("--quick", action="store_true", help="a toy's sizes, one round")
    parser.add_argument(
        "--only", nargs="+", choices=[section.name for section in PARTS], help="these parts"
    )
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all parts")
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument(
        "--part", choices=[section.name for section in PARTS], help=argparse.SUPPRESS
    )
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    import gpu_place
    import runner

    if options.part:
        section = next(section for section in PARTS if section.name == options.part)
        answers = []
        try:
            for answer in run_part(section, options.device, options.quick, options.seconds):
                print(MARK + json.dumps(answer), flush=True)
                answers.append(answer)
        except gpu_place.Skipped as why:
            answers.append({"skipped": str(why)})
            print(MARK + json.dumps(answers[-1]), flush=True)
        return {"answers": answers}
    try:
        target = gpu_place.find(options.device, options.quick)
    except gpu_place.Skipped as why:
        print(why, file=sys.stderr)
        raise SystemExit(2) from None
    sections = [
        section for section in PARTS if options.only is None or section.name in options.only
    ]
    result = collect(sections, options.device, options.quick, options.total, ask)
    show(result)
    record = {**target.describe(), "quick": options.quick, **result}
    usual = target.kind == "cuda" and not options.quick and options.only is None
    if options.out is not None or usual:
        folder, name = options.out or runner.RESULTS, f"gpu-{slug(target.name)}"
        record = {"name": name, **record, **runner.machine()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    has_wrong = any(
        row["found"] == "wrong" or row["text"] == "no time was left" for row in result["checks"]
    )
    if has_wrong or any(row["part"] == "checks" for row in result["skipped"]):
        raise SystemExit(1)
    return record


if __name__ == "__main__":
    main()
