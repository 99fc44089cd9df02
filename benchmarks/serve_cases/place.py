"""The folders that the servers serve: a base, adapters for it, and the same adapters merged.

    PLACE/base                a model of SmolLM2-135M's shape with random weights, and a tokenizer
    PLACE/adapters/a0 … a7    rank 8 on all linear layers, saved by Veneer
    PLACE/merged/a0 … a7      base and adapter as one
    PLACE/plain/a0 … a7       the adapters without Veneer's records

The tokenizer has one plain word for each token, so that a client that receives text knows how many
tokens it got: no server has to hold back half a character.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import veneer
from candidates import DTYPES, llama
from veneer.formats import peft
from veneer.models.messages import quiet
from veneer.models.meta import meta_model
from veneer.tools.merge_checkpoint import merge_checkpoint

RANK = 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def make(
    folder: Path,
    dtype: str,
    adapters: int,
    *,
    tiny: bool = False,
    layers: int = 2,
    merged: bool = True,
) -> list[str]:
    """Write all of it, with seeded random numbers; returns the names of the adapters.

    ‖ΔW‖ is about a fifth of ‖W‖: the answers of an adapter are not the base's.
    """
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = llama(layers, 2048, tiny, use_cache=True, **ids).to(DTYPES[dtype]).eval()
    with quiet():
        model.save_pretrained(folder / "base")
        _tokenizer(model.config.vocab_size).save_pretrained(folder / "base")
    handle = veneer.attach(model, veneer.LoraConfig(rank=RANK, targets="all-linear"))
    names = [f"a{number}" for number in range(adapters)]
    generator = torch.Generator().manual_seed(1)
    plain = meta_model(folder / "base") if merged else None
    for name in names:
        adapter = save_random(handle, generator, folder / "adapters" / name)
        if merged:
            merge_checkpoint(
                folder / "base",
                [adapter],
                folder / "merged" / name,
                rounding="nearest",
                model=plain,
            )
    return names


def save_random(handle: veneer.Handle, generator: torch.Generator, folder: Path) -> Path:
    for change in handle.changes.values():
        for value in change.parameters():
            value.data.normal_(0, 0.02, generator=generator)
    return handle.save(folder)


def add_plain(folder: Path, names: Sequence[str]) -> None:
    """Write ``plain/NAME``: the adapters without Veneer's records, whose fields earlier commits may
    not know."""
    for name in names:
        adapter, copy = folder / "adapters" / name, folder / "plain" / name
        copy.mkdir(parents=True)
        shutil.copy(adapter / peft.CONFIG, copy)
        save_file(load_file(adapter / peft.TENSORS), copy / peft.TENSORS)


def add_invoked(folder: Path, name: str, invocation: Sequence[int]) -> None:
    """Write ``adapters/NAME``, which acts from these tokens on, for the base of ``make``."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    config = veneer.LoraConfig(rank=RANK, invocation_tokens=tuple(invocation))
    generator = torch.Generator().manual_seed(2)
    save_random(veneer.attach(model, config), generator, folder / "adapters" / name)


def _tokenizer(size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(SPECIAL)}
    words |= {f"w{number}": number for number in range(len(SPECIAL), size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
