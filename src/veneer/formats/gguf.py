"""GGUF adapters, in the layout that llama.cpp loads.

    general.type = "adapter"      adapter.type = "lora"       general.architecture: the base's
    adapter.lora.alpha            one alpha for all tensors; a tensor's scale is alpha / its rank
    <tensor>.lora_a [r, in]       <tensor>.lora_b [out, r]    of a linear layer; <tensor> is the
                                                              name of the weight in llama.cpp
    token_embd.weight.lora_a [V, r], .lora_b [d, r]           an embedding of V tokens and width d:
                                                              lora_a is A transposed
    blk.N.ffn_{gate,up,down}_exps.weight.lora_a [E, r, in], .lora_b [E, out, r]      E experts

llama.cpp stores some weights in another layout than transformers, so their changes differ too:

- Rotary embeddings rotate neighbouring rows in llama.cpp, and the two halves of a head in
  transformers. For architectures with ``permutes_rows``, the rows of the weights of q and k are
  permuted within each head, and so are the rows of B.
- ``gate_up_proj`` of experts is split into gate and up; both get the same A.
- GPT-2's Conv1D is transposed to [out, in], the layout that A and B already have.

An architecture is supported only if its conversion to GGUF changes matrices in no other way. Other
conversions may split or reorder rows, so an adapter would load and compute wrong results. alpha is
stored in float32. If a layer's scale differs from alpha / r, B is multiplied by their quotient.

Refused, because llama.cpp cannot represent them: convolutions, DoRA, parameters trained in full
(llama.cpp silently skips norms), and changes of the embedding or head of a base that ties the two.
llama.cpp would read the change of a tied weight in two orientations: for the embedding as a row of
lora_a for each token, for the head as a matrix lora_a [r, d], whose shape it asserts at run time. A
base that was saved with a separate head becomes a GGUF file with ``output.weight``, which supports
changes of both.

The layout is taken from llama.cpp's sources (as of llama-cpp-python 0.3.36). The tests run four
families in llama.cpp. All other ``ARCHITECTURES`` were compared once, with tiny random models from
its converter: logits agreed within 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import AdapterError, ConfigError, first_line, listing, raise_all, sentence
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
from veneer.formats._base import EMBEDDING_SUFFIXES, build_peft_layer, cast, require_finite
from veneer.formats.kohya import plain_lora_alpha
from veneer.formats.peft import PeftLayer


class Architecture(NamedTuple):
    """How llama.cpp stores a family of models.

    Fields:
        name: llama.cpp's name of the architecture.
        permutes_rows: whether llama.cpp permutes the rows of the q and k projections.
        stacks_experts: whether the experts of a layer are one tensor.
        ties_head: whether the head is always the embedding, even if the config says otherwise.
    """

    name: str
    permutes_rows: bool = False
    stacks_experts: bool = False
    ties_head: bool = False


#: transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {
    "llama": Architecture("LLAMA", permutes_rows=True),
    "mistral": Architecture("LLAMA", permutes_rows=True),
    "mixtral": Architecture("LLAMA", permutes_rows=True, stacks_experts=True),
    "smollm3": Architecture("SMOLLM3", permutes_rows=True),
    "granite": Architecture("GRANITE", permutes_rows=True),
    "olmo": Architecture("OLMO", permutes_rows=True),
    "olmo2": Architecture("OLMO2"),
    "olmo3": Architecture("OLMO2"),
    "qwen2": Architecture("QWEN2"),
    "qwen2_moe": Architecture("QWEN2MOE", stacks_experts=True),
    "qwen3": Architecture("QWEN3"),
    "qwen3_moe": Architecture("QWEN3MOE", stacks_experts=True),
    "gemma": Architecture("GEMMA", ties_head=True),
    "gemma2": Architecture("GEMMA2", ties_head=True),
    "gemma3_text": Architecture("GEMMA3", ties_head=True),
    "phi": Architecture("PHI2"),
    "phi3": Architecture("PHI3"),
    "gpt2": Architecture("GPT2"),
    "starcoder2": Architecture("STARCODER2"),
    "stablelm": Architecture("STABLELM"),
    "seed_oss": Architecture("SEED_OSS"),
}
#: the values of ``LowRankChange.kind`` that a GGUF adapter can hold
_LAYER_KINDS = ("linear", "Conv1D", "linear or Conv1D", "embedding", "parameter", "stack")
_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
#: advice in errors
_DO_MERGE = "leave it out, or merge the adapter and convert the model"
_DO_UNTIE = (
    "save the base with a head of its own (tie_word_embeddings=false), and give that and use its"
    " GGUF"
)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("no package gguf", "it, for this format", "pip install gguf") from error
    return gguf


def recognises(first_bytes: bytes, keys: Iterable[str], header: Mapping[str, str]) -> bool:
    return first_bytes[:4] == b"GGUF"


class _TensorNames:
    """llama.cpp's names and row orders for the weights of a base, by the base's ``config.json``."""

    def __init__(self, gguf: Any, base: BaseFacts) -> None:
        config = base.config
        model_type = config.get("model_type")
        if not model_type:
            problem = "no base, or one without config.json"
            raise AdapterError(problem, "one that names its architecture", "give the base's folder")
        architecture_name = ARCHITECTURES[model_type].name if model_type in ARCHITECTURES else ""
        if not architecture_name or not hasattr(gguf.MODEL_ARCH, architecture_name):
            problem = f"model_type {model_type!r}, whose conversion to GGUF is not known here"
            raise AdapterError(
                problem, f"one of {', '.join(ARCHITECTURES)}", "merge, and convert the model"
            )
        self.architecture = ARCHITECTURES[model_type]
        architecture_id = getattr(gguf.MODEL_ARCH, self.architecture.name)
        self.architecture_name = gguf.MODEL_ARCH_NAMES[architecture_id]
        block_count = config.get("num_hidden_layers") or config.get("n_layer") or 0
        self.name_map = gguf.get_tensor_name_map(architecture_id, int(block_count))
        head_count = config.get("num_attention_heads") or config.get("n_head") or 1
        self.head_counts = {
            "q_proj": int(head_count),
            "k_proj": int(config.get("num_key_value_heads") or head_count),
        }
        has_head = any(name.endswith("lm_head.weight") for name in base.shapes)
        is_tied = config.get("tie_word_embeddings", not has_head if base.shapes else False)
        self.is_tied = bool(is_tied) or self.architecture.ties_head

    def names_of(self, weight: str) -> tuple[str, ...]:
        """The names of llama.cpp's tensors for a weight: two for ``gate_up_proj`` of experts, none
        if llama.cpp has no name for the weight."""
        module_path = weight.removesuffix(".weight")
        experts_path = module_path.removesuffix(".gate_up_proj")
        is_stack = experts_path != module_path and experts_path.endswith(".experts")
        paths = [module_path]
        if is_stack:
            paths = [f"{experts_path}.gate_proj", f"{experts_path}.up_proj"]
        names = [self.name_map.get_name(path) for path in paths]
        return tuple(f"{name}.weight" for name in names) if all(names) else ()

    def row_order(self, weight: str, row_count: int) -> Tensor | None:
        """The indices that bring the rows of a weight from transformers' order into llama.cpp's;
        None if the orders are equal. The rows of a head are ordered by (half, pair) in
        transformers, and by (pair, half) in llama.cpp."""
        head_count = (
            self.head_counts.get(weight.removesuffix(".weight").rpartition(".")[2])
            if self.architecture.permutes_rows
            else None
        )
        if head_count is None:
            return None
        indices = torch.arange(row_count).reshape(head_count, 2, row_count // head_count // 2)
        return indices.transpose(1, 2).reshape(-1)


def write(adapter: Adapter, path: Path, base: BaseFacts, options: Options) -> list[str]:
    gguf = _import_gguf()
    namer = _TensorNames(gguf, base)
    problems = [
        problem for change in adapter.changes for problem in _refusal_reasons(change, namer)
    ]
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
    all_alphas = [plain_lora_alpha(change.layer) for change in adapter.changes]
    alphas = [alpha for alpha in all_alphas if alpha]
    # to llama.cpp, alpha 0 means scale 1; an adapter of scale 0 therefore has alpha 1 and B zero
    alpha = torch.tensor(max(alphas, key=alphas.count, default=1.0), dtype=torch.float32).item()
    writer = gguf.GGUFWriter(path, namer.architecture_name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if base.name:
        writer.add_name(f"adapter of {base.name}")
    for change in adapter.changes:
        for name, *factors in _gguf_tensors(change, namer, alpha):
            for letter, tensor in zip("ab", factors, strict=True):
                values = cast(tensor, options.dtype)
                is_bfloat16 = values.dtype == torch.bfloat16
                raw_dtype = gguf.GGMLQuantizationType.BF16 if is_bfloat16 else None
                values = (
                    values
                    if values.dtype == torch.float16
                    else values.float()
                    if raw_dtype is None
                    else values.view(torch.uint8)
                )
                # numpy has no bfloat16, so the bytes are written
                writer.add_tensor(f"{name}.lora_{letter}", values.numpy(), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return []


def _refusal_reasons(change: LowRankChange, namer: _TensorNames) -> Iterable[str]:
    """The reasons why llama.cpp cannot apply a change."""
    tensor_names, weight = namer.names_of(change.weight), change.weight
    if change.magnitude is not None:
        yield sentence(f"{weight!r}, changed by DoRA", "a product alone", _DO_MERGE)
    if change.kind == "stack" and not (namer.architecture.stacks_experts and ".experts." in weight):
        yield sentence(
            f"{weight!r}, a stack of matrices", f"none in {namer.architecture_name}", _DO_MERGE
        )
    elif change.kind not in _LAYER_KINDS:
        yield sentence(
            f"{weight!r}, a change of kind {change.kind}", "linear layers and embeddings", _DO_MERGE
        )
    elif not tensor_names:
        yield sentence(
            f"{weight!r}, for which {namer.architecture_name} has no tensor in llama.cpp",
            "one that it has",
            _DO_MERGE,
        )
    elif namer.is_tied and set(tensor_names) & {_EMBEDDING, _HEAD}:
        problem = (
            f"{weight!r} of a base whose embedding and head are one weight, "
            "which llama.cpp reads in two orientations"
        )
        advice = _DO_MERGE if namer.architecture.ties_head else f"{_DO_UNTIE}; {_DO_MERGE}"
        yield sentence(problem, "two weights, or changes elsewhere", advice)
    elif (tensor_names == (_EMBEDDING,)) != (change.kind == "embedding"):
        yield sentence(f"{weight!r}, an embedding other than the tokens'", "the tokens'", _DO_MERGE)


def _gguf_tensors(
    change: LowRankChange, namer: _TensorNames, file_alpha: float
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """(name, lora_a, lora_b) of each tensor of a change. B is rescaled to the file's alpha."""
    layer, product, tensor_names = change.layer, change.layer.low, namer.names_of(change.weight)
    A, B = product.A, product.B  # [g, r, in], [g, out, r]
    factor = layer.scale * layer.rank / file_alpha
    if abs(factor - 1) >= 1e-7:  # more than the rounding error of a float32 alpha
        B = (B.double() * factor).to(torch.promote_types(B.dtype, torch.float32))
    if change.kind == "embedding":
        yield tensor_names[0], A[0].mT, B[0]
    elif change.kind != "stack":
        row_order = namer.row_order(change.weight, B.shape[1])
        yield tensor_names[0], A[0], B[0] if row_order is None else B[0][row_order]
    else:
        for name, B_block in zip(tensor_names, B.chunk(len(tensor_names), dim=1), strict=True):
            yield name, A, B_block


def read(path: Path, base: BaseFacts, options: Options) -> Contents:
    gguf = _import_gguf()
    fields, tensors = _read_file(path, gguf)
    namer = _TensorNames(gguf, base)
    if not base.shapes:
        raise AdapterError("no base", "one whose weights have names", "give the base's folder")
    if fields.get("general.architecture") != namer.architecture_name:
        raise AdapterError(
            f"an adapter for {fields.get('general.architecture')!r} and a base of"
            f" {namer.architecture_name!r}",
            "one architecture",
            "give the base that it was made for",
        )
    layers = _read_layers(path, tensors, namer, _read_alpha(path, fields), base)
    positions = {
        weight.removesuffix(".weight"): position for position, weight in enumerate(base.shapes)
    }
    layers = dict(sorted(layers.items(), key=lambda entry: positions.get(entry[1].target_path, 0)))
    metadata = {
        "header": {key: value for key, value in fields.items() if not key.startswith("GGUF.")}
    }
    is_gpt2 = namer.architecture.name == "GPT2"
    return Contents(layers, base_name=base.name, metadata=metadata, transposed=is_gpt2)


def _read_alpha(path: Path, fields: Mapping[str, Any]) -> float:
    """The alpha of a file; 0 if the file has none. ``AdapterError``: it is no finite number."""
    import numpy

    stored = fields.get("adapter.lora.alpha", 0.0)
    # the shortest decimal that float32 rounds to this alpha: 0.1, not 0.10000000149
    alpha = float(str(numpy.float32(stored))) if isinstance(stored, int | float) else math.nan
    if math.isfinite(alpha):
        return alpha
    problem = f"{path} with adapter.lora.alpha {stored!r}"
    raise AdapterError(problem, "a finite number", "get the file again")


def _read_file(path: Path, gguf: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields and the tensors of an adapter's file. ``AdapterError``: the file is damaged, or it
    is not an adapter."""
    gguf_claims.check(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        fields = {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in fields.items()
        }
        tensors = {tensor.name: _to_torch(gguf, tensor) for tensor in reader.tensors}
    except Exception as error:  # the reader has no exception class for damaged files
        raise AdapterError(
            f"{path}, which cannot be read as GGUF ({first_line(error)})",
            "a whole GGUF file",
            "get the file again",
        ) from error
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise AdapterError(
            f"{path} with general.type {fields.get('general.type')!r}, adapter.type"
            f" {fields.get('adapter.type')!r}",
            "a LoRA adapter",
            "a model is a base: name its adapter here",
        )
    require_finite(tensors, path)
    return fields, tensors


def _read_layers(
    path: Path, tensors: Mapping[str, Tensor], namer: _TensorNames, alpha: float, base: BaseFacts
) -> dict[str, PeftLayer]:
    """The changes in a file by the path of their module. ``alpha``: the file's alpha, 0 if it has
    none. ``AdapterError``: some do not fit the base."""
    problems: list[str] = []
    weights = {name: weight for weight in base.shapes for name in namer.names_of(weight)}
    layers: dict[str, PeftLayer] = {}
    stacks: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name in sorted({key.removesuffix(".lora_a").removesuffix(".lora_b") for key in tensors}):
        A = tensors.get(f"{name}.lora_a")
        B = tensors.get(f"{name}.lora_b")
        weight = weights.get(name)
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
                layers[weight.removesuffix(".weight")] = _read_layer(
                    weight, name, A, B, alpha or None, namer, base
                )
            except AdapterError as error:
                problems.append(str(error))
    raise_all(AdapterError, f"{path} does not fit this base", problems)
    return layers | _stack_experts(stacks, namer, alpha, base)


def _read_layer(
    weight: str,
    name: str,
    A: Tensor,
    B: Tensor,
    alpha: float | None,
    namer: _TensorNames,
    base: BaseFacts,
) -> PeftLayer:
    """The change of one weight, from A and B as the file has them. ``name``: the name of the tensor
    in llama.cpp."""
    module_path, shape = weight.removesuffix(".weight"), tuple(base.shapes[weight])
    is_embedding = name == _EMBEDDING
    is_transposed = namer.architecture.name == "GPT2" and name not in (_EMBEDDING, _HEAD)
    A_by_rank = A.mT if is_embedding and A.dim() == 2 else A  # [r, in]
    sizes = (*B.shape[:1], *A_by_rank.shape[1:])  # (out, in)
    expected_sizes = shape[::-1] if is_embedding or is_transposed else shape
    if A.dim() != 2 or B.dim() != 2 or sizes != expected_sizes:
        problem = f"{name!r} with a {tuple(A.shape)} and b {tuple(B.shape)} for a weight {shape}"
        raise AdapterError(problem, "shapes that fit", "give the base that it was made for")
    if is_embedding:
        A = A_by_rank.contiguous()
        return build_peft_layer(module_path, A, B, alpha, suffixes=EMBEDDING_SUFFIXES)
    row_order = namer.row_order(weight, B.shape[0])
    B = B if row_order is None else B[torch.argsort(row_order)]
    return build_peft_layer(module_path, A, B, alpha)


def _stack_experts(
    stacks: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    namer: _TensorNames,
    alpha: float,
    base: BaseFacts,
) -> dict[str, PeftLayer]:
    """The changes of E experts in PEFT's layout, A [E·r, in] and B [out, r·E], by their path in
    PEFT's file. If two parameters of a module change, the path of the first one ends in
    ``base_layer``, because PEFT nests their wrappers. ``stacks``: (lora_a, lora_b) by weight and
    then by llama.cpp's tensor name. ``alpha``: the file's alpha, 0 if it has none."""
    layers: dict[str, PeftLayer] = {}
    for weight in (weight for weight in base.shapes if weight in stacks):
        module_path, pairs_by_name = weight.rpartition(".")[0], stacks[weight]
        has_other_stack = any(
            sibling in stacks
            for sibling in base.shapes
            if sibling.startswith(f"{module_path}.") and sibling != weight
        )
        is_first_stack = has_other_stack and all(
            layer.target_path.rpartition(".")[0] != module_path for layer in layers.values()
        )
        A, B = _join_pairs(
            [pairs_by_name.get(name) for name in namer.names_of(weight)],
            base.shapes[weight],
            weight,
            alpha,
        )
        rank, layer_alpha = A.shape[1], alpha or A.shape[1]
        layer = build_peft_layer(weight, A.flatten(0, 1), B.permute(1, 2, 0).flatten(1), None)
        layer = replace(layer, rank=rank, alpha=float(layer_alpha), scale=layer_alpha / rank)
        layers[f"{module_path}.base_layer" if is_first_stack else module_path] = layer
    return layers


def _join_pairs(
    pairs: list[tuple[Tensor, Tensor] | None], shape: tuple[int, ...], weight: str, alpha: float
) -> tuple[Tensor, Tensor]:
    """Join ``pairs``, the (A, B) of gate and up or None for an unchanged one, into the (A, B) of
    ``gate_up_proj``. If both have the same A, the rank stays; else it is the sum of their ranks."""
    changed_pairs = [pair for pair in pairs if pair is not None]
    # A [E, r, in] and B [E, out, r] of a stack [E, out, in]
    shapes_fit = len(shape) == 3 and all(
        pair_A.dim() == 3
        and pair_A.shape[1] > 0
        and pair_A.shape == (shape[0], pair_A.shape[1], shape[2])
        and B.shape == (shape[0], shape[1] // len(pairs), pair_A.shape[1])
        for pair_A, B in changed_pairs
    )
    if not shapes_fit:
        problem = f"changes of {weight!r} that do not fit its shape {tuple(shape)}"
        raise AdapterError(problem, "those of its base", "give the base that it was made for")
    A, out = changed_pairs[0][0], shape[1] // len(pairs)
    if len(changed_pairs) == len(pairs) and all(
        torch.equal(pair_A, A) for pair_A, _ in changed_pairs
    ):
        return A, torch.cat([B for _, B in changed_pairs], 1)
    # the scale alpha / rank falls as the rank grows: multiply B by the quotient of the ranks
    total_rank = sum(pair_A.shape[1] for pair_A, _ in changed_pairs)
    B_blocks, first_column = [], 0
    for pair in pairs:
        if pair is None:
            B_blocks.append(changed_pairs[0][1].new_zeros(shape[0], out, total_rank))
        else:
            rank = pair[0].shape[1]
            rescaled_B = pair[1] * (total_rank / rank if alpha else 1.0)
            padding = (first_column, total_rank - first_column - rank)
            B_blocks.append(torch.nn.functional.pad(rescaled_B, padding))
            first_column += rank
    return torch.cat([pair_A for pair_A, _ in changed_pairs], 1), torch.cat(B_blocks, 1)


def _to_torch(gguf: Any, tensor: Any) -> Tensor:
    """Convert a tensor of the package ``gguf`` to torch; quantised tensors are dequantised."""
    types = gguf.GGMLQuantizationType
    is_unquantised = tensor.tensor_type in (types.F32, types.F16, types.F64, types.BF16)
    data = tensor.data
    if not is_unquantised:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    values = torch.from_numpy(data.copy())
    return values.view(torch.bfloat16) if tensor.tensor_type == types.BF16 else values


LACKS = (
    "convolutions, DoRA, full training, tied embeddings, architectures whose conversion reorders"
    " weights"
)
register(
    Format("gguf", "GGUF adapters of llama.cpp", LACKS, ".gguf", recognises, read=read, write=write)
)
