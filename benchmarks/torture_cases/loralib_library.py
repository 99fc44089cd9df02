"""loralib as a Library, used as its documentation says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import loralib
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torture_cases.library import Adapter, Library, NotOffered, linear_paths


class LoralibAdapter(Adapter):
    """Layers that merge in ``eval()`` and unmerge in ``train()``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for path, parameter in self.model.named_parameters() if "lora_" in path]

    def prepare(self) -> None:
        self.model.train()

    def merge(self, *, safe: bool = False) -> None:
        if safe:
            raise NotOffered("has no checked merge")
        self.model.eval()

    unmerge = prepare

    def weights(self) -> dict[str, Tensor]:
        return {
            path.replace(".conv.", "."): weight
            for path, weight in self.model.named_parameters(remove_duplicate=False)
            if "lora_" not in path
        }

    def delta(self, path: str) -> Tensor:
        layer = self.model.get_submodule(path)
        return layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())


class Loralib(Library):
    name, package, distribution = "loralib", "loralib", "loralib"

    def attach(
        self,
        model: nn.Module,
        targets: Sequence[str] | str,
        *,
        rank: int = 2,
        name: str = "one",
        **options: Any,
    ) -> Adapter:
        if name != "one":
            raise NotOffered("has one adapter a model")
        if options.get("layers") is not None:
            raise NotOffered("has no patterns: layers are replaced by hand")
        modules = dict(model.named_modules(remove_duplicate=False))
        matches = {
            target: [path for path in modules if f".{path}".endswith(f".{target}")]
            for target in linear_paths(model, targets)
        }
        if not all(matches.values()):
            raise NotOffered("has no patterns: layers are replaced by hand")
        layers: dict[nn.Module, nn.Module] = {}
        for path in [path for paths in matches.values() for path in paths]:
            module, (parent, _, last) = modules[path], path.rpartition(".")
            layers.setdefault(module, self._layer(module, rank, options.get("dropout", 0.0)))
            setattr(model.get_submodule(parent), last, layers[module])
        loralib.mark_only_lora_as_trainable(model)
        return LoralibAdapter(model)

    def _layer(self, module: nn.Module, rank: int, dropout: float) -> nn.Module:
        if isinstance(module, nn.Embedding):
            layer = loralib.Embedding(
                module.num_embeddings, module.embedding_dim, r=rank, lora_alpha=2 * rank
            )
            layer.weight = module.weight
            return layer.to(module.weight.dtype)
        options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout}
        options["bias"] = getattr(module, "bias", None) is not None
        if isinstance(module, nn.Linear) and not parametrize.is_parametrized(module):
            layer = loralib.Linear(module.in_features, module.out_features, **options)
        elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            kernel = (
                module.kernel_size[0] if len(set(module.kernel_size)) == 1 else module.kernel_size
            )
            layer = getattr(loralib, type(module).__name__)(
                module.in_channels,
                module.out_channels,
                kernel,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
                padding_mode=module.padding_mode,
                **options,
            )
        else:
            raise NotOffered(f"has no layer for {type(module).__name__}")
        plain = getattr(layer, "conv", layer)
        plain.weight, plain.bias = module.weight, module.bias
        return layer.to(module.weight.dtype)

    def save(self, adapter: Adapter, folder: Path) -> None:
        folder.mkdir()
        torch.save(loralib.lora_state_dict(adapter.model), folder / "adapter.pt")

    def load(self, model: nn.Module, folder: Path) -> Adapter:
        adapter = self.attach(model, ["linear"])
        model.load_state_dict(torch.load(folder / "adapter.pt"), strict=False)  # as its README does
        return adapter

    def edit(self, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = torch.load(folder / "adapter.pt")
        change(tensors)
        torch.save(tensors, folder / "adapter.pt")

    def remove_alpha(self, folder: Path) -> None:
        raise NotOffered("writes no config")
