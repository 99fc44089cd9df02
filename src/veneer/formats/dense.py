"""Dense changes: one safetensors file with ΔW under the name of each parameter.

    <parameter>                 ΔW in the parameter's shape: the adapted model has
                                base[name] + file[name] for each parameter
    header "veneer_dense"       {"format": 1, "base": {name, architecture, fingerprints}, "full":
                                [names], "variant": …}

Every tool can add a ΔW to a weight. Only this format can hold every variant on every kind of layer,
because each change is stored as W' - W (W: the weight of the base, W': that of the adapted model).
The file is as large as the changed weights. "full" names the parameters that the adapter trained in
full; a reader does not factor their changes into A and B. Rejected: to store W' itself, because
rounding W' would lose a small change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from veneer.errors import AdapterError, raise_all
from veneer.fileio.untrusted import parse
from veneer.formats import Adapter, BaseFacts, Contents, Format, Options, register
from veneer.formats._base import cast, read_tensors

#: the key of the header with Veneer's fields, and the version of these fields
HEADER = "veneer_dense"
FORMAT = 1


def recognises(first_bytes: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    return HEADER in header


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    tensors, header = read_tensors(path)
    try:
        fields = parse(header[HEADER])
        full_names, base_record = fields.get("full", []), fields.get("base") or {}
        version = fields["format"]
        if not _has_valid_types(full_names, base_record, version):
            raise TypeError("fields of other types")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"a damaged header {HEADER} in {path} ({error!r})",
            "what the file is",
            "get the file again",
        ) from error
    if version != FORMAT:
        raise AdapterError(f"format {version} in {path}", f"{FORMAT}", "install a newer Veneer")
    metadata = {"header": {HEADER: header[HEADER]}, "base": base_record}
    return Contents(
        deltas=tensors,
        full=frozenset(full_names),
        base_name=base_record.get("name"),
        metadata=metadata,
    )


def _has_valid_types(full_names: Any, base_record: Any, version: Any) -> bool:
    """Whether the fields of the header have the right types: a list of names, an integer version,
    and a base whose name is a text or None and whose fingerprints are texts by weight name."""
    is_name_list = isinstance(full_names, list) and all(
        isinstance(name, str) for name in full_names
    )
    if not is_name_list or type(version) is not int or not isinstance(base_record, dict):
        return False
    hash_tables = [base_record.get("weights") or {}, base_record.get("rest") or {}]
    are_hashes_valid = all(
        isinstance(hash_table, dict)
        and all(isinstance(hash_text, str) for hash_text in hash_table.values())
        for hash_table in hash_tables
    )
    return are_hashes_valid and isinstance(base_record.get("name"), str | None)


def write(adapter: Adapter, path: Path, base: BaseFacts, options: Options) -> list[str]:
    deltas, problems = adapter.deltas()
    raise_all(AdapterError, "The dense changes of this adapter cannot be told", problems)
    full_names = [
        f"{module_path}.{name}".lstrip(".")
        for module_path, tensors in adapter.full.items()
        for name in tensors
    ]
    fields = {
        "format": FORMAT,
        "base": adapter.metadata.get("base"),
        "full": [name for name in full_names if name in deltas],
        "variant": adapter.metadata.get("variant"),
    }
    tensors = {name: cast(delta, options.dtype) for name, delta in deltas.items()}
    save_file(tensors, path, metadata={"format": "pt", HEADER: json.dumps(fields)})
    return []


register(
    Format(
        "dense",
        "safetensors of ΔW by parameter",
        "the factors: what is read back is a product of the same change, not the same numbers",
        ".safetensors",
        recognises,
        read=read,
        write=write,
    )
)
