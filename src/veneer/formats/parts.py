"""The prefixes that name the models of an image pipeline (its "parts") in the keys of a file.

    part              paths; keys of diffusers     keys of kohya
    unet              unet.<path>                  lora_unet_<path, each dot as _>
    transformer       transformer.<path>           lora_transformer_… (and lora_unet_…)
    text_encoder      text_encoder.<path>          lora_te_…, or lora_te1_… if there are two
    text_encoder_2    text_encoder_2.<path>        lora_te2_…
    model             <path>                       lycoris_…

The text encoder of Stable Diffusion 1 is CLIP's. Its paths began with ``text_model.`` until
transformers 5, and kohya's files still contain this prefix
(``lora_te_text_model_encoder_layers_0_…``). Veneer writes files with the prefix, because other
programs expect it, and reads files with or without it (``path_in_base``).

An adapter of Veneer belongs to one module. That is either a module with the parts as children, so
that the adapter's paths begin with the name of a part, or one part itself, whose paths do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from veneer.errors import AdapterError, listing, sentence
from veneer.formats._base import Adapter, BaseFacts, LowRankChange

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "model")


def part_of(path: str) -> str:
    """The part that a path begins with, or "" if it begins with no part."""
    first = path.partition(".")[0]
    return first if first in PARTS and first != "model" and first != path else ""


#: the first part of paths in CLIP's text encoder until transformers 5, and the path below it that
#: tells CLIP from other encoders; files, and CLIP's encoder with a projection, have the prefix
_CLIP_PREFIX, _CLIP_LAYERS = "text_model.", "encoder.layers."


def path_before_transformers_5(part_name: str, path: str) -> str:
    """The path that a module of a part had before transformers 5, as kohya's files have it."""
    return (
        _CLIP_PREFIX + path if part_name.startswith("text_encoder") and path.startswith(_CLIP_LAYERS) else path
    )


def path_in_base(part_name: str, path: str, exists: Callable[[str], bool]) -> str:
    """The path in the base of the module that has ``path`` in a file: with CLIP's prefix, or
    without. ``exists``: a function that tells whether the base has a module at a path."""
    candidates = (
        path,
        path_before_transformers_5(part_name, path),
        path.removeprefix(_CLIP_PREFIX) if part_name.startswith("text_encoder") else path,
    )
    return next(filter(exists, candidates), path)


def refusal_reasons(adapter: Adapter) -> list[str]:
    """The reasons why a file with one A and one B for each module cannot hold an adapter."""
    expected, do = "linear layers and convolutions in one group", "leave it out, or merge"
    unsupported_changes = [change for change in adapter.changes if change.kind not in ("linear", "conv")]
    problems = [
        sentence(f"{change.weight!r}, a change of kind {change.kind}", expected, do)
        for change in unsupported_changes
    ]
    full_modules = [module_path or "the model" for module_path in adapter.full]
    return problems + [
        sentence(
            f"{module_path!r} trained in full", "low-rank changes", "merge the adapter instead"
        )
        for module_path in full_modules
    ]


def locate_modules(
    changes: Sequence[LowRankChange], part_name: str | None, format_name: str
) -> dict[str, tuple[str, str]]:
    """(part, path in the part) of each changed module, by the name of the changed weight.

    Args:
        part_name: the part to which all changes belong; None if their paths begin with a part.
        format_name: the file format, for the text of errors.

    Raises:
        AdapterError: a path begins with no part and ``part_name`` is None, or a path begins with a
            part and ``part_name`` is not None.
    """
    part_by_weight = {change.weight: part_of(change.module) for change in changes}
    if part_name is None and all(part_by_weight.values()):
        return {
            change.weight: (part_by_weight[change.weight], change.module.partition(".")[2])
            for change in changes
        }
    if part_name is None:
        unclear_weight = next(weight for weight, part in part_by_weight.items() if not part)
        problem = f"{unclear_weight!r}, which does not say which model of a pipeline it belongs to"
        raise AdapterError(
            problem, f"a part for a {format_name} file", f"give part: one of {', '.join(PARTS)}"
        )
    if any(part_by_weight.values()):
        prefixed_weight = next(weight for weight, part in part_by_weight.items() if part)
        raise AdapterError(
            f"part {part_name!r} and a path {prefixed_weight!r} with one", "one of both", "leave part out"
        )
    return {change.weight: (part_name, change.module) for change in changes}


def choose_parts(
    layer_parts: Iterable[str], base: BaseFacts, part_name: str | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Choose the parts of a file to read.

    Args:
        layer_parts: the part of each layer of the file.
        part_name: the part that the user chose, if any.

    Returns:
        (the prefix of each part's paths in the base, one sentence for each part that is not read).

    Raises:
        AdapterError: the file has several parts and the base is one of them, or the file lacks the
            chosen part.
    """
    counts = Counter(layer_parts)
    layer_counts = {name: counts[name] for name in PARTS if name in counts}
    if part_name is not None and part_name not in layer_counts:
        raise AdapterError(
            f"part {part_name!r}, of which the file has nothing",
            listing(layer_counts),
            "choose one",
        )
    # a child "model" of a language model is no part of an image pipeline
    base_parts = {name.partition(".")[0] for name in base.shapes} & (set(layer_counts) - {"model"})
    if part_name is None and len(layer_counts) == 1 and not base_parts:
        return dict.fromkeys(layer_counts, ""), ()
    if part_name is None and (base_parts or not base.shapes):
        missing_parts = set(layer_counts) - base_parts if base.shapes else set()
        if missing_parts:
            problem = f"layers of {listing(sorted(missing_parts))}, which this base lacks"
            raise AdapterError(
                problem, f"those of {listing(sorted(base_parts))}", "choose a part, or give both"
            )
        return {name: f"{name}." for name in layer_counts}, ()
    if part_name is None:
        counts_text = ", ".join(f"{name} ({count} layers)" for name, count in layer_counts.items())
        do = "choose one with part, or give a module that holds them as children of these names"
        raise AdapterError(f"several models in one file: {counts_text}", "those of the base", do)
    left_out = [
        f"{count} layers of {name}: another part was asked for"
        for name, count in layer_counts.items()
        if name != part_name
    ]
    return {part_name: f"{part_name}." if part_name in base_parts else ""}, tuple(left_out)
