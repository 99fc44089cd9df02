"""The weights of a base by the path of the parameter, read one at a time, from a model or from a folder.

A folder is read under the paths that its model would have, if its config names one that transformers knows, and else
under the names in its files; a path is found there with or without what stands in front of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

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


class BaseWeights:
    """A call reads the weight at the path of a parameter, or gives None where there is none.

    Raises:
        CheckpointError: no such folder, no safetensors in it, or damaged ones.
    """

    def __init__(self, base: str | Path | nn.Module) -> None:
        self.known: Mapping[str, Value] = {}
        self.files = None if isinstance(base, nn.Module) else open_checkpoint(base)
        if isinstance(base, nn.Module):
            self.known = of_module(unwrap(base)).values
        elif (Path(base) / "config.json").is_file():
            with suppress(ConfigError):  # no model that transformers has
                self.known = of_folder(meta_model(base), base).values

    def __call__(self, at: str) -> Tensor | None:
        if self.files is None:
            return self.known[at].read(None) if at in self.known else None
        name = _name_in(self.known, at)
        if name is not None:
            return self.known[name].read(None)
        name = _name_in(self.files.where, at)
        return None if name is None else self.files.read(name)

    def names(self, at: str) -> Sequence[str]:
        """All the names by which the base is known to hold that one weight."""
        value = self.known.get(at)
        return [at] if value is None else [name for name, other in self.known.items() if other is value]


def _name_in(names: Collection[str], at: str) -> str | None:
    """What a base calls the parameter at a path: the same, with or without what stands in front ("model."), or the
    other name of a tied embedding."""
    parts = at.split(".")
    found = [name for name in (".".join(parts[start:]) for start in range(max(1, len(parts) - 1))) if name in names]
    longer = [] if found else [name for name in names if name.endswith(f".{at}")]
    if len(longer) == 1:
        found = longer
    if not found and ".".join(parts[-2:]) in TIED:
        found = [name for name in names if ".".join(name.split(".")[-2:]) in TIED]
    return next(iter(found), None)
