"""`veneer serve --engine vllm`: the same adapters, served by vLLM, which takes the place of this
process.

    vllm serve BASE --enable-lora --lora-modules name=path … --max-lora-rank R --max-loras N

vLLM registers adapters at its start, takes ranks of a fixed list, and has no DoRA, no biases and no
modules that are trained in full (``formats/vllm.py`` has the rules). An adapter that it could not
serve is named here before it starts.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from veneer.errors import AdapterError, ConfigError, raise_all, sentence
from veneer.fileio.untrusted import read_header, read_json
from veneer.formats import peft, vllm

#: distinct adapters in one of vLLM's batches: each takes memory for the largest rank
MOST = 8
#: what was expected of an adapter that it cannot load, and what to do
ADVICE = (
    "one that vLLM can load",
    "`veneer compose` or `veneer merge` makes one that it can, or leave it out",
)


def command(
    base: str,
    adapters: Mapping[str, Path],
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    length: int | None = None,
    rows: int | None = None,
    dtype: str | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line that serves ``base`` with ``adapters`` (folders by name); ``more`` goes to
    vLLM as it is. ``AdapterError`` names each adapter that vLLM cannot load, and why."""
    ranks, problems = [1], []
    for adapter, path in adapters.items():
        problems += [
            sentence(f"adapter {adapter!r}: {why}", *ADVICE) for why in reasons_against(path)
        ]
        ranks.append(vllm.largest_rank(read_json(path / peft.CONFIG)))
    raise_all(AdapterError, "vLLM was not started", problems)
    line = ["vllm", "serve", base, "--host", host, "--port", str(port)]
    options = {
        "served-model-name": name,
        "max-model-len": length,
        "max-num-seqs": rows,
        "dtype": dtype,
    }
    line += [
        word for option, value in options.items() if value for word in (f"--{option}", str(value))
    ]
    if adapters:
        rank = next(rank for rank in vllm.RANKS if rank >= max(ranks))
        line += [
            "--enable-lora",
            "--max-lora-rank",
            str(rank),
            "--max-loras",
            str(min(MOST, len(adapters))),
        ]
        line += ["--max-cpu-loras", str(len(adapters)), "--lora-modules"]
        line += [f"{adapter}={path}" for adapter, path in sorted(adapters.items())]
    return [*line, *more]


def reasons_against(path: Path) -> list[str]:
    """Why vLLM cannot load the adapter folder ``path``; empty if it can."""
    shapes = {name: entry.shape for name, entry in read_header(path / peft.TENSORS).tensors.items()}
    return vllm.problems(read_json(path / peft.CONFIG), shapes, shapes=shapes)


def run(line: Sequence[str]) -> NoReturn:
    """Become vLLM. ``ConfigError``: it is not installed."""
    program = shutil.which(
        "vllm", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if program is None:
        raise ConfigError(
            "no vLLM here", "the command `vllm`", "pip install vllm, or serve with --engine veneer"
        )
    sys.stdout.flush()
    os.execv(program, [program, *line[1:]])
