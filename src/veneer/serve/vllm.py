"""The command line of the vLLM server that `veneer serve --engine vllm` starts and forwards
requests to, and a check of the adapters that vLLM is to serve.

    vllm serve BASE --uds SOCKET --enable-lora --max-lora-rank R --max-loras N --max-cpu-loras M

vLLM supports only certain ranks, and no DoRA, no biases and no modules that are trained in full
(``formats/vllm.py`` has the rules). An error before vLLM starts names the adapters that vLLM could
not load.
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

#: the most distinct adapters in a batch of vLLM, which reserves for each of them the memory of an
#: adapter of the largest rank
MAX_BATCH_ADAPTERS = 8
#: the most adapters that vLLM keeps in the memory of the CPU
MAX_CPU_ADAPTERS = 64
#: the smallest ``--max-lora-rank``: adapters may be added to a server that starts without any
MIN_RANK = 16
#: the parts "expected" and "do" of the error for an adapter that vLLM cannot load
ADVICE = (
    "one that vLLM can load",
    "`veneer compose` or `veneer merge` makes one that it can, or leave it out",
)


def largest_rank(adapters: Mapping[str, Path]) -> int:
    """The value of ``--max-lora-rank`` for adapter folders, by name. It is large enough for each
    adapter and for blends of any two, whose ranks add up. ``AdapterError`` names each adapter that
    vLLM cannot load, with the reasons."""
    ranks, problems = [], []
    for adapter, path in adapters.items():
        problems += [
            sentence(f"adapter {adapter!r}: {reason}", *ADVICE) for reason in reasons_against(path)
        ]
        ranks.append(vllm.largest_rank(read_json(path / peft.CONFIG)))
    raise_all(AdapterError, "vLLM was not started", problems)
    needed_rank = max(MIN_RANK, sum(sorted(ranks)[-2:]))
    return next(
        (rank for rank in vllm.VALID_MAX_RANKS if rank >= needed_rank), vllm.VALID_MAX_RANKS[-1]
    )


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
    extra_options: Sequence[str] = (),
) -> list[str]:
    """The command line that serves ``base`` at a Unix ``socket``, with adapters of ranks up to
    ``rank``. ``extra_options`` are appended unchanged."""
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
    line += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(MAX_BATCH_ADAPTERS)]
    return [*line, "--max-cpu-loras", str(MAX_CPU_ADAPTERS), *extra_options]


def reasons_against(path: Path, rank: int | None = None) -> list[str]:
    """The reasons why a vLLM with ``--max-lora-rank`` ``rank`` cannot load the adapter folder
    ``path``; empty if it can."""
    shapes = {name: entry.shape for name, entry in read_header(path / peft.TENSORS).tensors.items()}
    return vllm.problems(read_json(path / peft.CONFIG), shapes, shapes=shapes, max_rank=rank)


def find_program() -> str | None:
    """The path of vLLM's program in the folder of this Python or in PATH, or None."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which("vllm", path=os.pathsep.join(folders))


def program() -> str:
    """The path of vLLM's program. ``ConfigError``: vLLM is not installed."""
    path = find_program()
    if path is None:
        raise ConfigError(
            "no vLLM here", "the command `vllm`", "pip install vllm, or serve with --engine veneer"
        )
    return path


def recommendation() -> str | None:
    """A message that recommends ``--engine vllm``; None without a GPU or without vLLM."""
    import torch

    if not torch.cuda.is_available() or find_program() is None:
        return None
    return (
        f"This machine has a GPU ({torch.cuda.get_device_name()}) and vLLM, which has kernels"
        " for it: --engine vllm serves with them, behind the same keys, adapters and blends."
    )
