"""Merging an adapter into a checkpoint on disk: bytes a second beside copying the same files, and memory beside PEFT.

A checkpoint of Llama's layout with random bf16 weights is generated (6 GiB: width 4096, as many blocks as it takes,
three shards), with an adapter of rank 8 on all linear layers. Each candidate is a process of its own:

    copy      the files, 16 MiB at a time, flushed to disk
    veneer    `merge_checkpoint`, with the fingerprints of the base verified, to nearest
    peft      from_pretrained, merge_and_unload, save_pretrained, flushed to disk

Peak memory is that of the process (VmHWM); the bound is twice the largest tensor plus 300 MiB. Seconds are wall
time, as disks matter here, with those of the processor beside them; rounds are interleaved. With ``--check`` the result
is compared bit for bit with the merge of each tensor in memory. ``--kills N`` kills a merge N times, each time when it
has come to a random share of the work, and compares what the last one makes of it.

    python benchmarks/merge.py                  6 GiB, 3 rounds
    python benchmarks/merge.py --quick          a few MiB: does it run

Predicted: 0.8 × the rate of copying with two cores (hashing, reading, adding and writing overlap), 0.8 GiB of memory
against the 7 of PEFT.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from report import child, spread, write

CANDIDATES = ("copy", "veneer", "peft")


def generate(folder: Path, gib: float, width: int) -> None:
    """Write the base and the adapter."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    import veneer
    from veneer import models
    from veneer.fileio.hashing import fingerprint

    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_attention_heads=width // 128 or 1,
        vocab_size=8 * width, num_hidden_layers=1, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    base = folder / "base"
    config.save_pretrained(base)
    fixed = sum(value.numel() for value in models.meta_model(base).parameters())
    config.num_hidden_layers = 2
    config.save_pretrained(base)
    block = sum(value.numel() for value in models.meta_model(base).parameters()) - fixed
    config.num_hidden_layers = max(1, round((gib * 2**30 / 2 - fixed) / block) + 1)
    config.save_pretrained(base)
    model = models.meta_model(base)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size and size + 2 * shape.numel() > gib * 2**30 / 3:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * shape.numel()
    weights, prints = {}, {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.randn(shapes[n], generator=generator).mul_(0.02).to(torch.bfloat16) for n in names}
        save_file(tensors, base / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(names, file)
        prints |= {name: fingerprint(value) for name, value in tensors.items()}
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    handle = veneer.attach(model, veneer.LoraConfig(rank=8, targets="all-linear"))
    for change in handle.changes.values():
        for value in change.parameters():
            value.data.normal_(0, 0.02, generator=generator)
    veneer.save(model, folder / "adapter", fingerprints={path: prints[path] for path in handle.changes})
    os.sync()  # else the first candidate shares the disk with what is still written of this


def alone(name: str, folder: Path, out: Path) -> dict[str, float]:
    """One candidate, in this process: seconds, those of the processor (its children's too), and peak memory."""
    start = time.perf_counter()
    if name == "copy":
        out.mkdir()
        for file in sorted((folder / "base").iterdir()):
            with file.open("rb") as source, (out / file.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
                target.flush()
                os.fsync(target.fileno())
    elif name == "veneer":
        from veneer.tools.merge_checkpoint import merge_checkpoint

        merge_checkpoint(folder / "base", [folder / "adapter"], out, rounding="nearest")
    else:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        merged.save_pretrained(out, max_shard_size="2GB")
        for file in out.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    seconds, used = time.perf_counter() - start, os.times()
    status = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would count what started this process
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {"seconds": seconds, "cpu": sum(used[:4]), "peak": peak * 1024}


def check(folder: Path, out: Path) -> int:
    """Compare the merged files with the merge of each tensor in memory, by the definition; returns how many."""
    import torch

    from veneer.adapter_files.folder import read
    from veneer.kernels.reference import round_once
    from veneer.models.safetensors_dir import open_checkpoint

    base, merged = open_checkpoint(folder / "base"), open_checkpoint(out)
    layers = {f"{path}.weight": low for path, low in read(folder / "adapter").layers.items()}
    for name in base.where:
        old, new = base.read(name), merged.read(name)
        if name in layers:
            low = layers[name]
            for rows, B in zip(old.split(512), low.B[0].double().split(512), strict=True):
                rows.copy_(round_once(rows.double() + B @ low.A[0].double() * low.scale, old.dtype))
        if not torch.equal(old, new):
            raise SystemExit(f"{name} differs")
    return len(base.where)


def killed(folder: Path, out: Path, kills: int) -> list[tuple[float, int]]:
    """Kill a merge so often, then let it finish; returns after how many seconds each was killed, and how many tensors
    it then had on the disk. The first comes at any moment, while the run starts or works. For the others shares of the
    work are drawn at random, and taken in order: a run is killed up to half a second after it works and its share is on
    the disk."""
    code = "import sys; from merge import alone; from pathlib import Path; alone('veneer', *map(Path, sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), str(out)]
    chance, moments = random.Random(0), []
    whole = len(json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"])
    shares = sorted(chance.uniform(0, 0.8) for _ in range(kills))
    for number, share in enumerate(shares):
        start, began = time.perf_counter(), time.time()
        run = subprocess.Popen(command, cwd=Path(__file__).parent)
        while number and run.poll() is None and not (_works(out, began) and _on_disk(out) >= share * whole):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5 if number else 5))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            moments.append((time.perf_counter() - start, _on_disk(out)))
        run.wait()
        if out.exists():
            break
    if not out.exists():
        subprocess.run(command, cwd=Path(__file__).parent, check=True)
    return moments


def _journal(out: Path) -> Path:
    return out.with_name(f".{out.name}.merging") / "journal.jsonl"


def _works(out: Path, since: float) -> bool:
    """Whether a merge has begun to work after that time: it then writes its journal anew."""
    try:
        return _journal(out).stat().st_mtime > since
    except FileNotFoundError:
        return False


def _on_disk(out: Path) -> int:
    """How many tensors a merge that is not finished has on the disk, by its journal."""
    try:
        lines = _journal(out).read_text().splitlines(keepends=True)[1:]
    except FileNotFoundError:
        return 0
    return sum(json.loads(line)["tensors"] for line in lines if line.endswith("\n"))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=6)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare the result bit for bit, in memory")
    parser.add_argument("--kills", type=int, default=0, help="kill a merge so often first")
    parser.add_argument("--folder", type=Path, help="where to put the files; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="a few MiB, one round: does it run")
    parser.add_argument("--out", type=Path, help="folder for the result")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        found = alone(options.alone[0], Path(options.alone[1]), Path(options.alone[2]))
        print(json.dumps(found))
        return found
    if options.quick:
        options.gib, options.width, options.runs, options.check = 0.01, 128, 1, True
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        generate(folder, options.gib, options.width)
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        runs: dict[str, list[dict[str, float]]] = {candidate: [] for candidate in CANDIDATES}
        for number in range(options.runs):
            first = number % len(CANDIDATES)
            for candidate in CANDIDATES[first:] + CANDIDATES[:first]:
                out = folder / candidate
                runs[candidate].append(child(__file__, "--alone", candidate, str(folder), str(out)))
                print(f"  {candidate}: {runs[candidate][-1]}", flush=True)
                if candidate == "veneer" and options.check and not number:
                    print(f"  {check(folder, out)} tensors are those of a merge in memory")
                shutil.rmtree(out)
        kills = None
        if options.kills:
            moments = killed(folder, folder / "out", options.kills)
            kills = len(moments)
            for number, (seconds, count) in enumerate(moments, 1):
                print(f"  kill {number}: after {seconds:.1f} s, with {count} tensors on the disk")
            same = check(folder, folder / "out")
            print(f"  killed {kills} times, then {same} tensors are those of a merge in memory", flush=True)
        largest = _largest(folder / "base")
    rows = {
        candidate: {
            **spread(own["seconds"] / copied["seconds"] for own, copied in zip(ran, runs["copy"], strict=True)),
            "seconds": statistics.median(own["seconds"] for own in ran),
            "rate": size / statistics.median(own["seconds"] for own in ran),
            "cpu": statistics.median(own["cpu"] for own in ran),
            "peak": max(own["peak"] for own in ran),
        }
        for candidate, ran in runs.items()
    }
    setting = {"bytes": size, "width": options.width, "largest": largest, "bound": 2 * largest + 300 * 2**20}
    case = {"setting": setting, "floor": "copy", "runs": options.runs, "kills": kills, "rows": rows}
    for candidate, row in rows.items():
        rate = f"{row['rate'] / 1e9:.2f} GB/s, {1 / row['ratio']:.2f} × the rate of copying"
        print(
            f"{candidate:<8} {row['seconds']:.1f} s, {rate}, {row['cpu']:.1f} s of CPU, {row['peak'] / 2**20:,.0f} MiB"
        )
    print(f"bound for the memory: {setting['bound'] / 2**20:,.0f} MiB")
    return write("merge", {"cases": [case]}, options.out) if options.out or not options.quick else {"cases": [case]}


def _largest(folder: Path) -> int:
    from veneer.models.safetensors_dir import open_checkpoint

    checkpoint = open_checkpoint(folder)
    return max(map(checkpoint.bytes, checkpoint.where))


if __name__ == "__main__":
    main()
