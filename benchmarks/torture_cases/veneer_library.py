"""Veneer as a Library, through its public API alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from torture_cases.library import Adapter, Library, Selection


class VeneerAdapter(Adapter):
    def __init__(self, handle: veneer.Handle) -> None:
        self.model, self.handle = handle.model, handle

    def parameters(self) -> list[nn.Parameter]:
        return self.handle.parameters()

    def merge(self, *, safe: bool = False) -> None:
        self.handle.merge()

    def unmerge(self) -> None:
        self.handle.unmerge()

    def weights(self) -> dict[str, Tensor]:
        return {
            path: weight
            for path, weight in self.model.named_parameters(remove_duplicate=False)
            if "veneer" not in path
        }

    def delta(self, path: str) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            saved = veneer.adapter_files.read(self.handle.save(Path(folder) / "adapter"))
            return saved.layers[path].delta(torch.float64)[0]


class Veneer(Library):
    name, package, distribution = "Veneer", "veneer", "veneer"
    attention = ("layer", "out_proj")

    def attach(
        self,
        model: nn.Module,
        targets: Sequence[str] | str,
        *,
        rank: int = 2,
        name: str = "one",
        **options: Any,
    ) -> Adapter:
        config = veneer.LoraConfig(rank=rank, alpha=2 * rank, targets=targets, **options)
        return VeneerAdapter(veneer.attach(model, config, name))

    def call(self, model: nn.Module, x: Tensor, selection: Selection) -> Tensor:
        with veneer.use(model, selection):
            return model(x)

    def combine(
        self, adapter: Adapter, names: Sequence[str], weights: Sequence[float], into: str
    ) -> Adapter:
        """`veneer.compose` of folders, as a user combines adapters."""
        with tempfile.TemporaryDirectory() as parent:
            folders = [Path(parent) / name for name in names]
            for name, folder in zip(names, folders, strict=True):
                veneer.Handle(adapter.model, name).save(folder)
            veneer.compose(folders, Path(parent) / "sum", weights=weights, base=adapter.weights())
            return VeneerAdapter(veneer.load(adapter.model, Path(parent) / "sum", name=into))

    def save(self, adapter: Adapter, folder: Path) -> None:
        adapter.handle.save(folder)

    def load(self, model: nn.Module, folder: Path) -> Adapter:
        return VeneerAdapter(veneer.load(model, folder))

    def disguises(self, folder: Path) -> list[Path]:
        """Also without Veneer's record, which hashes every byte: as if PEFT had written it."""
        bare = folder.with_name(f"{folder.name}-bare")
        shutil.copytree(folder, bare)
        (bare / "veneer.json").unlink()
        save_file(load_file(bare / "adapter_model.safetensors"), bare / "adapter_model.safetensors")
        return [folder, bare]
