"""PEFT, LyCORIS and loralib, each as a Library, used as their documentation says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import loralib
import lycoris
import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torture_cases.library import Adapter, Library, NotOffered, Selection


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
            if isinstance(module, nn.MultiheadAttention) and isinstance(
                module.__dict__.get("in_proj_weight"), Tensor
            ):
                named[f"{path}.in_proj_weight"] = module.__dict__["in_proj_weight"]
            if isinstance(module.__dict__.get("weight"), Tensor):
                named[f"{path}.weight"] = module.__dict__["weight"]
        return {
            path.removeprefix("base_model.model.").replace(".base_layer", ""): weight
            for path, weight in named.items()
            if "lora_" not in path
        }

    def delta(self, path: str) -> Tensor:
        layers: dict[str, Any] = {}
        for (
            name,
            module,
        ) in self.model.named_modules():  # a wrapper comes before the layer that it wraps
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
        variant, layers = options.get("variant", "lora"), options.get("layers")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets if isinstance(targets, str) else list(targets),
            lora_dropout=options.get("dropout", 0.0),
            layers_to_transform=layers,
            use_rslora=variant == "rslora",
            use_dora=variant == "dora",
            ensure_weight_tying=options.get("tied", False),
        )
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
        return PeftAdapter(model, name)

    def call(
        self,
        model: nn.Module,
        x: Tensor,
        selection: Selection,
        through: Callable[..., Any] | None = None,
    ):
        run = model if through is None else through
        if selection is None:
            with model.disable_adapter():
                return run(x)
        if isinstance(selection, str):
            model.set_adapter(selection)
            return run(x)
        return run(x, adapter_names=[name or "__base__" for name in selection])

    def combine(
        self, adapter: Adapter, names: Sequence[str], weights: Sequence[float], how: str, into: str
    ) -> Adapter:
        adapter.model.add_weighted_adapter(list(names), list(weights), into, combination_type=how)
        return PeftAdapter(adapter.model, into)

    def save(self, adapter: Adapter, folder: Path) -> None:
        adapter.model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> Adapter:
        where = folder if (folder / "adapter_config.json").exists() else folder / "one"
        return PeftAdapter(peft.PeftModel.from_pretrained(model, where), "default")

    def edit(self, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        (file,) = folder.rglob("adapter_model.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def forget_alpha(self, folder: Path) -> None:
        (file,) = folder.rglob("adapter_config.json")
        config = json.loads(file.read_text())
        del config["lora_alpha"]
        file.write_text(json.dumps(config))


class LycorisAdapter(Adapter):
    """A network that wraps ``forward`` of the layers. It merges with ``precise``, its exact way."""

    def __init__(self, model: nn.Module, network: lycoris.LycorisNetwork) -> None:
        self.model, self.network = model, network

    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def ready(self) -> None:
        self.model.eval()
        self.network.eval()

    def merge(self, *, safe: bool = False) -> None:
        self.network.restore()
        self.network.merge_to(1.0, precise=True)

    def unmerge(self) -> None:
        self.network.merge_to(-1.0, precise=True)
        self.network.apply_to()

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def delta(self, path: str) -> Tensor:
        part = next(
            part
            for part in self.network.loras
            if part.lora_name == f"lycoris_{path}".replace(".", "_")
        )
        return part.scale * (
            part.lora_up.weight.detach().double() @ part.lora_down.weight.detach().double()
        )


class Lycoris(Library):
    name, package, distribution = "LyCORIS", "lycoris", "lycoris-lora"

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
            raise NotOffered("has no names for several adapters, and no selection")
        if options.get("layers") is not None:
            raise NotOffered("has no choice of layers by index")
        if targets == "all-linear":
            targets = [
                path for path, module in model.named_modules() if isinstance(module, nn.Linear)
            ]
        patterns = [rf"(.*\.)?{re.escape(target)}$" for target in targets]
        lycoris.LycorisNetwork.apply_preset(
            {"enable_conv": True, "target_module": [], "target_name": patterns}
        )
        network = lycoris.LycorisNetwork(
            model,
            lora_dim=rank,
            alpha=2 * rank,
            conv_lora_dim=rank,
            conv_alpha=2 * rank,
            dropout=options.get("dropout", 0.0),
            train_norm=True,
        )
        network.apply_to()
        return LycorisAdapter(model, network)

    def save(self, adapter: Adapter, folder: Path) -> None:
        folder.mkdir()
        adapter.network.save_weights(str(folder / "adapter.safetensors"), None, {})

    def load(self, model: nn.Module, folder: Path) -> Adapter:
        network, _ = lycoris.create_lycoris_from_weights(
            1.0, str(folder / "adapter.safetensors"), model
        )
        network.apply_to()
        return LycorisAdapter(model, network)

    def edit(self, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        tensors = load_file(folder / "adapter.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter.safetensors")

    def forget_alpha(self, folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for key in [key for key in tensors if key.endswith(".alpha")]:
                del tensors[key]

        self.edit(folder, change)


class LoralibAdapter(Adapter):
    """Layers that merge in ``eval()`` and unmerge in ``train()``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for path, parameter in self.model.named_parameters() if "lora_" in path]

    def ready(self) -> None:
        self.model.train()

    def merge(self, *, safe: bool = False) -> None:
        self.model.eval()

    def unmerge(self) -> None:
        self.model.train()

    def weights(self) -> dict[str, Tensor]:
        named = self.model.named_parameters(remove_duplicate=False)
        return {
            path.replace(".conv.", "."): weight for path, weight in named if "lora_" not in path
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
        if targets == "all-linear":
            targets = [
                path for path, module in model.named_modules() if isinstance(module, nn.Linear)
            ]
        modules = dict(model.named_modules(remove_duplicate=False))
        matched = {
            target: [path for path in modules if f".{path}".endswith(f".{target}")]
            for target in targets
        }
        if not all(matched.values()):
            raise NotOffered("has no patterns: layers are replaced by hand")
        made: dict[nn.Module, nn.Module] = {}
        for path in [path for paths in matched.values() for path in paths]:
            module, (parent, _, last) = modules[path], path.rpartition(".")
            made.setdefault(module, self._layer(module, rank, options.get("dropout", 0.0)))
            setattr(model.get_submodule(parent), last, made[module])
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
            layer = own = loralib.Linear(module.in_features, module.out_features, **options)
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
            own = layer.conv
        else:
            raise NotOffered(f"has no layer for {type(module).__name__}")
        own.weight, own.bias = module.weight, module.bias
        return layer.to(module.weight.dtype)

    def save(self, adapter: Adapter, folder: Path) -> None:
        folder.mkdir()
        torch.save(loralib.lora_state_dict(adapter.model), folder / "adapter.pt")

    def load(self, model: nn.Module, folder: Path) -> Adapter:
        adapter = self.attach(model, ["linear"])
        model.load_state_dict(torch.load(folder / "adapter.pt"), strict=False)  # as its README does
        return adapter

    def edit(self, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        tensors = torch.load(folder / "adapter.pt")
        change(tensors)
        torch.save(tensors, folder / "adapter.pt")

    def forget_alpha(self, folder: Path) -> None:
        raise NotOffered("writes no config")


PEERS: list[Library] = [Peft(), Lycoris(), Loralib()]
