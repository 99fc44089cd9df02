"""Dense changes: one safetensors file with ΔW by the name of each parameter.

    <parameter>                 ΔW in the parameter's own shape: base[name] += file[name] is the
                                adapted model
    header "veneer_dense"       {"format": 1, "base": {name, architecture, fingerprints}, "full":
                                […], "variant": …}

Every tool can add such changes, and no other format holds any variant on any layer: DoRA's change
is W' - W. The file is as large as the weights. ``full`` names the parameters that the adapter
trained in full; when the file is read, these are not factored. Rejected: the changed weights
themselves, because W' would be rounded and a change is exact.
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

HEADER = "veneer_dense"
FORMAT = 1


def recognises(start: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    return HEADER in header


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    tensors, header = read_tensors(path)
    try:
        fields = parse(header[HEADER])
        full, base_record = fields.get("full", []), fields.get("base") or {}
        version = fields["format"]
        if not _well_formed(full, base_record, version):
            raise TypeError("fields of other types")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"a damaged header {HEADER} in {path} ({error!r})"
        raise AdapterError(problem, "what the file is", "get the file again") from error
    if version != FORMAT:
        raise AdapterError(f"format {version} in {path}", f"{FORMAT}", "install a newer Veneer")
    about = {"header": {HEADER: header[HEADER]}, "base": base_record}
    return Contents(
        deltas=tensors, full=frozenset(full), base_name=base_record.get("name"), about=about
    )


def _well_formed(full: Any, base: Any, version: Any) -> bool:
    """Whether the fields of the header have their types: names in a list, and a base as in Veneer's
    record."""
    names = isinstance(full, list) and all(isinstance(name, str) for name in full)
    if not names or type(version) is not int or not isinstance(base, dict):
        return False
    tables = [base.get("weights") or {}, base.get("rest") or {}]
    hashes = all(
        isinstance(table, dict) and all(isinstance(h, str) for h in table.values())
        for table in tables
    )
    return hashes and isinstance(base.get("name"), str | None)


def write(adapter: Adapter, path: Path, base: BaseFacts, options: Options) -> list[str]:
    deltas, problems = adapter.deltas()
    raise_all(AdapterError, "The dense changes of this adapter cannot be told", problems)
    full = [
        f"{module_path}.{name}".lstrip(".")
        for module_path, tensors in adapter.full.items()
        for name in tensors
    ]
    fields = {
        "format": FORMAT,
        "base": adapter.about.get("base"),
        "full": [name for name in full if name in deltas],
        "variant": adapter.about.get("variant"),
    }
    tensors = {name: cast(delta, options.dtype) for name, delta in deltas.items()}
    save_file(tensors, path, metadata={"format": "pt", HEADER: json.dumps(fields)})
    return []


LACKS = "the factors: what is read back is a product of the same change, not the same numbers"
register(
    Format(
        "dense",
        "safetensors of ΔW by parameter",
        LACKS,
        ".safetensors",
        recognises,
        read=read,
        write=write,
    )
)
