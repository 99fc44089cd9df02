"""The training benchmarks compare four architectures, and the ways to train each.

A model has the shape of a real one and random weights. With fewer layers than the real one a Llama
also gets a smaller vocabulary, in proportion, so that the output head keeps its share of the step.
Every candidate adapts the same layers at the same rank: all linear layers and convolutions but the
first (what embeds the input) and the output head, and a layer that cannot have the rank gets the
largest that it can. "veneer" is a plain loop with transformers' own attention and loss; "own loss
and attention" are those of `veneer train`.

Peers are imported when they are built: a process that measures memory then holds only what it
measures.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALPHA, DROPOUT = 16, 0.05
PATCH = 16  # pixels on a side of what counts as a token of an image
TINY = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3}


def split(tokens: int) -> tuple[int, int]:
    """(rows, tokens a row) of a batch: rows of 256, or one shorter row."""
    return max(1, tokens // 256), min(tokens, 256)


def llama(layers: int, length: int, tiny: bool = False, **changes: Any) -> nn.Module:
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152 * layers // 30,
    }
    if tiny:
        shape = {**TINY, "num_key_value_heads": 1, "vocab_size": 96}
    # A cache is of no use in training, and would be copied.
    common = {"num_hidden_layers": layers, "tie_word_embeddings": True, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **common, **changes}))


def bert(layers: int, length: int, tiny: bool = False) -> nn.Module:
    """BERT-base with a classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = {**TINY, "vocab_size": 96} if tiny else {}
    return BertForSequenceClassification(
        BertConfig(num_hidden_layers=layers, num_labels=2, **shape)
    )


def vit(layers: int, length: int, tiny: bool = False) -> nn.Module:
    """ViT-base on images of `length` patches."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            num_hidden_layers=layers,
            image_size=isqrt(length) * PATCH,
            patch_size=PATCH,
            num_labels=10,
            **(TINY if tiny else {}),
        )
    )


def resnet(layers: int, length: int, tiny: bool = False) -> nn.Module:
    """ResNet-50; its 16 blocks in four stages are 3, 4, 6 and 3."""
    from transformers import ResNetConfig, ResNetForImageClassification

    depths = [max(1, round(layers * blocks / 16)) for blocks in (3, 4, 6, 3)]
    small = {"embedding_size": 16, "hidden_sizes": [32, 32, 64, 64]} if tiny else {}
    return ResNetForImageClassification(ResNetConfig(depths=depths, num_labels=10, **small))


def text(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, model.config.vocab_size, split(tokens))
    return {"input_ids": ids, "labels": ids}


def sentences(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, model.config.vocab_size, split(tokens))
    return {"input_ids": ids, "labels": torch.randint(0, 2, (len(ids),))}


def images(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    rows, length = split(tokens)
    side = isqrt(length) * PATCH
    return {
        "pixel_values": torch.randn(rows, 3, side, side).to(next(model.parameters()).dtype),
        "labels": torch.randint(0, 10, (rows,)),
    }


@dataclass(frozen=True)
class Architecture:
    """`entry` is the module that embeds the input, `head` the one that stays plain."""

    build: Callable[..., nn.Module]
    batch: Callable[[nn.Module, int], dict[str, Tensor]]
    entry: str
    head: str


ARCHITECTURES = {
    "llama": Architecture(llama, text, "model.embed_tokens", "lm_head"),
    "bert": Architecture(bert, sentences, "bert.embeddings", "classifier"),
    "vit": Architecture(vit, images, "vit.embeddings", "classifier"),
    "resnet": Architecture(resnet, images, "resnet.embedder", "classifier"),
}


def ranks(model: nn.Module, architecture: Architecture, rank: int) -> dict[str, int]:
    """The rank of each layer to adapt, by its path."""
    layer_ranks = {}
    for path, module in model.named_modules():
        if f"{path}.".startswith((f"{architecture.entry}.", f"{architecture.head}.")):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            layer_ranks[path] = min(rank, *module.weight.shape[:2])
    return layer_ranks


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model returns: full logits, in a causal language model."""
    return model(**batch).loss


@dataclass(frozen=True)
class Candidate:
    """A model, what trains in it, and its loss."""

    model: nn.Module
    parameters: list[nn.Parameter]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] = own_loss

    def optimizer(self) -> torch.optim.Optimizer | None:
        return torch.optim.AdamW(self.parameters, lr=1e-4, fused=True) if self.parameters else None


def step(
    candidate: Candidate, optimizer: torch.optim.Optimizer | None, batch: dict[str, Tensor]
) -> None:
    """One whole training step."""
    if optimizer is not None:
        optimizer.zero_grad()
    candidate.loss(candidate.model, batch).backward()
    if optimizer is not None:
        optimizer.step()


def training_step(candidate: Candidate, batch: dict[str, Tensor]) -> Callable[[], None]:
    """`step`, with an optimizer that lasts from one call to the next."""
    return partial(step, candidate, candidate.optimizer(), batch)


def names(architecture: str, dtype: str, dropout: bool = True, peers: bool = True) -> list[str]:
    """The arms of a table, the floor first; what a user with defaults has stands before what Veneer
    adds."""
    narrow = dtype != "float32"
    conditions = {
        "floor": True,
        "full fine-tuning": peers,
        "peft": True,
        "peft, bf16 adapters": narrow,
        "loralib": peers,
        "veneer": True,
        "veneer, own loss and attention": architecture == "llama",
        "veneer, own attention": architecture in ("bert", "vit") and narrow,
        "veneer, channels last": architecture == "resnet",
    }
    arms = [name for name, is_compared in conditions.items() if is_compared]
    if dropout:
        arms += [f"{name}, dropout" for name in arms if name.startswith(("peft", "veneer"))]
    return arms


def sharing(model: nn.Module) -> nn.Module:
    """A copy whose parameters are those of `model`: frozen weights need not be there once for each
    candidate."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def make(name: str, model: nn.Module, architecture: str, rank: int) -> Candidate:
    """Turn `model` into the candidate `name`, in place where its library can."""
    kind, *options = name.split(", ")
    shape, dropout = ARCHITECTURES[architecture], DROPOUT if "dropout" in options else 0.0
    if kind == "floor":
        model.requires_grad_(False)
        # what any step over a frozen base must do: forward, and the gradient carried back to the
        # embedded input
        model.get_submodule(shape.entry).register_forward_hook(
            lambda *call: call[2].detach().requires_grad_()
        )
        return Candidate(model, [])
    if kind == "full fine-tuning":
        return Candidate(model, list(model.requires_grad_(True).parameters()))
    layers = ranks(model, shape, rank)
    if kind == "loralib":
        return Candidate(model, with_loralib(model, layers))
    if kind == "peft":
        adapted = with_peft(
            model,
            narrow="bf16 adapters" in options,
            r=rank,
            lora_alpha=ALPHA,
            lora_dropout=dropout,
            target_modules=list(layers),
            rank_pattern={path: size for path, size in layers.items() if size != rank},
        )
        return Candidate(adapted, trained_parameters(adapted))
    if "channels last" in options:
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if any("attention" in option for option in options):
        from veneer import models

        # attention as ``veneer.models.load_base`` chooses it for language models
        models.use_products(model)
    return with_veneer(model, layers, rank, dropout, any("loss" in option for option in options))


def with_veneer(
    model: nn.Module, layers: dict[str, int], rank: int, dropout: float, lean: bool
) -> Candidate:
    import veneer
    from veneer.train.loss import causal_loss

    config = veneer.LoraConfig(
        rank=rank,
        alpha=ALPHA,
        dropout=dropout,
        targets=list(layers),
        ranks={path: size for path, size in layers.items() if size != rank},
    )
    parameters = veneer.attach(model, config).parameters()
    return Candidate(model, parameters, causal_loss if lean else own_loss)


def with_peft(model: nn.Module, *, narrow: bool = False, **config: Any) -> Any:
    """PEFT's model with new adapters; `narrow`: in the weights' own dtype."""
    import peft

    with warnings.catch_warnings(action="ignore"):
        return peft.get_peft_model(
            model, peft.LoraConfig(**config), autocast_adapter_dtype=not narrow
        )


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_loralib(model: nn.Module, layers: dict[str, int]) -> list[nn.Parameter]:
    """Put loralib's layers into the places of the model's; returns what trains.

    loralib's convolutions have a rank of kernel size × r, and form W + ΔW in each call.
    """
    import loralib

    for path, rank in layers.items():
        parent, _, name = path.rpartition(".")
        holder: Any = model.get_submodule(parent)
        old: Any = getattr(holder, name)
        more: Any = {
            "r": rank,
            "lora_alpha": ALPHA,
            "merge_weights": False,
            "bias": old.bias is not None,
        }
        if isinstance(old, nn.Linear):
            new: Any = loralib.Linear(
                old.in_features, old.out_features, dtype=old.weight.dtype, **more
            )
        else:
            new = loralib.Conv2d(
                old.in_channels,
                old.out_channels,
                old.kernel_size[0],
                stride=old.stride,
                padding=old.padding,
                dtype=old.weight.dtype,
                **more,
            )
        plain = getattr(new, "conv", new)
        plain.weight, plain.bias = old.weight, old.bias
        setattr(holder, name, new)
    loralib.mark_only_lora_as_trainable(model)
    return trained_parameters(model)


def peft_with(base: nn.Module, folder: Path, adapter_names: list[str], **options: Any) -> nn.Module:
    """PEFT's model with these adapters of a folder; of one that was saved by Veneer."""
    import peft

    first, *rest = adapter_names
    with warnings.catch_warnings(action="ignore"):
        model = peft.PeftModel.from_pretrained(
            sharing(base), str(folder / first), adapter_name=first, **options
        )
        for name in rest:
            model.load_adapter(str(folder / name), adapter_name=name, **options)
    return model.eval()


def load_bank(base: nn.Module, folder: Path, adapter_names: list[str]) -> Any:
    """A `veneer.Bank` of `base` with these adapters of a folder."""
    import veneer

    bank = veneer.Bank(sharing(base))
    for name in adapter_names:
        bank.add(folder / name)
    return bank


def save_random(base: nn.Module, folder: Path, count: int, rank: int = 8) -> list[str]:
    """Folders of random adapters of `base`; their names."""
    import veneer

    adapter_names = [f"a{number}" for number in range(count)]
    for name in adapter_names:
        model = sharing(base)
        handle = veneer.attach(model, veneer.LoraConfig(rank=rank, alpha=ALPHA))
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        handle.save(folder / name)
    return adapter_names
