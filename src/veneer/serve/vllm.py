"""Build the command line of the vLLM server that `veneer serve --engine vllm` starts and forwards
requests to, and check whether vLLM can load adapters.

    vllm serve BASE --uds SOCKET --enable-lora --max-lora-rank R --max-loras N --max-cpu-loras M

vLLM supports only certain ranks, and no DoRA, no biases and no modules that are trained in full
(``formats/vllm.py`` has the rules). The adapters are checked before vLLM starts, because starting
takes long; an error names those that vLLM cannot load.
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

#: the value of ``--max-loras``: the most distinct adapters in a batch of vLLM. vLLM reserves memory
#: for so many adapters of the largest rank.
MAX_BATCH_ADAPTERS = 8
#: the value of ``--max-cpu-loras``: the most adapters that vLLM keeps loaded, in CPU memory
MAX_CPU_ADAPTERS = 64
#: the smallest value of ``--max-lora-rank`` that is used, because a server may start without
#: adapters and get some later
MIN_RANK = 16
#: the second and third text of the error for an adapter that vLLM cannot load: what was expected,
#: and what the user can do (``errors.sentence``)
ADVICE = (
    "one that vLLM can load",
    "`veneer compose` or `veneer merge` makes one that it can, or leave it out",
)


def largest_rank(adapters: Mapping[str, Path]) -> int:
    """The value of ``--max-lora-rank`` for ``adapters``, {name: folder}. If vLLM supports a rank so
    large, it suffices for each adapter and for a blend of any two, whose ranks add up; otherwise it
    is the largest that vLLM supports. ``AdapterError``: vLLM cannot load some of the adapters; the
    message names each of them and the reasons."""
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
    max_rank: int,
    *,
    name: str,
    length: int | None = None,
    rows: int | None = None,
    dtype: str | None = None,
    tool_call_parser: str | None = None,
    extra_options: Sequence[str] = (),
) -> list[str]:
    """The command line of a vLLM server. vLLM uses its own default for an option that is None.

    Args:
        base: the folder or hub id of the base.
        socket: the path of the Unix socket at which vLLM listens.
        max_rank: the largest rank of an adapter.
        name: the base's model name in requests to vLLM.
        length: the most tokens of a prompt and its answer together.
        rows: the most requests that vLLM runs at one time.
        dtype: the dtype of the base's weights, by torch's name.
        tool_call_parser: the name of vLLM's parser of tool calls; None: tool calls are not parsed.
        extra_options: further options, appended unchanged.
    """
    words = ["vllm", "serve", base, "--uds", str(socket), "--served-model-name", name]
    options = {
        "max-model-len": length,
        "max-num-seqs": rows,
        "dtype": dtype,
        "tool-call-parser": tool_call_parser,
    }
    words += [
        word for option, value in options.items() if value for word in (f"--{option}", str(value))
    ]
    if tool_call_parser is not None:
        words.append("--enable-auto-tool-choice")
    words += [
        "--enable-lora",
        "--max-lora-rank",
        str(max_rank),
        "--max-loras",
        str(MAX_BATCH_ADAPTERS),
    ]
    return [*words, "--max-cpu-loras", str(MAX_CPU_ADAPTERS), *extra_options]


def reasons_against(path: Path, max_rank: int | None = None) -> list[str]:
    """The reasons why vLLM cannot load the adapter in the folder ``path``; empty if it can.
    ``max_rank``: the value of vLLM's ``--max-lora-rank``; None: the rank of the adapter is not
    limited by it."""
    shapes = {name: entry.shape for name, entry in read_header(path / peft.TENSORS).tensors.items()}
    return vllm.problems(read_json(path / peft.CONFIG), shapes, shapes=shapes, max_rank=max_rank)


def find_program() -> str | None:
    """The path of the program `vllm`, which is searched in the folder of this Python and then in
    PATH; None if it is not found."""
    search_folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which("vllm", path=os.pathsep.join(search_folders))


def program() -> str:
    """The path of the program `vllm`. ``ConfigError``: vLLM is not installed."""
    path = find_program()
    if path is None:
        raise ConfigError(
            "no vLLM here", "the command `vllm`", "pip install vllm, or serve with --engine veneer"
        )
    return path


def recommendation() -> str | None:
    """A message for the user that recommends ``--engine vllm``; None if this machine has no GPU, or
    vLLM is not installed."""
    import torch

    if not torch.cuda.is_available() or find_program() is None:
        return None
    return (
        f"This machine has a GPU ({torch.cuda.get_device_name()}) and vLLM, which has kernels"
        " for it: --engine vllm serves with them, behind the same keys, adapters and blends."
    )
