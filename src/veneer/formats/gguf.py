"""GGUF adapters, as llama.cpp loads them.

    general.type = "adapter"      adapter.type = "lora"       general.architecture = that of the
                                                              base
    adapter.lora.alpha            one for all; the scale of each tensor is alpha / its rank
    <tensor>.lora_a [r, in]       <tensor>.lora_b [out, r]    of a linear layer, by its name in
                                                              llama.cpp
    token_embd.weight.lora_a [V, r], .lora_b [d, r]           an embedding: a is transposed
    blk.N.ffn_{gate,up,down}_exps.weight.lora_a [E, r, in], .lora_b [E, out, r]      experts

llama.cpp stores some weights otherwise than transformers does, and a change of a weight follows it:

- Rotary embeddings rotate neighbouring pairs of rows in llama.cpp and halves of a head in
  transformers. For architectures with ``permutes``, the rows of q and k are permuted within each
  head, and the rows of B with them.
- ``gate_up_proj`` of experts is split into gate and up, which share A.
- GPT-2's Conv1D is transposed to [out, in], the layout that A and B already have.

Only architectures whose conversion changes matrices in no other way are supported: another one may
split or reorder rows, and its adapter would load and compute wrong results. alpha is stored in
float32; if a layer's scale differs from alpha / r, B is multiplied by the quotient.

Refused, because llama.cpp cannot represent them: convolutions, DoRA, parameters trained in full
(its loader silently skips norms), and the embedding or head of a base that ties the two.
llama.cpp would read such a change in two orientations: a row of lora_a for each token, and lora_a
as a matrix [r, d] for the head, whose shape it asserts at run time. A base that was saved with a
separate head becomes a GGUF file with ``output.weight``, which supports changes of both.

Read from llama.cpp's sources (as of llama-cpp-python 0.3.36). The tests run four families in it;
all other ``ARCHITECTURES`` were compared once with tiny random models from its converter: logits
within 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError, ConfigError, listing, raise_all, sentence
from veneer.formats import (
    Adapter,
    BaseFacts,
    Contents,
    Format,
    LowRankChange,
    Options,
    gguf_claims,
    register,
)
from veneer.formats._base import EMBEDDING, cast, layer_of, require_finite
from veneer.formats.kohya import alpha_of
from veneer.formats.peft import PeftLayer


class Architecture(NamedTuple):
    """How llama.cpp stores a family. ``name``: its architecture; ``permutes``: the rows of q and k
    are permuted; ``experts``: experts are stacked; ``tied``: the head is always the embedding, also
    if the config differs."""

    name: str
    permutes: bool = False
    experts: bool = False
    tied: bool = False


#: transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {
    "llama": Architecture("LLAMA", permutes=True),
    "mistral": Architecture("LLAMA", permutes=True),
    "mixtral": Architecture("LLAMA", permutes=True, experts=True),
    "smollm3": Architecture("SMOLLM3", permutes=True),
    "granite": Architecture("GRANITE", permutes=True),
    "olmo": Architecture("OLMO", permutes=True),
    "olmo2": Architecture("OLMO2"),
    "olmo3": Architecture("OLMO2"),
    "qwen2": Architecture("QWEN2"),
    "qwen2_moe": Architecture("QWEN2MOE", experts=True),
    "qwen3": Architecture("QWEN3"),
    "qwen3_moe": Architecture("QWEN3MOE", experts=True),
    "gemma": Architecture("GEMMA", tied=True),
    "gemma2": Architecture("GEMMA2", tied=True),
    "gemma3_text": Architecture("GEMMA3", tied=True),
    "phi": Architecture("PHI2"),
    "phi3": Architecture("PHI3"),
    "gpt2": Architecture("GPT2"),
    "starcoder2": Architecture("STARCODER2"),
    "stablelm": Architecture("STABLELM"),
    "seed_oss": Architecture("SEED_OSS"),
}
_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_DO_MERGE = "leave it out, or merge the adapter and convert the model"
_DO_UNTIE = (
    "save the base with a head of its own (tie_word_embeddings=false), and give that and use its"
    " GGUF"
)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("no package gguf", "it, for this format", "pip install gguf") from error
    return gguf


def recognises(start: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    return start[:4] == b"GGUF"


class _Names:
    """llama.cpp's names for the tensors of a base, from the base's config."""

    def __init__(self, library: Any, base: BaseFacts) -> None:
        config = base.config
        type_ = config.get("model_type")
        if not type_:
            problem = "no base, or one without config.json"
            raise AdapterError(problem, "one that names its architecture", "give the base's folder")
        if type_ not in ARCHITECTURES or not hasattr(library.MODEL_ARCH, ARCHITECTURES[type_].name):
            problem = f"model_type {type_!r}, whose conversion to GGUF is not known here"
            raise AdapterError(
                problem, f"one of {', '.join(ARCHITECTURES)}", "merge, and convert the model"
            )
        self.family = ARCHITECTURES[type_]
        arch = getattr(library.MODEL_ARCH, self.family.name)
        self.name = library.MODEL_ARCH_NAMES[arch]
        blocks = config.get("num_hidden_layers") or config.get("n_layer") or 0
        self.map = library.get_tensor_name_map(arch, int(blocks))
        heads = config.get("num_attention_heads") or config.get("n_head") or 1
        self.heads = {
            "q_proj": int(heads),
            "k_proj": int(config.get("num_key_value_heads") or heads),
        }
        lm_head = any(name.endswith("lm_head.weight") for name in base.shapes)
        tied = config.get("tie_word_embeddings", not lm_head if base.shapes else False)
        self.tied = bool(tied) or self.family.tied

    def of(self, weight: str) -> tuple[str, ...]:
        """llama.cpp's tensors for a weight: two for ``gate_up_proj`` of experts, none if it has no
        name for the weight."""
        module_path = weight.removesuffix(".weight")
        experts_path = module_path.removesuffix(".gate_up_proj")
        is_stack = experts_path != module_path and experts_path.endswith(".experts")
        paths = [module_path]
        if is_stack:
            paths = [f"{experts_path}.gate_proj", f"{experts_path}.up_proj"]
        names = [self.map.get_name(path) for path in paths]
        return tuple(f"{name}.weight" for name in names) if all(names) else ()

    def order(self, weight: str, rows: int) -> Tensor | None:
        """Indices that reorder the rows of transformers' weight into llama.cpp's order; None if the
        order is the same. A head's rows are (half, pair) in transformers, (pair, half) in
        llama.cpp."""
        heads = (
            self.heads.get(weight.removesuffix(".weight").rpartition(".")[2])
            if self.family.permutes
            else None
        )
        if heads is None:
            return None
        return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def write(adapter: Adapter, path: Path, base: BaseFacts, options: Options) -> list[str]:
    library = _library()
    names = _Names(library, base)
    problems = [problem for change in adapter.changes for problem in _refusals(change, names)]
    if adapter.full:
        full_paths = listing([module_path or "the model" for module_path in adapter.full], 3)
        problems.append(
            sentence(
                f"{full_paths} trained in full",
                "low-rank changes alone",
                "merge the adapter and convert the model",
            )
        )
    raise_all(AdapterError, "GGUF cannot hold this adapter", problems)
    alphas = [alpha_of(change.layer) for change in adapter.changes if alpha_of(change.layer)]
    # 0 means scale 1 to llama.cpp, so an adapter of scale 0 has alpha 1 and B zero
    alpha = torch.tensor(max(alphas, key=alphas.count, default=1.0), dtype=torch.float32).item()
    writer = library.GGUFWriter(path, names.name)
    writer.add_type(library.GGUFType.ADAPTER)
    writer.add_string(library.Keys.Adapter.TYPE, "lora")
    writer.add_float32(library.Keys.Adapter.LORA_ALPHA, alpha)
    if base.name:
        writer.add_name(f"adapter of {base.name}")
    for change in adapter.changes:
        for name, *factors in _tensors(change, names, alpha):
            for side, tensor in zip("ab", factors, strict=True):
                values = cast(tensor, options.dtype)
                kind = library.GGMLQuantizationType.BF16 if values.dtype == torch.bfloat16 else None
                values = (
                    values
                    if values.dtype == torch.float16
                    else values.float()
                    if kind is None
                    else values.view(torch.uint8)
                )
                # numpy has no bfloat16
                writer.add_tensor(f"{name}.lora_{side}", values.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return []


def _refusals(change: LowRankChange, names: _Names) -> Iterable[str]:
    tensor_names, weight = names.of(change.weight), change.weight
    if change.magnitude is not None:
        yield sentence(f"{weight!r}, changed by DoRA", "a product alone", _DO_MERGE)
    if change.kind == "stack" and not (names.family.experts and ".experts." in weight):
        yield sentence(f"{weight!r}, a stack of matrices", f"none in {names.name}", _DO_MERGE)
    elif change.kind not in ("linear", "Conv1D", "embedding", "parameter", "stack"):
        yield sentence(
            f"{weight!r}, a change of kind {change.kind}", "linear layers and embeddings", _DO_MERGE
        )
    elif not tensor_names:
        yield sentence(
            f"{weight!r}, for which {names.name} has no tensor in llama.cpp",
            "one that it has",
            _DO_MERGE,
        )
    elif names.tied and set(tensor_names) & {_EMBEDDING, _HEAD}:
        problem = (
            f"{weight!r} of a base whose embedding and head are one weight, "
            "which llama.cpp reads in two orientations"
        )
        do = _DO_MERGE if names.family.tied else f"{_DO_UNTIE}; {_DO_MERGE}"
        yield sentence(problem, "two weights, or changes elsewhere", do)
    elif (tensor_names == (_EMBEDDING,)) != (change.kind == "embedding"):
        yield sentence(f"{weight!r}, an embedding other than the tokens'", "the tokens'", _DO_MERGE)


def _tensors(
    change: LowRankChange, names: _Names, alpha: float
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(name, lora_a, lora_b) of each tensor of a change."""
    layer, low, tensor_names = change.layer, change.layer.low, names.of(change.weight)
    A, B, factor = low.A, low.B, layer.scale * layer.rank / alpha  # A: [g, r, in], B: [g, out, r]
    if abs(factor - 1) >= 1e-7:  # larger than the rounding error of alpha in float32
        B = (B.double() * factor).to(torch.promote_types(B.dtype, torch.float32))
    if change.kind == "embedding":
        yield tensor_names[0], A[0].mT, B[0]
    elif change.kind != "stack":
        order = names.order(change.weight, B.shape[1])
        yield tensor_names[0], A[0], B[0] if order is None else B[0][order]
    else:
        for name, B_block in zip(tensor_names, B.chunk(len(tensor_names), dim=1), strict=True):
            yield name, A, B_block


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    import numpy

    library = _library()
    fields, tensors = _read_file(path, library)
    names = _Names(library, base)
    if not base.shapes:
        raise AdapterError("no base", "one whose weights have names", "give the base's folder")
    if fields.get("general.architecture") != names.name:
        problem = (
            f"an adapter for {fields.get('general.architecture')!r} and a base of {names.name!r}"
        )
        raise AdapterError(problem, "one architecture", "give the base that it was made for")
    # the shortest decimal that float32 rounds to this: 0.1 and not 0.10000000149
    alpha = float(str(numpy.float32(fields.get("adapter.lora.alpha") or 0.0)))
    low = _layers(path, tensors, names, alpha, base)
    order = {
        weight.removesuffix(".weight"): position for position, weight in enumerate(base.shapes)
    }
    low = dict(sorted(low.items(), key=lambda entry: order.get(entry[1].target_path, 0)))
    about = {"header": {key: value for key, value in fields.items() if not key.startswith("GGUF.")}}
    return Contents(low, base_name=base.name, about=about, transposed=names.family.name == "GPT2")


def _read_file(path: Path, library: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of an adapter's file. ``AdapterError``: it is damaged, or no
    adapter."""
    gguf_claims.check(path)
    try:
        file = library.GGUFReader(path)
        fields = {key: field.contents() for key, field in file.fields.items()}
        fields = {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in fields.items()
        }
        tensors = {tensor.name: _tensor(library, tensor) for tensor in file.tensors}
    except Exception as error:  # the reader has no exception class for damaged files
        problem = (
            f"{path}, which cannot be read as GGUF"
            f" ({str(error).splitlines()[0] if str(error) else error!r})"
        )
        raise AdapterError(problem, "a whole GGUF file", "get the file again") from error
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        problem = (
            f"{path} with general.type {fields.get('general.type')!r}, adapter.type"
            f" {fields.get('adapter.type')!r}"
        )
        raise AdapterError(problem, "a LoRA adapter", "a model is a base: name its adapter here")
    require_finite(tensors, path)
    return fields, tensors


def _layers(
    path: Path, tensors: Mapping[str, Tensor], names: _Names, alpha: float, base: BaseFacts
) -> dict[str, PeftLayer]:
    """The changes of a file by the path of their module. ``AdapterError``: some do not fit the
    base."""
    problems: list[str] = []
    weights = {name: weight for weight in base.shapes for name in names.of(weight)}
    low: dict[str, PeftLayer] = {}
    stacks: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name in sorted({key.removesuffix(".lora_a").removesuffix(".lora_b") for key in tensors}):
        A, B, weight = (
            tensors.get(f"{name}.lora_a"),
            tensors.get(f"{name}.lora_b"),
            weights.get(name),
        )
        if A is None or B is None:
            problems.append(
                sentence(
                    f"half a pair at {name!r}", "lora_a and lora_b", "get the whole file again"
                )
            )
        elif weight is None:
            problems.append(
                sentence(
                    f"{name!r}, which this base lacks", "one of its tensors", "give its own base"
                )
            )
        elif A.dim() == 3 or B.dim() == 3:
            stacks.setdefault(weight, {})[name] = A, B
        else:
            try:
                low[weight.removesuffix(".weight")] = _layer(
                    weight, name, A, B, alpha or None, names, base
                )
            except AdapterError as error:
                problems.append(str(error))
    raise_all(AdapterError, f"{path} does not fit this base", problems)
    return low | _stack_experts(stacks, names, alpha, base)


def _layer(
    weight: str,
    name: str,
    A: Tensor,
    B: Tensor,
    alpha: float | None,
    names: _Names,
    base: BaseFacts,
) -> PeftLayer:
    module_path, shape = weight.removesuffix(".weight"), tuple(base.shapes[weight])
    embeds, transposed = (
        name == _EMBEDDING,
        names.family.name == "GPT2" and name not in (_EMBEDDING, _HEAD),
    )
    across = A.mT if embeds and A.dim() == 2 else A  # [r, in]
    sizes = (*B.shape[:1], *across.shape[1:])  # (out, in)
    if A.dim() != 2 or B.dim() != 2 or sizes != (shape[::-1] if embeds or transposed else shape):
        problem = f"{name!r} with a {tuple(A.shape)} and b {tuple(B.shape)} for a weight {shape}"
        raise AdapterError(problem, "shapes that fit", "give the base that it was made for")
    if embeds:
        return layer_of(module_path, across.contiguous(), B, alpha, suffixes=EMBEDDING)
    order = names.order(weight, B.shape[0])
    return layer_of(module_path, A, B if order is None else B[torch.argsort(order)], alpha)


def _stack_experts(
    stacks: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    names: _Names,
    alpha: float,
    base: BaseFacts,
) -> dict[str, PeftLayer]:
    """Changes of experts in the layout of PEFT's file: A [E·r, in] and B [out, r·E]. If a module
    has several, the path of the first ends in ``base_layer``, because PEFT nests the wrappers."""
    low: dict[str, PeftLayer] = {}
    for weight in (weight for weight in base.shapes if weight in stacks):
        above, pairs_by_name = weight.rpartition(".")[0], stacks[weight]
        later = any(
            sibling in stacks
            for sibling in base.shapes
            if sibling.startswith(f"{above}.") and sibling != weight
        )
        first = later and all(
            layer.target_path.rpartition(".")[0] != above for layer in low.values()
        )
        A, B = _join_pairs(
            [pairs_by_name.get(name) for name in names.of(weight)],
            base.shapes[weight],
            weight,
            alpha,
        )
        rank, size = A.shape[1], alpha or A.shape[1]
        layer = layer_of(weight, A.flatten(0, 1), B.permute(1, 2, 0).flatten(1), None)
        layer = replace(layer, rank=rank, alpha=float(size), scale=size / rank)
        low[f"{above}.base_layer" if first else above] = layer
    return low


def _join_pairs(
    pairs: list[tuple[Tensor, Tensor] | None], shape: tuple[int, ...], weight: str, alpha: float
) -> tuple[Tensor, Tensor]:
    """Join the changes of gate and up into one: of the same rank if they share A, else of the sum
    of their ranks."""
    present = [pair for pair in pairs if pair is not None]
    out, fits = shape[1] // len(pairs), len(shape) == 3
    for a, B in present:  # [E, r, in], [E, out, r] of a stack [E, out, in]
        fits = (
            fits and a.dim() == 3 and a.shape[1] > 0 and a.shape == (shape[0], a.shape[1], shape[2])
        )
        fits = fits and B.shape == (shape[0], out, a.shape[1])
    if not fits:
        problem = f"changes of {weight!r} that do not fit its shape {tuple(shape)}"
        raise AdapterError(problem, "those of its base", "give the base that it was made for")
    A = present[0][0]
    if len(present) == len(pairs) and all(torch.equal(a, A) for a, _ in present):
        return A, torch.cat([B for _, B in present], 1)
    # the scale alpha / rank falls as the rank grows: multiply B by the quotient
    total_rank = sum(a.shape[1] for a, _ in present)
    blocks, columns = [], 0
    for pair in pairs:
        if pair is None:
            blocks.append(present[0][1].new_zeros(shape[0], out, total_rank))
        else:
            rank = pair[0].shape[1]
            grown = pair[1] * (total_rank / rank if alpha else 1.0)
            blocks.append(torch.nn.functional.pad(grown, (columns, total_rank - columns - rank)))
            columns += rank
    return torch.cat([a for a, _ in present], 1), torch.cat(blocks, 1)


def _tensor(library: Any, tensor: Any) -> Tensor:
    kind = library.GGMLQuantizationType
    plain = tensor.tensor_type in (kind.F32, kind.F16, kind.F64, kind.BF16)
    data = tensor.data if plain else library.quants.dequantize(tensor.data, tensor.tensor_type)
    values = torch.from_numpy(data.copy())
    return values.view(torch.bfloat16) if tensor.tensor_type == kind.BF16 else values


LACKS = (
    "convolutions, DoRA, full training, tied embeddings, architectures whose conversion reorders"
    " weights"
)
register(
    Format("gguf", "GGUF adapters of llama.cpp", LACKS, ".gguf", recognises, read=read, write=write)
)
