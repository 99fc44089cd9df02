"""A base that one process may not hold: loaded, trained and merged by processes that each hold a
share of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.support.launched import start, train, wait_for_all
from tests.support.tiny import tiny_config, tiny_tokenizer
from tests.train.conftest import config_of

#: bytes of a block, and how many there are; embedding and norms are small beside them
BLOCK, COUNT = 4 * (4 * 512**2 + 3 * 512 * 1408 + 2 * 512), 24
FULL = BLOCK * COUNT

# : Limits the memory that a process may take from here on, and tells the most that it held beyond
# what it had. glibc
# : would keep freed tensors of these sizes for later ones (those of large bases it gives back): it
# is told not to.
LIMITED = """
import ctypes, json, resource
import torch.distributed.fsdp
import veneer.train.processes as processes, veneer.train.sharding as sharding, veneer.tools.merge_checkpoint as tool
ctypes.CDLL(None).mallopt(-3, 1 << 16)
ctypes.CDLL(None).mallopt(-1, 1 << 16)
held, leave, load, merge = [], processes.leave, {load}, tool.merge_checkpoint
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def begins():
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + {limit},) * 2)
    open("/proc/self/clear_refs", "w").write("5")  # the peak is that from now on
    held.append(status("VmRSS"))
def ends(result=None):
    print("peak", json.dumps(status("VmHWM") - held[0]))
    return result
sharding.load = lambda *args: begins() or load(*args)
processes.leave = lambda output: ends() or leave(output)
tool.merge_checkpoint = lambda *args, **kwargs: begins() or ends(merge(*args, **kwargs))
"""
#: loads as if nothing could be read by shares
WHOLE = "lambda task, *rest: task.load()"


def base_of(folder: Path, width: int, inner: int) -> Path:
    """A Llama of ``COUNT`` blocks with random weights."""
    from transformers import LlamaForCausalLM

    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "architectures": ["LlamaForCausalLM"],
    }
    config = tiny_config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=COUNT, **heads
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=draw) / 25 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def peaks(said: str) -> list[int]:
    return [json.loads(line[5:]) for line in said.splitlines() if line.startswith("peak ")]


@pytest.mark.slow
def test_a_process_holds_its_share_and_a_block(rows: Path, tmp_path: Path) -> None:
    """Also where the whole base would not fit: there, reading it fails."""
    large, small = base_of(tmp_path / "large", 512, 1408), base_of(tmp_path / "small", 16, 32)
    limit = FULL * 9 // 10

    def config(base: Path, name: str) -> Any:
        short = {"max_steps": 3, "save_every": 3, "eval_every": 3, "rank": 2, "targets": ["q_proj"]}
        few = {
            "batch_size": 2,
            "activation_checkpointing": True,
        }  # activations are no part of what is bounded
        return config_of(base, rows, tmp_path / name, parallel="fsdp", **short, **few)

    def before(load: str = "sharding.load") -> str:
        return LIMITED.format(limit=limit, load=load)

    own = peaks(
        wait_for_all(train(config(small, "of-small"), tmp_path, 2, before=before()))
    )  # of imports, buffers, …
    held = peaks(wait_for_all(train(config(large, "of-large"), tmp_path, 2, before=before())))
    assert len(own) == len(held) == 2
    for here, other in zip(held, own, strict=True):
        assert here - other <= (FULL / 2 + BLOCK) * 1.15
    whole = config(large, "whole")
    said = wait_for_all(train(whole, tmp_path, 2, before=before(WHOLE)), 1, 2)
    assert "can't allocate memory" in said or "Cannot allocate memory" in said
    merge = ["merge", str(large), str(tmp_path / "of-large" / "adapter"), str(tmp_path / "merged")]
    assert peaks(wait_for_all(start(merge, 1, before())))[0] <= (FULL / 2 + BLOCK) * 1.15
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > FULL
