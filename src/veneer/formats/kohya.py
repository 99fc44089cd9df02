"""kohya's safetensors (sd-scripts, ComfyUI, A1111), with LyCORIS' LoHa and LoKr.

    lora_unet_<path with _ for .>.lora_down.weight    A [r, in, *k]
    lora_unet_….lora_up.weight                        B [out, r, *1]
    lora_unet_….alpha                                 scale = alpha / r; without it, or with 0, 1
    lora_unet_….lora_mid.weight                       M [r, r, *k]: the change is B M A, that is B
                                                      (M A), exactly a LoRA
    lora_unet_….dora_scale                            DoRA's magnitude [out, 1, …]
    lora_unet_….hada_w1_a, _w1_b, _w2_a, _w2_b        (w1_a w1_b) ⊙ (w2_a w2_b)
    lora_unet_….lokr_w1 or _w1_a, _w1_b; _w2 …        w1 ⊗ w2

A flattened path is ambiguous: ``a_b_c`` may be a.b_c or a_b.c. Reading therefore compares it with
the base's paths, of which exactly one must match. Rejected: tables of known names, as in other
converters. A name that is not in the table would be lost or, worse, taken for another layer. LoHa
and LoKr are read as the product to which they are equal (see ``variants/loha.py`` and ``lokr.py``).
Tucker cores (hada_t1, lokr_t2) have no product of low rank, and are refused.

**DiT models.** sd-scripts trains Flux and SD3 under the block names of the original models, in
which
q, k and v are one weight. ComfyUI also reads OneTrainer's names for both models,
``lora_transformer_<path in diffusers>``. These are written, with a warning that sd-scripts does not
read them. For PixArt and all other transformers, ComfyUI reads diffusers' own format only, so they
are refused here.

Read from the sources of sd-scripts, LyCORIS 3 and 4, and diffusers. The tests load the files with
diffusers.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from veneer.errors import AdapterError, listing, nearest, raise_all, sentence
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
from veneer.formats._base import cast, exact_scalar, layer_of, read_tensors, scalar
from veneer.formats.parts import choose_parts, locate_modules, path_before, refusals
from veneer.formats.peft import PeftLayer
from veneer.lowrank import LowRank

#: the release of diffusers whose loader of these files was examined
DIFFUSERS_KNOWN = "0.42"
#: the projections of a text encoder's attention
ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
#: the parts that a prefix may mean, the more likely one first
PREFIXES = {
    "lora_unet": ("unet", "transformer"),
    "lora_transformer": ("transformer",),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
    "lycoris": ("model",),
}
_LORA = {"lora_down.weight", "lora_up.weight"}
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_LOKR = {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
_KNOWN = _LORA | _HADA | _LOKR | {"alpha", "dora_scale", "lora_mid.weight"}
_TUCKER = {"hada_t1", "hada_t2", "lokr_t1", "lokr_t2"}
#: block names of the original models, under which kohya trains SDXL and Flux
_ORIGINAL = ("input_blocks", "middle_block", "output_blocks", "double_blocks", "single_blocks")


#: the paths of SD3 and Flux that ComfyUI knows by diffusers' names
_MMDIT = re.compile(
    r"(transformer_blocks|single_transformer_blocks)\.\d+\."
    r"(attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|norm1?(_context)?\.linear"
    r"|ff(_context)?\.net\.(0\.proj|2)"
    r"|proj_mlp|proj_out)|context_embedder|x_embedder|pos_embed\.proj|proj_out|norm_out\.linear"
    r"|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
)
#: the subset that diffusers reads for Flux
_FLUX_KNOWN = re.compile(
    r".*\.attn\..*|context_embedder|x_embedder|proj_out|norm_out\.linear|time_text_embed\..*"
)


def recognises(start: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    marks = _LORA | _HADA | _LOKR | _TUCKER
    return any(key.partition(".")[2] in marks and _prefix(key) for key in keys)


def _prefix(name: str) -> str | None:
    return next((prefix for prefix in PREFIXES if name.startswith(f"{prefix}_")), None)


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    tensors, header = read_tensors(path)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        groups.setdefault(name, {})[suffix] = tensor
    if not base.shapes:
        problem = f"{path}, whose names have _ for every dot"
        raise AdapterError(
            problem, "a base to tell what they mean", "give the base that it was made for"
        )
    top_level_names = {name.partition(".")[0] for name in base.shapes}
    part_by_prefix = {
        prefix: next((p for p in means if p in top_level_names), means[0])
        for prefix, means in PREFIXES.items()
    }
    part_by_name = {name: part_by_prefix.get(_prefix(name) or "", "") for name in groups}
    begin = f"names that begin with {listing(PREFIXES)}"
    problems = [
        sentence(repr(name), begin, "check the file")
        for name, part_name in part_by_name.items()
        if not part_name
    ]
    raise_all(AdapterError, f"{path} cannot be read", problems)
    before, left_out = choose_parts(part_by_name.values(), base, options.part)
    names = {part_name: _flattened(base, part_name, start) for part_name, start in before.items()}
    low: dict[str, PeftLayer] = {}
    for name, group in groups.items():
        if part_by_name[name] in before:
            try:
                module_path = _module(name, names[part_by_name[name]])
                low[module_path] = _layer(
                    name, module_path, group, base.shapes[f"{module_path}.weight"]
                )
            except AdapterError as error:
                problems.append(str(error))
    raise_all(AdapterError, f"{path} cannot be read", problems)
    return Contents(
        low, base_name=base.name, about={"header": header} if header else {}, left_out=left_out
    )


def _flattened(base: BaseFacts, part_name: str, start: str) -> dict[str, list[str]]:
    """By flattened name, the modules of a part that it may mean. ``start``: the prefix of their
    paths."""
    names: dict[str, list[str]] = {}
    for weight, shape in base.shapes.items():
        if weight.startswith(start) and weight.endswith(".weight") and len(shape) > 1:
            module = weight.removesuffix(".weight")
            inside = module.removeprefix(start)
            for path in {inside, path_before(part_name, inside)}:
                names.setdefault(path.replace(".", "_"), []).append(module)
    return names


def _module(name: str, names: Mapping[str, list[str]]) -> str:
    flat = name.removeprefix(f"{_prefix(name)}_")
    matches = names.get(flat, [])
    if len(matches) > 1:
        raise AdapterError(
            f"{name!r}, which may mean {listing(matches)}", "one module", "rename one of them"
        )
    if not matches:
        do = "give the base that it was made for"
        if any(mark in flat for mark in _ORIGINAL):
            do += ": these are block names of the model as first published, not those of diffusers"
        raise AdapterError(
            f"{name!r}, which this base lacks{nearest(flat, names)}", "one of its modules", do
        )
    return matches[0]


def _layer(
    name: str, module_path: str, group: dict[str, Tensor], shape: tuple[int, ...]
) -> PeftLayer:
    keys, magnitude = set(group), group.get("dora_scale")
    if keys & _TUCKER:
        problem = f"{listing(sorted(keys & _TUCKER))} at {name!r}, a Tucker core"
        raise AdapterError(
            problem, "factors whose product is short", "merge it with LyCORIS, and extract"
        )
    if keys - _KNOWN:
        problem = f"{listing(sorted(keys - _KNOWN))} at {name!r}"
        raise AdapterError(problem, "a LoRA, LoHa or LoKr", "merge it with the tool that made it")
    try:
        low = _low(group)
        if low is None:
            raise AdapterError(
                f"only {listing(sorted(keys))} at {name!r}", "all factors", "get the whole file"
            )
        if magnitude is not None and not magnitude.numel() == shape[0] == magnitude.shape[0]:
            problem = (  # a method other than LoRA, LoHa and LoKr
                f"dora_scale {tuple(magnitude.shape)} at {name!r}, which rescales inputs"
            )
            do = "merge it with LyCORIS (wd_on_output was off)"
            raise AdapterError(problem, f"one number for each of {shape[0]} outputs", do)
        return layer_of(module_path, *low, shape=shape, magnitude=magnitude)
    except AdapterError:
        raise
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        problem = f"factors at {name!r} that do not fit each other ({str(error).splitlines()[0]})"
        raise AdapterError(problem, "those of one change", "get the whole file again") from error


def _low(group: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float | None] | None:
    """(A, B, alpha) of one change, or None if a factor is missing."""
    keys = set(group)
    alpha = scalar(group["alpha"], "alpha") if "alpha" in group else None
    alpha = alpha or None  # sd-scripts and LyCORIS treat 0 as no alpha
    if keys >= _LORA:
        A, B = group["lora_down.weight"], group["lora_up.weight"]
        if (
            mid := group.get("lora_mid.weight")
        ) is not None:  # M A, with a pointwise A [r, in, 1…], has the shape of A [r, in, *k]
            wide = torch.promote_types(A.dtype, torch.float32)
            A = torch.einsum(
                "mn...,ni->mi...", mid.double(), A.reshape(A.shape[0], -1).double()
            ).to(wide)
        return A, B, alpha
    if keys >= _HADA:
        return _hada(group, alpha)
    return _lokr(group, alpha)


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Convert to at least float32, in which a product of two 16-bit numbers is exact."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


def _hada(group: Mapping[str, Tensor], alpha: float | None) -> tuple[Tensor, Tensor, float]:
    rank = group["hada_w1_b"].shape[0]
    w1_a, w1_b, w2_a, w2_b = (
        factor[None] for factor in _wide(*(group[name] for name in sorted(_HADA)))
    )
    A = (w1_b[:, :, None, :] * w2_b[:, None, :, :]).flatten(1, 2)  # [1, r·r, in·k]
    B = (w1_a[:, :, :, None] * w2_a[:, :, None, :]).flatten(2, 3)  # [1, out, r·r]
    return _limit_rank(LowRank(A, B, 1.0 if alpha is None else alpha / rank))


def _lokr(group: Mapping[str, Tensor], alpha: float | None) -> tuple[Tensor, Tensor, float] | None:
    """w1 [l, m] ⊗ w2 [k, n, …] = (w1 ⊗ w2_a) (I ⊗ w2_b) = (I ⊗ w2_a) (w1 ⊗ w2_b); the product of
    lower rank is used."""
    pairs = [({f"lokr_{w}"}, {f"lokr_{w}_a", f"lokr_{w}_b"}) for w in ("w1", "w2")]
    if not all(full_key <= set(group) or both <= set(group) for full_key, both in pairs):
        return None
    rank = next((group[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in group), None)
    # LyCORIS does not scale if neither factor is decomposed
    scale = 1.0 if rank is None or alpha is None else alpha / rank
    if "lokr_w1" in group:
        (w1,) = _wide(group["lokr_w1"])
    else:
        a, b = _wide(group["lokr_w1_a"], group["lokr_w1_b"])
        w1 = (a.double() @ b.double()).to(a.dtype)
    if "lokr_w2" in group:
        (w2,) = _wide(group["lokr_w2"])
        w2_a, w2_b = torch.eye(w2.shape[0], dtype=w2.dtype), w2  # [k, k], [k, n, …]
    else:
        w2_a, w2_b = _wide(group["lokr_w2_a"], group["lokr_w2_b"])
    (l, m), q = w1.shape, w2_a.shape[1]  # noqa: E741
    flat = w2_b.reshape(q, -1)  # [q, n·|k|]; w1's inputs vary slower than n and the kernel
    eye = torch.eye(min(l, m), dtype=w1.dtype)
    left_factor, right_factor = (w1, eye) if m <= l else (eye, w1)
    return _limit_rank(
        LowRank(torch.kron(right_factor, flat)[None], torch.kron(left_factor, w2_a)[None], scale)
    )


def _limit_rank(low: LowRank) -> tuple[Tensor, Tensor, float]:
    """(A, B, alpha) with a rank of at most min(out, in). If the factors have more, ΔW itself
    (computed in float64) replaces one of them and the identity the other."""
    out, in_ = low.B.shape[1], low.A.shape[2]
    if low.rank > min(out, in_):
        delta = (low.B.double() @ low.A.double()).to(
            torch.promote_types(low.A.dtype, torch.float32)
        )
        eye = torch.eye(min(out, in_), dtype=delta.dtype)[None]
        low = LowRank(eye, delta, low.scale) if in_ <= out else LowRank(delta, eye, low.scale)
    return low.A[0], low.B[0], low.scale * low.rank


def write(adapter: Adapter, path: Path, base: BaseFacts, options: Options) -> list[str]:
    raise_all(AdapterError, "kohya's format cannot hold this adapter", refusals(adapter))
    locations = locate_modules(adapter.changes, options.part, "kohya")
    if strange := _outside_of_mmdit(locations, base):
        problem = f"a transformer with {listing(strange, 3)}, which is neither SD3 nor Flux"
        expected = "a model of which ComfyUI or sd-scripts reads kohya's names"
        raise AdapterError(
            problem, expected, 'convert to "diffusers", whose names ComfyUI reads too'
        )
    encoders = (
        "lora_te1"
        if any(part_name == "text_encoder_2" for part_name, _ in locations.values())
        else "lora_te"
    )
    prefixes = {names[0]: prefix for prefix, names in PREFIXES.items()}
    prefixes |= {"text_encoder": encoders}
    named = {
        weight: (part_name, path_before(part_name, module))
        for weight, (part_name, module) in locations.items()
    }
    flat = {
        weight: f"{prefixes[part_name]}_{module.replace('.', '_')}"
        for weight, (part_name, module) in named.items()
    }
    twice = sorted(key for key, count in Counter(flat.values()).items() if count > 1)
    if twice:
        problem = f"modules that have one name with _ for . ({listing(twice, 3)})"
        raise AdapterError(problem, "names that differ", "use the diffusers format")
    tensors: dict[str, Tensor] = {}
    for change in adapter.changes:
        key, layer = flat[change.weight], change.layer
        tensors[f"{key}.lora_down.weight"] = cast(layer.A, options.dtype)
        tensors[f"{key}.lora_up.weight"] = cast(layer.B, options.dtype)
        tensors[f"{key}.alpha"] = exact_scalar(alpha_of(layer))
        if change.magnitude is not None:
            ones = [1] * (layer.A.dim() - 1)
            tensors[f"{key}.dora_scale"] = cast(change.magnitude.reshape(-1, *ones), options.dtype)
    save_file(tensors, path, metadata=_header(adapter))
    if any(part_name == "transformer" for part_name, _ in locations.values()):
        problem = "a kohya file of SD3 or Flux, in the names that ComfyUI reads"
        expected = "ComfyUI: sd-scripts fuses q, k and v, and reads only names of its own"
        warnings.warn(
            sentence(problem, expected, "go on training with Veneer, not with sd-scripts"),
            MisreadElsewhere,
            stacklevel=3,
        )
    for loss in _lost_in_diffusers(adapter.changes, locations, base):
        reader = f"diffusers (as of {DIFFUSERS_KNOWN})"
        problem = f"a kohya file of which {reader} leaves out {loss}, so that its outputs differ"
        expected = "a reader of all of it, such as LyCORIS or ComfyUI"
        do = 'for diffusers, convert to "diffusers", which it reads right, or merge'
        warnings.warn(sentence(problem, expected, do), MisreadElsewhere, stacklevel=3)
    return []


def _outside_of_mmdit(locations: Mapping[str, tuple[str, str]], base: BaseFacts) -> list[str]:
    """The modules of a transformer, changed ones and the base's, that neither SD3 nor Flux has."""
    changed = {
        module: weight
        for weight, (part_name, module) in locations.items()
        if part_name == "transformer"
    }
    if not changed:
        return []
    start = next(weight.removesuffix(f"{module}.weight") for module, weight in changed.items())
    matrix_names = (
        name for name, shape in base.shapes.items() if name.startswith(start) and len(shape) > 1
    )
    modules = {
        name.removeprefix(start).removesuffix(".weight")
        for name in matrix_names
        if name.endswith(".weight")
    }
    return sorted(module for module in modules | changed.keys() if not _MMDIT.fullmatch(module))


def _lost_in_diffusers(
    changes: Sequence[LowRankChange], locations: Mapping[str, tuple[str, str]], base: BaseFacts
) -> Iterator[str]:
    """Parts of a kohya file that diffusers' converter drops when a pipeline loads it. It uses one
    alpha for the attention of a model, the one that most layers have, and finds the alpha of a text
    encoder by an out-projection."""
    transformer = [module for part_name, module in locations.values() if part_name == "transformer"]
    if any("single_transformer_blocks." in name for name in (*base.shapes, *locations)):
        if unread := [module for module in transformer if not _FLUX_KNOWN.fullmatch(module)]:
            yield (
                f"or refuses, or takes for others, {len(unread)} layers of Flux outside of"
                " attention"
            )
    elif transformer:
        yield "the transformer (it reads such names of Flux alone)"
    if any(change.magnitude is not None for change in changes):
        yield "the magnitudes of DoRA (dora_scale)"
    alphas: dict[str, set[float]] = {}
    for change in changes:
        alphas.setdefault(locations[change.weight][0], set()).add(alpha_of(change.layer))
    projections = (".to_q", ".to_k", ".to_v", ".to_out.0", *ATTENTION)
    attention = {
        (part_name, module)
        for part_name, module in locations.values()
        if f".{module}".endswith(projections)
    }
    if any(len(alphas[part_name]) > 1 for part_name, _ in attention if part_name != "transformer"):
        yield "the alphas of attention's projections, which are not those of all layers here"
    encoders = {part_name for part_name, _ in attention if part_name.startswith("text_encoder")}
    if encoders - {part_name for part_name, module in attention if module.endswith(".out_proj")}:
        yield "the attention of a text encoder"


def alpha_of(layer: PeftLayer) -> float:
    """The alpha for which alpha / rank is the scale: the layer's own alpha except for variants with
    another rule."""
    return layer.alpha if layer.alpha / layer.rank == layer.scale else layer.scale * layer.rank


def _header(adapter: Adapter) -> dict[str, str]:
    """The header that kohya's tools read: the fields of the file that the adapter was read from, if
    any, and the sizes."""
    earlier: Mapping[str, Any] = adapter.about.get("provenance", {}).get("header", {})
    ranks = {change.layer.rank for change in adapter.changes}
    alphas = {alpha_of(change.layer) for change in adapter.changes}
    dora = any(change.magnitude is not None for change in adapter.changes)
    return {
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_base_model_version": str((adapter.about.get("base") or {}).get("name") or "unknown"),
        **{key: value for key, value in earlier.items() if isinstance(value, str)},
        "format": "pt",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


TITLE = "safetensors of sd-scripts, ComfyUI and LyCORIS"
LACKS = (
    "embeddings, attention's in-projection, grouped convolutions, parameters, Conv1D, full training"
)
register(
    Format("kohya", TITLE, LACKS, ".safetensors", recognises, parts=True, read=read, write=write)
)
