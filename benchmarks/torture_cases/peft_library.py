"""PEFT as a Library, used as its documentation says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from torch import Tensor, nn

from torture_cases.library import Adapter, Library, Selection


class PeftAdapter(Adapter):
    def __init__(self, model: peft.PeftModel, name: str) -> None:
        self.model, self.name = model, name

    def parameters(self) -> list[nn.Parameter]:
        return [
            parameter
            for path, parameter in self.model.named_parameters()
            if "lora_" in path and self.name in path.split(".")
        ]

    def merge(self, *, safe: bool = False) -> None:
        self.model.merge_adapter([self.name], safe_merge=safe)

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def weights(self) -> dict[str, Tensor]:
        named = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers()),
        }
        # a merged MultiheadAttention holds its weights as plain attributes
        for path, module in self.model.named_modules():
            for name in ("in_proj_weight", "weight"):
                if isinstance(weight := module.__dict__.get(name), Tensor):
                    named[f"{path}.{name}"] = weight
        return {
            path.removeprefix("base_model.model.").replace(".base_layer", ""): weight
            for path, weight in named.items()
            if "lora_" not in path
        }

    def delta(self, path: str) -> Tensor:
        layers: dict[str, Any] = {}
        for name, module in self.model.named_modules():
            # a wrapper comes before the layer that it wraps
            layers.setdefault(name.replace(".base_layer", ""), module)
        layer = layers[f"base_model.model.{path}"]
        A, B = layer.lora_A[self.name].weight.detach(), layer.lora_B[self.name].weight.detach()
        return layer.scaling[self.name] * (B.double() @ A.double())


class Peft(Library):
    name, package, distribution = "PEFT", "peft", "peft"

    def attach(
        self,
        model: nn.Module,
        targets: Sequence[str] | str,
        *,
        rank: int = 2,
        name: str = "one",
        **options: Any,
    ) -> Adapter:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets if isinstance(targets, str) else list(targets),
            lora_dropout=options.get("dropout", 0.0),
            layers_to_transform=options.get("layers"),
            use_rslora=options.get("variant") == "rslora",
            use_dora=options.get("variant") == "dora",
        )
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
        return PeftAdapter(model, name)

    def call(self, model: nn.Module, x: Tensor, selection: Selection) -> Tensor:
        if selection is None:
            with model.disable_adapter():
                return model(x)
        if isinstance(selection, str):
            model.set_adapter(selection)
            return model(x)
        return model(x, adapter_names=[name or "__base__" for name in selection])

    def combine(
        self, adapter: Adapter, names: Sequence[str], weights: Sequence[float], into: str
    ) -> Adapter:
        """By "cat", which PEFT's documentation calls precise."""
        adapter.model.add_weighted_adapter(list(names), list(weights), into, combination_type="cat")
        return PeftAdapter(adapter.model, into)

    def save(self, adapter: Adapter, folder: Path) -> None:
        adapter.model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> Adapter:
        return PeftAdapter(peft.PeftModel.from_pretrained(model, folder / "one"), "default")
