"""The components of an image pipeline (its models): their names, and which one a path or a file
means. The table of kohya's prefixes is in ``kohya.py``.

    component         paths; keys of diffusers     keys of kohya
    unet              unet.<path>                  lora_unet_<path, each dot as _>
    transformer       transformer.<path>           lora_transformer_… (and lora_unet_…)
    text_encoder      text_encoder.<path>          lora_te_…, or lora_te1_… if there are two
    text_encoder_2    text_encoder_2.<path>        lora_te2_…
    model             <path>                       lycoris_…

The text encoder of Stable Diffusion 1 is CLIP's. Its paths began with ``text_model.`` until
transformers 5, and kohya's files still contain this prefix
(``lora_te_text_model_encoder_layers_0_…``). Veneer writes files with the prefix, because other
programs expect it, and reads files with or without it (``path_in_base``).

An adapter of Veneer belongs to one module. Either the components are children of this module, and
the adapter's paths begin with the name of a component. Or the module is itself a component, and the
option ``part`` of a conversion names it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from veneer.errors import AdapterError, listing, sentence
from veneer.formats._base import Adapter, BaseFacts, LowRankChange

#: the names of pipeline components
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "model")


def component_of(path: str) -> str:
    """The pipeline component that a path begins with; "" if it begins with no component."""
    first_segment = path.partition(".")[0]
    is_component = first_segment in PARTS and first_segment not in ("model", path)
    return first_segment if is_component else ""


#: the prefix of paths in ``CLIPTextModel`` until transformers 5, and how a path without the prefix
#: begins. Kohya's files have the prefix. ``CLIPTextModelWithProjection`` has it in every release
_CLIP_PREFIX, _CLIP_LAYERS = "text_model.", "encoder.layers."


def path_before_transformers_5(component: str, path: str) -> str:
    """The path that a module of a pipeline component had before transformers 5, and still has in
    kohya's files. ``path``: its path in the component."""
    return (
        _CLIP_PREFIX + path
        if component.startswith("text_encoder") and path.startswith(_CLIP_LAYERS)
        else path
    )


def path_in_base(component: str, path: str, exists: Callable[[str], bool]) -> str:
    """The path that a module has in the base: its ``path`` in a file, with or without CLIP's prefix
    ``text_model.``. ``exists``: a function that tells whether the base has a module at a path. If
    the base has none at any of these paths, the result is ``path``."""
    candidates = (
        path,
        path_before_transformers_5(component, path),
        path.removeprefix(_CLIP_PREFIX) if component.startswith("text_encoder") else path,
    )
    return next(filter(exists, candidates), path)


def refusal_reasons(adapter: Adapter) -> list[str]:
    """The reasons why a format with one A and one B for each module cannot hold ``adapter``, as
    error texts; empty if it can."""
    expected, advice = "linear layers and convolutions in one group", "leave it out, or merge"
    problems = [
        sentence(f"{change.weight!r}, a change of kind {change.kind}", expected, advice)
        for change in adapter.changes
        if change.kind not in ("linear", "conv")
    ]
    full_modules = [module_path or "the model" for module_path in adapter.full]
    return problems + [
        sentence(
            f"{module_path!r} trained in full", "low-rank changes", "merge the adapter instead"
        )
        for module_path in full_modules
    ]


def locate_modules(
    changes: Sequence[LowRankChange], component: str | None, format_name: str
) -> dict[str, tuple[str, str]]:
    """(pipeline component, path in the component) of each changed module, by the name of the
    changed weight.

    Args:
        component: the component that all changes belong to; None if their paths begin with one.
        format_name: the file format, for the text of errors.

    Raises:
        AdapterError: a path begins with no component and ``component`` is None, or a path begins
            with a component and ``component`` is not None.
    """
    component_by_weight = {change.weight: component_of(change.module_path) for change in changes}
    if component is None and all(component_by_weight.values()):
        return {
            change.weight: (
                component_by_weight[change.weight],
                change.module_path.partition(".")[2],
            )
            for change in changes
        }
    if component is None:
        unclear_weight = next(
            weight_name for weight_name, name in component_by_weight.items() if not name
        )
        raise AdapterError(
            f"{unclear_weight!r}, which does not say which model of a pipeline it belongs to",
            f"a part for a {format_name} file",
            f"give part: one of {', '.join(PARTS)}",
        )
    if any(component_by_weight.values()):
        prefixed_weight = next(
            weight_name for weight_name, name in component_by_weight.items() if name
        )
        raise AdapterError(
            f"part {component!r} and a path {prefixed_weight!r} with one",
            "one of both",
            "leave part out",
        )
    return {change.weight: (component, change.module_path) for change in changes}


def choose_components(
    layer_components: Iterable[str], base: BaseFacts, component: str | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Choose the pipeline components of a file that are read.

    Args:
        layer_components: the component of each layer of the file.
        component: the component that the user chose, if any.

    Returns:
        (the prefix of the paths in the base, by component; one sentence for each component that is
        not read).

    Raises:
        AdapterError: the file has several components and the base is a single one or lacks some of
            them; or the file lacks the chosen component.
    """
    counts = Counter(layer_components)
    layer_counts = {name: counts[name] for name in PARTS if name in counts}
    if component is not None and component not in layer_counts:
        raise AdapterError(
            f"part {component!r}, of which the file has nothing",
            listing(layer_counts),
            "choose one",
        )
    # a language model may have a child "model", which is no pipeline component
    base_components = {name.partition(".")[0] for name in base.shapes} & (
        set(layer_counts) - {"model"}
    )
    if component is None and len(layer_counts) == 1 and not base_components:
        return dict.fromkeys(layer_counts, ""), ()
    if component is None and (base_components or not base.shapes):
        missing_components = set(layer_counts) - base_components if base.shapes else set()
        if missing_components:
            raise AdapterError(
                f"layers of {listing(sorted(missing_components))}, which this base lacks",
                f"those of {listing(sorted(base_components))}",
                "choose a part, or give both",
            )
        return {name: f"{name}." for name in layer_counts}, ()
    if component is None:
        counts_text = ", ".join(f"{name} ({count} layers)" for name, count in layer_counts.items())
        raise AdapterError(
            f"several models in one file: {counts_text}",
            "those of the base",
            "choose one with part, or give a module that holds them as children of these names",
        )
    left_out = [
        f"{count} layers of {name}: another part was asked for"
        for name, count in layer_counts.items()
        if name != component
    ]
    return {component: f"{component}." if component in base_components else ""}, tuple(left_out)
