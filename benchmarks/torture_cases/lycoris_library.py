"""LyCORIS as a Library, used as its documentation says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lycoris
from torch import Tensor, nn

from torture_cases.library import Adapter, Library, NotOffered, linear_paths


class LycorisAdapter(Adapter):
    """A network that wraps ``forward`` of the layers. It merges with ``precise``, its exact way."""

    def __init__(self, model: nn.Module, network: lycoris.LycorisNetwork) -> None:
        self.model, self.network = model, network

    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.parameters())

    def prepare(self) -> None:
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
        name = f"lycoris_{path}".replace(".", "_")
        layer = next(layer for layer in self.network.loras if layer.lora_name == name)
        A, B = layer.lora_down.weight.detach(), layer.lora_up.weight.detach()
        return layer.scale * (B.double() @ A.double())


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
        patterns = [rf"(.*\.)?{re.escape(path)}$" for path in linear_paths(model, targets)]
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

    def remove_alpha(self, folder: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            for key in [key for key in tensors if key.endswith(".alpha")]:
                del tensors[key]

        self.edit(folder, change)
