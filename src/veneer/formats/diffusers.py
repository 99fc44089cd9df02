"""The safetensors format of diffusers: keys are dotted paths, and the header holds PEFT's config.

    <component>.<path>.lora_A.weight, .lora_B.weight    A [r, in, *k], B [out, r, *1]
    <component>.<path>.lora_magnitude_vector            DoRA's magnitude
    header "lora_adapter_metadata"                      {"<component>.r": …, …}: PEFT's config for
                                                        each component

A component is a model of a pipeline (``parts.py``); k is the kernel of a convolution. The paths in
a file of a single model do not begin with a component.

Older releases of diffusers wrote ``.lora.down.weight`` and ``.lora.up.weight``,
``.lora_linear_layer.down.weight``, attention processors (``.processor.to_q_lora.down.weight``),
and alphas as tensors (``<component>.<path>.alpha``) or no alpha, which means alpha = r. Veneer
reads all of these layouts and writes the first one.

For text encoders, the writer uses other suffixes in two cases, as diffusers 0.42 requires; other
programs read these suffixes, too. The keys of DoRA's magnitudes end in ``.weight``, because
transformers' loader looks for this name and would otherwise initialise the magnitudes anew. If no
attention projection is among the changes, A and B are named ``lora_linear_layer.down.weight`` and
``lora_linear_layer.up.weight``, by which diffusers recognises the format.

rsLoRA is written as plain LoRA with alpha = scale · r, because many loaders do not know its flag.
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
from veneer.formats._base import (
    LORA_SUFFIXES,
    build_peft_layer,
    cast,
    read_tensors,
    scalar_value,
)
from veneer.formats.kohya import ATTENTION_SUFFIXES, LACKS, plain_lora_alpha

HEADER = "lora_adapter_metadata"
#: suffix of a key -> role of the tensor in its module
_TENSOR_ROLES = {
    "lora_A.weight": "A", "lora.down.weight": "A", "lora_linear_layer.down.weight": "A",
    "lora_B.weight": "B", "lora.up.weight": "B", "lora_linear_layer.up.weight": "B",
    peft.MAGNITUDE: "magnitude", f"{peft.MAGNITUDE}.weight": "magnitude", "alpha": "alpha",
}  # fmt: skip
#: the suffixes of A and B for a text encoder of which no attention projection changes
_ENCODER_SUFFIXES = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")
#: paths of LoRA modules in diffusers' old attention processors -> the projections that they change
_PROCESSORS = {f"processor.{name}_lora": name for name in ("to_q", "to_k", "to_v")} | {
    "processor.to_out_lora": "to_out.0"
}


def recognises(first_bytes: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    factor_suffixes = [suffix for suffix, role in _TENSOR_ROLES.items() if role in ("A", "B")]
    endings = (*factor_suffixes, "_lora.down.weight")
    return any(key.endswith(endings) and not key.startswith(peft.PREFIX) for key in keys)


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    tensors, header = read_tensors(path)
    tensors_by_path: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key, tensor in tensors.items():
        path_in_file, role = _split_key(key)
        if role is None:
            problems.append(
                sentence(f"tensor {key!r}", "a LoRA's factors", "use the library that made it")
            )
        else:
            tensors_by_path.setdefault(path_in_file, {})[role] = tensor
    raise_all(AdapterError, f"{path} cannot be read", problems)
    component_by_path = {path: parts.component_of(path) or "model" for path in tensors_by_path}
    layer_components = component_by_path.values()
    base_prefixes, left_out = parts.choose_components(layer_components, base, options.part)
    config = _header_config(path, header)
    configs = {component: _component_config(config, component) for component in base_prefixes}
    layers: dict[str, peft.PeftLayer] = {}
    for path_in_file, module_tensors in tensors_by_path.items():
        component = component_by_path[path_in_file]
        if component not in base_prefixes:
            continue
        path_in_model = path_in_file if component == "model" else path_in_file.partition(".")[2]
        prefix = base_prefixes[component]
        path_in_component = parts.path_in_base(
            component,
            path_in_model,
            lambda path, prefix=prefix: f"{prefix}{path}.weight" in base.shapes,
        )
        path_in_base = path_in_file if component == "model" else f"{prefix}{path_in_component}"
        try:
            layers[path_in_base] = _read_layer(
                path_in_file,
                path_in_model,
                path_in_base,
                module_tensors,
                configs[component],
                base,
            )
        except AdapterError as error:
            problems.append(str(error))
    raise_all(AdapterError, f"{path} cannot be read", problems)
    return Contents(
        layers,
        base_name=base.name,
        metadata={"header": header} if header else {},
        left_out=left_out,
    )


def _split_key(key: str) -> tuple[str, str | None]:
    """(the path of the module, the tensor's role: "A", "B", "magnitude" or "alpha") of a key; the
    role is None if the key ends in none of the known suffixes."""
    for processor, projection in _PROCESSORS.items():
        key = key.replace(f".{processor}.", f".{projection}.lora.")
    for suffix, role in _TENSOR_ROLES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), role
    return key, None


def _read_layer(
    path_in_file: str,
    path_in_model: str,
    path_in_base: str,
    module_tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base: BaseFacts,
) -> peft.PeftLayer:
    """The change of one module.

    Args:
        path_in_file, path_in_model, path_in_base: the module's path in the file, in its model of
            the pipeline, and in the base.
        module_tensors: the module's tensors by role ("A", "B", "magnitude", "alpha").
        config: PEFT's fields for this model of the pipeline; empty if the header has none.
    """
    if not {"A", "B"} <= set(module_tensors):
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
    alpha = (
        scalar_value(module_tensors["alpha"], f"{path_in_file}.alpha")
        if "alpha" in module_tensors
        else None
    )
    if alpha is None and config:
        rank, _, scale = peft_paths.rank_alpha_scale(config, path_in_model)
        alpha = scale * rank
    return build_peft_layer(
        path_in_base,
        module_tensors["A"],
        module_tensors["B"],
        alpha,
        shape=shape,
        magnitude=module_tensors.get("magnitude"),
    )


def _header_config(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's config for all components, from the header of a file; empty if the header has none.
    ``AdapterError``: it is no JSON object."""
    try:
        config = parse(header.get(HEADER, "{}"))
        if isinstance(config, dict):
            return config
        problem = f"{HEADER} in {path}, a JSON {type(config).__name__}"
    except ValueError as error:
        problem = f"{HEADER} in {path}, which is not JSON ({error})"
    raise AdapterError(problem, "the config of the adapter", "get the file again")


def _component_config(config: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The fields of PEFT's config for a pipeline component; empty if the header has none.
    ``AdapterError``: a field is invalid, or Veneer does not support it."""
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
    problems = parts.refusal_reasons(adapter)
    locations = (
        parts.locate_modules(adapter.changes, options.part, "diffusers") if not problems else {}
    )
    changes_by_component: dict[str, list[LowRankChange]] = {
        component: [] for component in sorted({component for component, _ in locations.values()})
    }
    for change in adapter.changes if changes_by_component else ():
        changes_by_component[locations[change.weight][0]].append(change)
    dora_flags = {
        component: {change.magnitude is not None for change in changes}
        for component, changes in changes_by_component.items()
    }
    problems += [  # PEFT's config has one ``use_dora`` for all layers of a component
        sentence(
            f"layers of {component} with and without DoRA", "one of both", "convert them apart"
        )
        for component in changes_by_component
        if len(dora_flags[component]) > 1
    ]
    raise_all(AdapterError, "diffusers' format cannot hold this adapter", problems)
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for component, changes in changes_by_component.items():
        prefix = "" if component == "model" else f"{component}."
        modules = [locations[change.weight][1] for change in changes]
        *suffixes, magnitude_suffix = _suffixes(component, modules)
        for change in changes:
            module_path = f"{prefix}{locations[change.weight][1]}"
            for suffix, tensor in zip(suffixes, (change.layer.A, change.layer.B), strict=True):
                tensors[f"{module_path}.{suffix}"] = cast(tensor, options.dtype)
            if change.magnitude is not None:
                tensors[f"{module_path}.{magnitude_suffix}"] = cast(change.magnitude, options.dtype)
        ranks = {locations[change.weight][1]: change.layer.rank for change in changes}
        alphas = {locations[change.weight][1]: plain_lora_alpha(change.layer) for change in changes}
        common_rank = max(ranks.values(), key=list(ranks.values()).count)
        common_alpha = max(alphas.values(), key=list(alphas.values()).count)
        fields = {
            "r": common_rank,
            "lora_alpha": common_alpha,
            "rank_pattern": peft_paths.patterns_for(ranks, common_rank),
            "alpha_pattern": peft_paths.patterns_for(alphas, common_alpha),
            "target_modules": sorted(ranks),
            "use_dora": True in dora_flags[component],
            "lora_bias": False,
        }
        config |= {f"{prefix}{key}": value for key, value in fields.items()}
    save_file(
        tensors,
        path,
        metadata={"format": "pt", HEADER: json.dumps(config, indent=2, sort_keys=True)},
    )
    return []


def _suffixes(component: str, modules: Iterable[str]) -> tuple[str, str, str]:
    """The suffixes of the keys of A, B and DoRA's magnitude for a pipeline component. ``modules``:
    the paths of its changed modules, on which the suffixes for a text encoder depend."""
    if not component.startswith("text_encoder"):
        return LORA_SUFFIXES[0], LORA_SUFFIXES[1], peft.MAGNITUDE
    has_attention = any(f".{module}".endswith(ATTENTION_SUFFIXES) for module in modules)
    A_suffix, B_suffix = LORA_SUFFIXES if has_attention else _ENCODER_SUFFIXES
    return A_suffix, B_suffix, f"{peft.MAGNITUDE}.weight"


register(
    Format(
        "diffusers",
        "safetensors of diffusers pipelines",
        LACKS,
        ".safetensors",
        recognises,
        parts=True,
        peft=True,
        read=read,
        write=write,
    )
)
