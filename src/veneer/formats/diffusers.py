"""diffusers' own safetensors: paths with dots, and the config in the header.

    <part>.<path>.lora_A.weight, .lora_B.weight         A [r, in, *k], B [out, r, *1]
    <part>.<path>.lora_magnitude_vector                 DoRA's magnitude
    header "lora_adapter_metadata"                      {"<part>.r": …, "<part>.lora_alpha": …, …},
                                                        PEFT's fields

Older releases wrote ``.lora.down.weight`` and ``.lora.up.weight``,
``.lora_linear_layer.down.weight``, attention processors (``.processor.to_q_lora.down.weight``),
and alphas as tensors (``<part>.<path>.alpha``) or none, which means alpha = r. All of these are
read; the first layout is written. The paths in a file of a single model have no part.

Two keys of text encoders differ, because diffusers 0.42 needs them and others also read them:
magnitudes end in ``.weight``, since transformers' loader expects that name and otherwise
initialises them; and if no attention projection is among the changes, factors are named
``lora_linear_layer``, by which diffusers recognises the format.

rsLoRA is written as plain LoRA with alpha' = scale · r, because many loaders do not know its flag.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from veneer.errors import AdapterError, raise_all, sentence
from veneer.fileio.untrusted import parse
from veneer.formats import (
    Adapter,
    BaseFacts,
    Contents,
    Format,
    LowRankChange,
    Options,
    parts,
    peft,
    peft_fields,
    peft_paths,
    register,
)
from veneer.formats._base import PAIR, cast, layer_of, read_tensors, scalar
from veneer.formats.kohya import ATTENTION, LACKS, alpha_of

HEADER = "lora_adapter_metadata"
_SIDES = {
    "lora_A.weight": "A", "lora.down.weight": "A", "lora_linear_layer.down.weight": "A",
    "lora_B.weight": "B", "lora.up.weight": "B", "lora_linear_layer.up.weight": "B",
    peft.MAGNITUDE: "magnitude", f"{peft.MAGNITUDE}.weight": "magnitude", "alpha": "alpha",
}  # fmt: skip
#: A and B of a text encoder without changes of ``ATTENTION``
NAMED = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
_PROCESSORS = {f"processor.{name}_lora": name for name in ("to_q", "to_k", "to_v")} | {
    "processor.to_out_lora": "to_out.0"
}


def recognises(start: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    ends = (*(suffix for suffix, side in _SIDES.items() if side in ("A", "B")), "_lora.down.weight")
    return any(key.endswith(ends) and not key.startswith(peft.PREFIX) for key in keys)


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    tensors, header = read_tensors(path)
    groups: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        path_in_file, side = _split(key)
        if side is None:
            problems.append(
                sentence(f"tensor {key!r}", "a LoRA's factors", "use the library that made it")
            )
        else:
            groups.setdefault(path_in_file, {})[side] = tensor
    raise_all(AdapterError, f"{path} cannot be read", problems)
    part_by_path = {path_in_file: parts.part_of(path_in_file) or "model" for path_in_file in groups}
    before, left_out = parts.choose_parts(part_by_path.values(), base, options.part)
    config = _header_of(path, header)
    configs = {component: _config_of(config, component) for component in before}
    low: dict[str, peft.PeftLayer] = {}
    for path_in_file, group in groups.items():
        component = part_by_path[path_in_file]
        if component not in before:
            continue
        path_in_model = path_in_file if component == "model" else path_in_file.partition(".")[2]
        start = before[component]
        path_in_part = parts.path_in_base(
            component,
            path_in_model,
            lambda path, start=start: f"{start}{path}.weight" in base.shapes,
        )
        path_in_base = path_in_file if component == "model" else f"{start}{path_in_part}"
        try:
            low[path_in_base] = _layer(
                path_in_file, path_in_model, path_in_base, group, configs[component], base
            )
        except AdapterError as error:
            problems.append(str(error))
    raise_all(AdapterError, f"{path} cannot be read", problems)
    return Contents(
        low, base_name=base.name, about={"header": header} if header else {}, left_out=left_out
    )


def _split(key: str) -> tuple[str, str | None]:
    """(path of the module, kind of the tensor) of a key; the kind is None for keys of other
    tensors."""
    for processor, name in _PROCESSORS.items():
        key = key.replace(f".{processor}.", f".{name}.lora.")
    for suffix, side in _SIDES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), side
    return key, None


def _layer(
    path_in_file: str,
    path_in_model: str,
    path_in_base: str,
    group: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base: BaseFacts,
) -> peft.PeftLayer:
    """The change of one module. Its paths: in the file, in its part of the pipeline, and in the
    base."""
    if not {"A", "B"} <= set(group):
        raise AdapterError(
            f"half a pair at {path_in_file!r}", "both factors", "get the whole file again"
        )
    shape = base.shapes.get(f"{path_in_base}.weight")
    if base.shapes and shape is None:
        raise AdapterError(
            f"{path_in_file!r}, which this base lacks",
            "one of its modules",
            "give the base that it was made for",
        )
    alpha = scalar(group["alpha"], f"{path_in_file}.alpha") if "alpha" in group else None
    if alpha is None and config:
        rank, _, scale = peft_paths.strength(config, path_in_model)
        alpha = scale * rank
    return layer_of(
        path_in_base, group["A"], group["B"], alpha, shape=shape, magnitude=group.get("magnitude")
    )


def _header_of(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = parse(header.get(HEADER, "{}"))
        if isinstance(config, dict):
            return config
        problem = f"{HEADER} in {path}, a JSON {type(config).__name__}"
    except ValueError as error:
        problem = f"{HEADER} in {path}, which is not JSON ({error})"
    raise AdapterError(problem, "the config of the adapter", "get the file again")


def _config_of(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    """PEFT's fields for one part of a pipeline, checked; empty if the header has none."""
    fields = {
        key.removeprefix(f"{component}."): value
        for key, value in config.items()
        if key.startswith(f"{component}.")
    }
    fields = fields or (dict(config) if component == "model" else {})
    if fields.get("r") is None:
        return {}
    fields = {"peft_type": "LORA", "target_modules": [], "lora_alpha": fields["r"], **fields}
    peft_fields.check_config(fields)
    return fields


def write(adapter: Adapter, path: Path, base: BaseFacts, options: Options) -> list[str]:
    problems = parts.refusals(adapter)
    locations = (
        parts.locate_modules(adapter.changes, options.part, "diffusers") if not problems else {}
    )
    by_part: dict[str, list[LowRankChange]] = {
        component: [] for component in sorted({component for component, _ in locations.values()})
    }
    for change in adapter.changes if by_part else ():
        by_part[locations[change.weight][0]].append(change)
    dora = {
        component: {change.magnitude is not None for change in changes}
        for component, changes in by_part.items()
    }
    problems += [  # PEFT has one flag for all layers
        sentence(
            f"layers of {component} with and without DoRA", "one of both", "convert them apart"
        )
        for component in by_part
        if len(dora[component]) > 1
    ]
    raise_all(AdapterError, "diffusers' format cannot hold this adapter", problems)
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, changes in by_part.items():
        start = "" if component == "model" else f"{component}."
        *pair, magnitude = _suffixes(component, [locations[change.weight][1] for change in changes])
        for change in changes:
            module_path = f"{start}{locations[change.weight][1]}"
            for suffix, tensor in zip(pair, (change.layer.A, change.layer.B), strict=True):
                tensors[f"{module_path}.{suffix}"] = cast(tensor, options.dtype)
            if change.magnitude is not None:
                tensors[f"{module_path}.{magnitude}"] = cast(change.magnitude, options.dtype)
        ranks = {locations[change.weight][1]: change.layer.rank for change in changes}
        alphas = {locations[change.weight][1]: alpha_of(change.layer) for change in changes}
        rank = max(ranks.values(), key=list(ranks.values()).count)
        alpha = max(alphas.values(), key=list(alphas.values()).count)
        fields = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": peft_paths.patterns_for(ranks, rank),
            "alpha_pattern": peft_paths.patterns_for(alphas, alpha),
            "target_modules": sorted(ranks),
            "use_dora": True in dora[component],
            "lora_bias": False,
        }
        config |= {f"{start}{key}": value for key, value in fields.items()}
    save_file(
        tensors,
        path,
        metadata={"format": "pt", HEADER: json.dumps(config, indent=2, sort_keys=True)},
    )
    return []


def _suffixes(component: str, modules: Iterable[str]) -> tuple[str, str, str]:
    """The suffixes of the keys of A, B and the magnitude, for a part with these modules."""
    if not component.startswith("text_encoder"):
        return PAIR[0], PAIR[1], peft.MAGNITUDE
    down, up = PAIR if any(f".{module}".endswith(ATTENTION) for module in modules) else NAMED
    return down, up, f"{peft.MAGNITUDE}.weight"


TITLE = "safetensors of diffusers pipelines"
register(
    Format(
        "diffusers",
        TITLE,
        LACKS,
        ".safetensors",
        recognises,
        parts=True,
        peft=True,
        read=read,
        write=write,
    )
)
