"""The names of the models of an image pipeline (its parts) in file formats.

    part              paths, and diffusers     kohya
    unet              unet.<path>              lora_unet_<path with _ for .>
    transformer       transformer.<path>       lora_transformer_… (and lora_unet_…)
    text_encoder      text_encoder.<path>      lora_te_…, lora_te1_… if there are two
    text_encoder_2    text_encoder_2.<path>    lora_te2_…
    model             <path>                   lycoris_…

The text encoder of Stable Diffusion 1 is CLIP's. Its paths began with ``text_model.`` until
transformers 5, and still do in kohya's files (``lora_te_text_model_encoder_layers_0_…``). Files are
written with this prefix, because other programs read them, and read with or without it
(``path_in_base``).

An adapter of Veneer belongs to one module: either a module with the parts as its children, whose
paths begin with a part's name, or one part alone, whose paths do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from veneer.errors import AdapterError, listing, sentence
from veneer.formats._base import Adapter, BaseFacts, LowRankChange

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "model")


def part_of(path: str) -> str:
    """The part at the beginning of a path, or ""."""
    first = path.partition(".")[0]
    return first if first in PARTS and first != "model" and first != path else ""


#: the prefix of paths in CLIP's text encoder until transformers 5; files, and the encoder with a
#: projection, still have it
_CLIP, _BELOW = "text_model.", "encoder.layers."


def path_before(part_name: str, path: str) -> str:
    """The path of a part's module before transformers 5, which kohya's files use."""
    return (
        _CLIP + path if part_name.startswith("text_encoder") and path.startswith(_BELOW) else path
    )


def path_in_base(part_name: str, path: str, exists: Callable[[str], bool]) -> str:
    """The path in the base of a module in a file, with or without CLIP's prefix. ``exists``:
    whether the base has a path."""
    names = (
        path,
        path_before(part_name, path),
        path.removeprefix(_CLIP) if part_name.startswith("text_encoder") else path,
    )
    return next(filter(exists, names), path)


def refusals(adapter: Adapter) -> list[str]:
    """Reasons why a file with factors for each module cannot hold an adapter."""
    expected, do = "linear layers and convolutions in one group", "leave it out, or merge"
    odd = [change for change in adapter.changes if change.kind not in ("linear", "conv")]
    problems = [
        sentence(f"{change.weight!r}, a change of kind {change.kind}", expected, do)
        for change in odd
    ]
    full = [module_path or "the model" for module_path in adapter.full]
    return problems + [
        sentence(
            f"{module_path!r} trained in full", "low-rank changes", "merge the adapter instead"
        )
        for module_path in full
    ]


def locate_modules(
    changes: Sequence[LowRankChange], part_name: str | None, kind: str
) -> dict[str, tuple[str, str]]:
    """(part, path in it) of each change's module, by its weight. ``AdapterError``: the paths name
    no part and none is given, or the paths name a part and one is given."""
    inside = {change.weight: part_of(change.module) for change in changes}
    if part_name is None and all(inside.values()):
        return {
            change.weight: (inside[change.weight], change.module.partition(".")[2])
            for change in changes
        }
    if part_name is None:
        bare = next(weight for weight, first in inside.items() if not first)
        problem = f"{bare!r}, which does not say which model of a pipeline it belongs to"
        raise AdapterError(
            problem, f"a part for a {kind} file", f"give part: one of {', '.join(PARTS)}"
        )
    if any(inside.values()):
        both = next(weight for weight, first in inside.items() if first)
        raise AdapterError(
            f"part {part_name!r} and a path {both!r} with one", "one of both", "leave part out"
        )
    return {change.weight: (part_name, change.module) for change in changes}


def choose_parts(
    layers: Iterable[str], base: BaseFacts, part_name: str | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Choose the parts of a file to read: (for each part, the prefix of its paths in the base; the
    parts that are not read). ``layers``: the part of each layer of the file. ``AdapterError``:
    several parts for a base that is one of them, or a part that the file lacks."""
    counts = Counter(layers)
    layer_counts = {name: counts[name] for name in PARTS if name in counts}
    if part_name is not None and part_name not in layer_counts:
        raise AdapterError(
            f"part {part_name!r}, of which the file has nothing",
            listing(layer_counts),
            "choose one",
        )
    # a child "model" of a language model is no part of a pipeline
    present = {name.partition(".")[0] for name in base.shapes} & (set(layer_counts) - {"model"})
    if part_name is None and len(layer_counts) == 1 and not present:
        return dict.fromkeys(layer_counts, ""), ()
    if part_name is None and (present or not base.shapes):
        lacking = set(layer_counts) - present if base.shapes else set()
        if lacking:
            problem = f"layers of {listing(sorted(lacking))}, which this base lacks"
            raise AdapterError(
                problem, f"those of {listing(sorted(present))}", "choose a part, or give both"
            )
        return {name: f"{name}." for name in layer_counts}, ()
    if part_name is None:
        counts = ", ".join(f"{name} ({count} layers)" for name, count in layer_counts.items())
        do = "choose one with part, or give a module that holds them as children of these names"
        raise AdapterError(f"several models in one file: {counts}", "those of the base", do)
    left_out = [
        f"{count} layers of {name}: another part was asked for"
        for name, count in layer_counts.items()
        if name != part_name
    ]
    return {part_name: f"{part_name}." if part_name in present else ""}, tuple(left_out)
