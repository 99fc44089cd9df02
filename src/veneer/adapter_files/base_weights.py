"""The weights of a base by the path of the parameter, read one at a time, from a model or from a folder.

A folder is read under the paths that its model would have, if its config names one that transformers knows, and else
under the names in its files; a path is found there with or without what stands in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from veneer.attach.lookup import unwrap
from veneer.errors import ConfigError
from veneer.models.meta import meta_model
from veneer.models.named_weights import Value, of_folder, of_module
from veneer.models.safetensors_dir import open_checkpoint

#: names of which a checkpoint holds one where the model ties them
TIED = (
    "lm_head.weight", "embed_out.weight", "proj_out.weight", "embed_tokens.weight", "wte.weight", "embed_in.weight",
    "word_embeddings.weight", "tok_embeddings.weight", "shared.weight",
)  # fmt: skip


class Weights(NamedTuple):
    """The weights of a base by the path of the parameter. A call reads one, or gives None where there is none;
    ``names`` are all the names by which the base is known to hold that one weight."""

    read: Callable[[str], Tensor | None]
    names: Callable[[str], Sequence[str]]

    def __call__(self, at: str) -> Tensor | None:
        return self.read(at)


def weights_of(base: str | Path | nn.Module) -> Weights:
    """The weights of a base by the path of the parameter, read one at a time.

    Raises:
        CheckpointError: no such folder, no safetensors in it, or damaged ones.
    """
    if not isinstance(base, nn.Module):
        return _of_folder(Path(base))
    held = of_module(unwrap(base)).values
    return Weights(lambda at: held[at].read(None) if at in held else None, partial(_names, held))


def _names(held: Mapping[str, Value], at: str) -> list[str]:
    value = held.get(at)
    return [at] if value is None else [name for name, other in held.items() if other is value]


def _of_folder(folder: Path) -> Weights:
    checkpoint = open_checkpoint(folder)
    known = _by_config(folder)

    def weight(at: str) -> Tensor | None:
        name = _name_in(known, at)
        if name is not None:
            return known[name].read(None)
        name = _name_in(checkpoint.where, at)
        return None if name is None else checkpoint.read(name)

    return Weights(weight, partial(_names, known))


def _by_config(folder: Path) -> Mapping[str, Value]:
    """The weights of the model that a folder's config means, by their paths there; none if it means no model that
    transformers has."""
    if not (folder / "config.json").is_file():
        return {}
    try:
        model = meta_model(folder)
    except ConfigError:
        return {}
    return of_folder(model, folder).values


def _name_in(names: Mapping[str, Any], at: str) -> str | None:
    """What a base calls the parameter at a path: the same, with or without what stands in front ("model."), or the
    other name of a tied embedding."""
    if at in names:
        return at
    parts = at.split(".")
    shorter = (".".join(parts[start:]) for start in range(1, len(parts) - 1))
    found = next((name for name in shorter if name in names), None)
    if found is not None:
        return found
    longer = [name for name in names if name.endswith(f".{at}")]
    if len(longer) == 1:
        return longer[0]
    tied = ".".join(parts[-2:]) in TIED
    return next((name for name in names if tied and ".".join(name.split(".")[-2:]) in TIED), None)
