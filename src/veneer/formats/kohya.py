"""kohya's safetensors format, which sd-scripts, ComfyUI and A1111 use: keys with flattened module
paths, and the LoHa and LoKr of LyCORIS.

    lora_unet_<path, each dot as _>.lora_down.weight    A [r, in, *k]
    lora_unet_….lora_up.weight                          B [out, r, *1]
    lora_unet_….alpha                                   scale = alpha / r; no alpha, or 0: scale 1
    lora_unet_….lora_mid.weight                         M [r, r, *k]: the change is B M A, which is
                                                        the LoRA of B and M A
    lora_unet_….dora_scale                              DoRA's magnitude [out, 1, …]
    lora_unet_….hada_w1_a, _w1_b, _w2_a, _w2_b          LoHa: ΔW = (w1_a w1_b) ⊙ (w2_a w2_b)
    lora_unet_….lokr_w1 or _w1_a, _w1_b; _w2 …          LoKr: ΔW = w1 ⊗ w2 (Kronecker product)

r is the rank and k the kernel of a convolution.

A flattened path is ambiguous: ``a_b_c`` may be a.b_c or a_b.c. The reader therefore compares it
with the base's paths, of which exactly one must match. Rejected: tables of known names, as in other
converters. A layer that is not in the table would be lost or, worse, taken for another layer. LoHa
and LoKr are read as the low-rank products that equal them (see ``variants/loha.py`` and
``lokr.py``). Tucker cores (hada_t1, lokr_t2) do not give a product of low rank, and are refused.

**DiT models.** sd-scripts trains Flux and SD3 under the block names of the original models, in
which q, k and v are one weight. For both models ComfyUI also reads OneTrainer's keys,
``lora_transformer_<path in diffusers>``. Veneer writes these keys, with a warning that sd-scripts
does not read them. For PixArt and all other transformers ComfyUI reads diffusers' own format only,
so that Veneer refuses to write them as kohya's.

The layout is taken from the sources of sd-scripts, LyCORIS 3 and 4, and diffusers. The tests load
written files with diffusers.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from veneer.errors import AdapterError, first_line, listing, nearest, raise_all, sentence
from veneer.formats import (
    Adapter,
    BaseFacts,
    Contents,
    Format,
    LowRankChange,
    MisreadElsewhere,
    Options,
    register,
)
from veneer.formats._base import build_peft_layer, cast, exact_scalar, read_tensors
from veneer.formats.lycoris import LOHA_SUFFIXES, LOKR_SUFFIXES, LORA_SUFFIXES, read_factors
from veneer.formats.parts import (
    choose_components,
    locate_modules,
    path_before_transformers_5,
    refusal_reasons,
)
from veneer.formats.peft import PeftLayer

#: the release of diffusers whose loader of kohya's files ``_omissions_of_diffusers`` describes
DIFFUSERS_VERSION = "0.42"
#: the suffixes of the paths of a text encoder's attention projections
ATTENTION_SUFFIXES = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
#: prefix of a key -> the pipeline components that it may mean, the more likely one first
PREFIXES = {
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lycoris": ("model",),
}
#: all suffixes of tensors that the reader supports
_READABLE_SUFFIXES = (
    LORA_SUFFIXES | LOHA_SUFFIXES | LOKR_SUFFIXES | {"alpha", "dora_scale", "lora_mid.weight"}
)
#: the suffixes of Tucker cores, which the reader refuses
_TUCKER_SUFFIXES = {"hada_t1", "hada_t2", "lokr_t1", "lokr_t2"}
#: the names of blocks in the original releases of SDXL and of Flux, which sd-scripts uses
_OLD_BLOCKS = ("input_blocks", "middle_block", "output_blocks", "double_blocks", "single_blocks")
#: matches the paths, in diffusers, of the modules of SD3 and Flux that ComfyUI reads by these paths
_SD3_OR_FLUX_MODULE = re.compile(
    r"(transformer_blocks|single_transformer_blocks)\.\d+\."
    r"(attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|norm1?(_context)?\.linear"
    r"|ff(_context)?\.net\.(0\.proj|2)"
    r"|proj_mlp|proj_out)|context_embedder|x_embedder|pos_embed\.proj|proj_out|norm_out\.linear"
    r"|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
)
#: matches the paths of the modules of Flux whose tensors diffusers reads from kohya's files
_DIFFUSERS_FLUX_MODULE = re.compile(
    r".*\.attn\..*|context_embedder|x_embedder|proj_out|norm_out\.linear|time_text_embed\..*"
)


def recognises(first_bytes: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    suffixes = LORA_SUFFIXES | LOHA_SUFFIXES | LOKR_SUFFIXES | _TUCKER_SUFFIXES
    return any(key.partition(".")[2] in suffixes and _prefix_of(key) for key in keys)


def _prefix_of(name: str) -> str | None:
    """The prefix of ``PREFIXES`` that a name begins with; None if it begins with none."""
    return next((prefix for prefix in PREFIXES if name.startswith(f"{prefix}_")), None)


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    tensors, header = read_tensors(path)
    tensors_by_module: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module_name, _, suffix = key.partition(".")
        tensors_by_module.setdefault(module_name, {})[suffix] = tensor
    if not base.shapes:
        problem = f"{path}, whose names have _ for every dot"
        raise AdapterError(
            problem, "a base to tell what they mean", "give the base that it was made for"
        )
    top_level_names = {weight.partition(".")[0] for weight in base.shapes}
    component_by_prefix = {
        prefix: next(
            (candidate for candidate in components if candidate in top_level_names), components[0]
        )
        for prefix, components in PREFIXES.items()
    }
    component_by_module = {
        module_name: component_by_prefix.get(_prefix_of(module_name) or "", "")
        for module_name in tensors_by_module
    }
    expected = f"names that begin with {listing(PREFIXES)}"
    problems = [
        sentence(repr(module_name), expected, "check the file")
        for module_name, component in component_by_module.items()
        if not component
    ]
    raise_all(AdapterError, f"{path} cannot be read", problems)
    base_prefixes, left_out = choose_components(component_by_module.values(), base, options.part)
    modules_by_component = {
        component: _modules_by_flat_name(base, component, prefix)
        for component, prefix in base_prefixes.items()
    }
    layers: dict[str, PeftLayer] = {}
    for module_name, module_tensors in tensors_by_module.items():
        if component_by_module[module_name] in base_prefixes:
            try:
                module_path = _find_module(
                    module_name, modules_by_component[component_by_module[module_name]]
                )
                layers[module_path] = _read_layer(
                    module_name, module_path, module_tensors, base.shapes[f"{module_path}.weight"]
                )
            except AdapterError as error:
                problems.append(str(error))
    raise_all(AdapterError, f"{path} cannot be read", problems)
    metadata = {"header": header} if header else {}
    return Contents(layers, base_name=base.name, metadata=metadata, left_out=left_out)


def _modules_by_flat_name(base: BaseFacts, component: str, prefix: str) -> dict[str, list[str]]:
    """The paths of the modules of a pipeline component, by flattened path. Several modules may have
    the same one. ``prefix``: the prefix of the component's paths in the base."""
    paths_by_flat_name: dict[str, list[str]] = {}
    for weight_name, shape in base.shapes.items():
        if weight_name.startswith(prefix) and weight_name.endswith(".weight") and len(shape) > 1:
            module = weight_name.removesuffix(".weight")
            path = module.removeprefix(prefix)
            for known_path in {path, path_before_transformers_5(component, path)}:
                paths_by_flat_name.setdefault(known_path.replace(".", "_"), []).append(module)
    return paths_by_flat_name


def _find_module(module_name: str, paths_by_flat_name: Mapping[str, list[str]]) -> str:
    """The path of the only module with the flattened name ``module_name``, which begins with one of
    ``PREFIXES``. The keys of ``paths_by_flat_name`` have no prefix. ``AdapterError``: no module has
    this name, or several have it."""
    flat_name = module_name.removeprefix(f"{_prefix_of(module_name)}_")
    matching_paths = paths_by_flat_name.get(flat_name, [])
    if len(matching_paths) > 1:
        problem = f"{module_name!r}, which may mean {listing(matching_paths)}"
        raise AdapterError(problem, "one module", "rename one of them")
    if not matching_paths:
        advice = "give the base that it was made for"
        if any(block in flat_name for block in _OLD_BLOCKS):
            advice += (
                ": these are block names of the model as first published, not those of diffusers"
            )
        problem = f"{module_name!r}, which this base lacks{nearest(flat_name, paths_by_flat_name)}"
        raise AdapterError(problem, "one of its modules", advice)
    return matching_paths[0]


def _read_layer(
    module_name: str, module_path: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]
) -> PeftLayer:
    suffixes, magnitude = set(tensors), tensors.get("dora_scale")
    if suffixes & _TUCKER_SUFFIXES:
        problem = (
            f"{listing(sorted(suffixes & _TUCKER_SUFFIXES))} at {module_name!r}, a Tucker core"
        )
        raise AdapterError(
            problem, "factors whose product is short", "merge it with LyCORIS, and extract"
        )
    if suffixes - _READABLE_SUFFIXES:
        problem = f"{listing(sorted(suffixes - _READABLE_SUFFIXES))} at {module_name!r}"
        raise AdapterError(problem, "a LoRA, LoHa or LoKr", "merge it with the tool that made it")
    try:
        factors = read_factors(tensors, shape)
        if factors is None:
            problem = f"only {listing(sorted(suffixes))} at {module_name!r}"
            raise AdapterError(problem, "all factors", "get the whole file")
        if magnitude is not None and not magnitude.numel() == shape[0] == magnitude.shape[0]:
            raise AdapterError(
                f"dora_scale {tuple(magnitude.shape)} at {module_name!r}, which rescales inputs",
                f"one number for each of {shape[0]} outputs",
                "merge it with LyCORIS (wd_on_output was off)",
            )
        return build_peft_layer(module_path, *factors, shape=shape, magnitude=magnitude)
    except AdapterError:
        raise
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise AdapterError(
            f"factors at {module_name!r} that do not fit each other ({first_line(error)})",
            "those of one change",
            "get the whole file again",
        ) from error


def write(adapter: Adapter, path: Path, base: BaseFacts, options: Options) -> list[str]:
    raise_all(AdapterError, "kohya's format cannot hold this adapter", refusal_reasons(adapter))
    locations = locate_modules(adapter.changes, options.part, "kohya")
    if unknown_modules := _modules_unlike_sd3_or_flux(locations, base):
        raise AdapterError(
            f"a transformer with {listing(unknown_modules, 3)}, which is neither SD3 nor Flux",
            "a model of which ComfyUI or sd-scripts reads kohya's names",
            'convert to "diffusers", whose names ComfyUI reads too',
        )
    components = {component for component, _ in locations.values()}
    components |= {name.partition(".")[0] for name in base.shapes}
    prefixes = {
        **{component: prefix for prefix, (component, *_) in PREFIXES.items()},
        "text_encoder": "lora_te1" if "text_encoder_2" in components else "lora_te",
    }
    file_locations = {
        weight: (component, path_before_transformers_5(component, module))
        for weight, (component, module) in locations.items()
    }
    flat_names = {
        weight: f"{prefixes[component]}_{module.replace('.', '_')}"
        for weight, (component, module) in file_locations.items()
    }
    name_counts = Counter(flat_names.values())
    ambiguous_names = sorted(name for name, count in name_counts.items() if count > 1)
    if ambiguous_names:
        problem = f"modules that have one name with _ for . ({listing(ambiguous_names, 3)})"
        raise AdapterError(problem, "names that differ", "use the diffusers format")
    tensors: dict[str, Tensor] = {}
    for change in adapter.changes:
        key, layer = flat_names[change.weight], change.layer
        tensors[f"{key}.lora_down.weight"] = cast(layer.A, options.dtype)
        alpha = plain_lora_alpha(layer)
        # readers take alpha 0 for a file without alpha
        tensors[f"{key}.lora_up.weight"] = cast(layer.B if alpha else 0 * layer.B, options.dtype)
        tensors[f"{key}.alpha"] = exact_scalar(alpha or 1.0)
        if change.magnitude is not None:
            ones = [1] * (layer.A.dim() - 1)
            tensors[f"{key}.dora_scale"] = cast(change.magnitude.reshape(-1, *ones), options.dtype)
    save_file(tensors, path, metadata=_header(adapter))
    if any(component == "transformer" for component, _ in locations.values()):
        problem = "a kohya file of SD3 or Flux, in the names that ComfyUI reads"
        expected = "ComfyUI: sd-scripts fuses q, k and v, and reads only names of its own"
        warnings.warn(
            sentence(problem, expected, "go on training with Veneer, not with sd-scripts"),
            MisreadElsewhere,
            stacklevel=3,
        )
    for omission in _omissions_of_diffusers(adapter.changes, locations, base):
        reader = f"diffusers (as of {DIFFUSERS_VERSION})"
        problem = f"a kohya file of which {reader} leaves out {omission}, so its outputs differ"
        expected = "a reader of all of it, such as LyCORIS or ComfyUI"
        advice = 'for diffusers, convert to "diffusers", which it reads right, or merge'
        warnings.warn(sentence(problem, expected, advice), MisreadElsewhere, stacklevel=3)
    return []


def _modules_unlike_sd3_or_flux(
    locations: Mapping[str, tuple[str, str]], base: BaseFacts
) -> list[str]:
    """The modules of the pipeline's transformer that neither SD3 nor Flux has; empty if the adapter
    does not change the transformer. ``locations``: (component, path in it) by changed weight."""
    weights_by_module = {
        module: weight_name
        for weight_name, (component, module) in locations.items()
        if component == "transformer"
    }
    if not weights_by_module:
        return []
    prefix = next(
        weight_name.removesuffix(f"{module}.weight")
        for module, weight_name in weights_by_module.items()
    )
    matrix_names = (
        name for name, shape in base.shapes.items() if name.startswith(prefix) and len(shape) > 1
    )
    modules = {
        name.removeprefix(prefix).removesuffix(".weight")
        for name in matrix_names
        if name.endswith(".weight")
    }
    return sorted(
        module
        for module in modules | weights_by_module.keys()
        if not _SD3_OR_FLUX_MODULE.fullmatch(module)
    )


def _omissions_of_diffusers(
    changes: Sequence[LowRankChange], locations: Mapping[str, tuple[str, str]], base: BaseFacts
) -> Iterator[str]:
    """One text for each part of a kohya file that diffusers' converter drops or changes when it
    loads a pipeline. The converter uses a single alpha for the attention of a model: the alpha that
    most layers have. It reads the alpha of a text encoder from an out-projection, and drops the
    encoder's attention if no out-projection changes. ``locations``: (component, path in the
    component) by changed weight."""
    transformer_modules = [
        module for component, module in locations.values() if component == "transformer"
    ]
    if any("single_transformer_blocks." in name for name in (*base.shapes, *locations)):
        if unread_modules := [
            module for module in transformer_modules if not _DIFFUSERS_FLUX_MODULE.fullmatch(module)
        ]:
            yield (
                f"or refuses, or takes for others, {len(unread_modules)} layers of Flux outside of"
                " attention"
            )
    elif transformer_modules:
        yield "the transformer (it reads such names of Flux alone)"
    if any(change.magnitude is not None for change in changes):
        yield "the magnitudes of DoRA (dora_scale)"
    alphas: dict[str, set[float]] = {}
    for change in changes:
        alphas.setdefault(locations[change.weight][0], set()).add(plain_lora_alpha(change.layer))
    projections = (".to_q", ".to_k", ".to_v", ".to_out.0", *ATTENTION_SUFFIXES)
    attention_modules = {
        (component, module)
        for component, module in locations.values()
        if f".{module}".endswith(projections)
    }
    if any(
        len(alphas[component]) > 1
        for component, _ in attention_modules
        if component != "transformer"
    ):
        yield "the alphas of attention's projections, which are not those of all layers here"
    encoders = {
        component for component, _ in attention_modules if component.startswith("text_encoder")
    }
    if encoders - {
        component for component, module in attention_modules if module.endswith(".out_proj")
    }:
        yield "the attention of a text encoder"


def plain_lora_alpha(layer: PeftLayer) -> float:
    """The alpha with which plain LoRA, scale = alpha / rank, has the scale of this layer, such as
    an rsLoRA with scale = alpha / √rank. If the layer's own alpha has this property, it is returned
    unchanged, which avoids rounding."""
    return layer.alpha if layer.alpha / layer.rank == layer.scale else layer.scale * layer.rank


def _header(adapter: Adapter) -> dict[str, str]:
    """The header that kohya's tools read: the rank, the alpha and the method, and the fields of the
    kohya file that the adapter was read from, if there was one."""
    provenance = adapter.metadata.get("provenance", {})
    header = provenance.get("header") if provenance.get("converted from") == "kohya" else None
    source_fields = header.items() if isinstance(header, Mapping) else ()
    ranks = {change.layer.rank for change in adapter.changes}
    alphas = {plain_lora_alpha(change.layer) for change in adapter.changes}
    is_dora = any(change.magnitude is not None for change in adapter.changes)
    return {
        "ss_network_module": "lycoris.kohya" if is_dora else "networks.lora",
        "ss_base_model_version": str((adapter.metadata.get("base") or {}).get("name") or "unknown"),
        **{key: value for key, value in source_fields if isinstance(value, str)},
        "format": "pt",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


LACKS = (
    "embeddings, attention's in-projection, grouped convolutions, parameters, Conv1D, full training"
)
register(
    Format(
        "kohya",
        "safetensors of sd-scripts, ComfyUI and LyCORIS",
        LACKS,
        ".safetensors",
        recognises,
        parts=True,
        read=read,
        write=write,
    )
)
