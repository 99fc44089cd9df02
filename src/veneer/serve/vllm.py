"""The command line of the vLLM that `veneer serve --engine vllm` starts behind itself.

    vllm serve BASE --uds SOCKET --enable-lora --max-lora-rank R --max-loras N --max-cpu-loras M

vLLM takes ranks of a fixed list, and has no DoRA, no biases and no modules that are trained in full
(``formats/vllm.py`` has the rules). An adapter that it could not serve is named here before it
starts.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from veneer.errors import AdapterError, ConfigError, raise_all, sentence
from veneer.fileio.untrusted import read_header, read_json
from veneer.formats import peft, vllm

#: distinct adapters in one of vLLM's batches: each takes memory for the largest rank
MOST = 8
#: adapters that vLLM keeps in the memory of the processor
LOADED = 64
#: the smallest ``--max-lora-rank``, so that a server without adapters can be given some
LEAST_RANK = 16
#: what was expected of an adapter that it cannot load, and what to do
ADVICE = (
    "one that vLLM can load",
    "`veneer compose` or `veneer merge` makes one that it can, or leave it out",
)


def largest_rank(adapters: Mapping[str, Path]) -> int:
    """The ``--max-lora-rank`` for some adapter folders by name, and for blends of two of them,
    whose ranks add up. ``AdapterError`` names each adapter that vLLM cannot load, and why."""
    ranks, problems = [], []
    for adapter, path in adapters.items():
        problems += [
            sentence(f"adapter {adapter!r}: {why}", *ADVICE) for why in reasons_against(path)
        ]
        ranks.append(vllm.largest_rank(read_json(path / peft.CONFIG)))
    raise_all(AdapterError, "vLLM was not started", problems)
    wanted = max(LEAST_RANK, sum(sorted(ranks)[-2:]))
    return next((rank for rank in vllm.RANKS if rank >= wanted), vllm.RANKS[-1])


def command(
    base: str,
    socket: Path,
    rank: int,
    *,
    name: str,
    length: int | None = None,
    rows: int | None = None,
    dtype: str | None = None,
    tool_call_parser: str | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line that serves ``base`` at a Unix ``socket``, with room for adapters up to a
    rank; ``more`` goes to vLLM as it is."""
    line = ["vllm", "serve", base, "--uds", str(socket), "--served-model-name", name]
    options = {
        "max-model-len": length,
        "max-num-seqs": rows,
        "dtype": dtype,
        "tool-call-parser": tool_call_parser,
    }
    line += [
        word for option, value in options.items() if value for word in (f"--{option}", str(value))
    ]
    if tool_call_parser is not None:
        line.append("--enable-auto-tool-choice")
    line += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(MOST)]
    return [*line, "--max-cpu-loras", str(LOADED), *more]


def reasons_against(path: Path, rank: int | None = None) -> list[str]:
    """Why vLLM cannot load the adapter folder ``path``, with ``rank`` as its largest; empty if it
    can."""
    shapes = {name: entry.shape for name, entry in read_header(path / peft.TENSORS).tensors.items()}
    return vllm.problems(read_json(path / peft.CONFIG), shapes, shapes=shapes, max_rank=rank)


def find_program() -> str | None:
    """vLLM's program: beside this Python, or in PATH."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which("vllm", path=os.pathsep.join(folders))


def program() -> str:
    """The same. ``ConfigError``: it is not installed."""
    path = find_program()
    if path is None:
        raise ConfigError(
            "no vLLM here", "the command `vllm`", "pip install vllm, or serve with --engine veneer"
        )
    return path


def recommendation() -> str | None:
    """Why somebody who serves here may want ``--engine vllm``; None where there is no reason."""
    import torch

    if not torch.cuda.is_available() or find_program() is None:
        return None
    return (
        f"This machine has a GPU ({torch.cuda.get_device_name()}) and vLLM, which computes faster on"
        " it: --engine vllm serves with it, behind the same keys, adapters and blends."
    )
