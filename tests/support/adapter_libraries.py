"""Veneer and PEFT in the runs of `trainers.py`: how each attaches the same adapter to a model, and
what the tests check of both after a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.support.trainers import HEADS, LINEAR, Run, token_rows

import veneer
from veneer import integrations


@dataclass(frozen=True)
class Library:
    """`attach(model, run)` returns the model with a new adapter. `integration(run)` returns the
    library's argument for the trainer (None: no argument). `bare(run)` returns the argument with
    which the trainer attaches the adapter by itself."""

    name: str
    attach: Callable[[Any, Run], Any]
    integration: Callable[[Run], Any]
    bare: Callable[[Run], Any]


def _attach_veneer(model: Any, run: Run) -> Any:
    full_modules = ["score"] if run.head == "reward" else []
    config = veneer.LoraConfig(
        rank=16, alpha=16, dropout=0.1, targets=LINEAR, train_also=full_modules
    )
    veneer.attach(model, config)
    return model


def _veneer_integration(run: Run) -> Any:
    if run.name.startswith("Lightning"):
        return integrations.lightning_callback()
    return integrations.accelerate_hooks if run.name == "accelerate" else None


def _veneer_bare(run: Run) -> Any:
    return (
        _veneer_integration(run)
        if run.name.startswith(("Lightning", "accelerate"))
        else integrations.callback()
    )


def _peft_config(run: Run) -> Any:
    import peft

    full_modules = ["score"] if run.head == "reward" else None
    return peft.LoraConfig(
        r=16, lora_alpha=16, lora_dropout=0.1, target_modules=LINEAR, modules_to_save=full_modules
    )


def _attach_peft(model: Any, run: Run) -> Any:
    import peft

    return peft.get_peft_model(model, _peft_config(run))


def _no_argument(run: Run) -> None:
    return None


def _peft_bare(run: Run) -> Any:
    return {"peft_config": _peft_config(run)} if run.of_trl else None


VENEER = Library("Veneer", _attach_veneer, _veneer_integration, _veneer_bare)
PEFT = Library("PEFT", _attach_peft, _no_argument, _peft_bare)


def load_model(bases: Path, run: Run) -> Any:
    return HEADS[run.head].from_pretrained(bases / run.head, dtype=torch.float32)


def attach_adapter(library: Library, bases: Path, run: Run, seed: int) -> Any:
    model = load_model(bases, run)
    torch.manual_seed(seed)
    return library.attach(model, run)


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train, by path."""
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the parameters and buffers that do not train, by path."""
    parameters = trained(model)
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in parameters
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    ids = torch.tensor([row["input_ids"] for row in token_rows(4)])
    return model.eval()(
        input_ids=ids, **({"labels": ids} if model.config.is_encoder_decoder else {})
    ).logits


def size(path: Path) -> int:
    """The size in bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def files_of(path: Path) -> list[Path]:
    return (
        [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    )


def holds_the_base(path: Path, bases: Path, run: Run) -> bool:
    """Whether a file in a checkpoint contains the bytes of a weight that no adapter changes.
    torch's formats do not compress, so a stored weight is found."""
    state = load_model(bases, run).state_dict()
    name = next(name for name in state if name.endswith(("down_proj.weight", "fc1.weight")))
    weight_bytes = state[name].numpy().tobytes()
    return any(weight_bytes in file.read_bytes() for file in files_of(path))
