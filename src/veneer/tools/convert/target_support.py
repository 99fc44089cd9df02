"""Limits of the target format: errors for changes that it cannot hold, a list of other losses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from veneer.adapter_files import UnverifiedAdapter
from veneer.adapter_files.folder import AdapterFiles
from veneer.adapter_files.peft_deviations import deviations
from veneer.adapter_files.peft_mapping import means_parameter, ref_at
from veneer.attach import Names
from veneer.errors import AdapterError, listing, raise_all, sentence
from veneer.formats import FORMATS, Format, peft, peft_behaviour, peft_fields
from veneer.layers import kind_for
from veneer.tools.convert.base_info import BaseInfo


def require_supported(
    saved: AdapterFiles, source_format: str, target: Format, base_info: BaseInfo
) -> None:
    """Refuse changes that PEFT computes in another way than Veneer does, if either format is
    PEFT's. Without a model, also refuse folders with factors that do not determine the change: a
    start that PEFT subtracts from the base, a bias beside B.

    Raises:
        AdapterError: ``target`` cannot hold the adapter.
    """
    if target.name not in ("veneer", "peft"):
        saved.refuse_invocation_tokens(f"format {target.name!r}")
    # with a model, `install_from` makes these checks
    unchecked = target.name not in ("veneer", "dense") or base_info.module is None
    if unchecked:
        peft_fields.check_config(saved.peft_config, saved.record is not None)
        output_changes = [
            name
            for name, change in saved.metadata.get("changes", {}).items()
            if change.get("module_only")
        ]
        if output_changes and not target.peft:
            problem = (
                f"changes of what modules give ({listing(output_changes, 3)}), whose weights"
                " others read unchanged"
            )
            raise AdapterError(
                problem,
                "changes of weights",
                'keep the adapter beside its base, or convert it to "peft"',
            )
    if target.peft and (reason := peft.not_for_peft(saved.peft_config)) is not None:
        problem = f"an adapter that PEFT would apply in another way ({reason})"
        raise AdapterError(
            problem, "changes that PEFT computes", "merge it, or convert it to dense"
        )
    if target.peft and saved.tuner is not None:
        raise_all(
            AdapterError,
            f"{saved.path} cannot be LoRA",
            list(_convolution_problems(saved, base_info)),
        )
    if unchecked and not target.peft and FORMATS[source_format].peft and saved.record is None:
        _require_weight_changes(saved, target, base_info.structure)


def list_losses(saved: AdapterFiles, target_format: str) -> list[str]:
    """Contents of the source that ``target_format`` cannot store and that change no output."""
    hashes = "hashes" if target_format == "dense" else "fingerprints of the base, hashes"
    variant, dropout = saved.config.variant, saved.config.dropout
    to_veneer, to_folder = target_format == "veneer", target_format in ("veneer", "peft")
    losses = [
        (saved.metadata and not to_veneer, f"the record: {hashes} and provenance"),
        (
            saved.adapter_parameters and not to_veneer,
            f"the numbers of variant {variant!r}; the change that they amount to is kept",
        ),
        (
            saved.tokens and not to_folder,
            "the rows of trained tokens; kept is how they differ from this base's own, so it fits"
            " this base alone",
        ),
        (dropout and not to_folder, f"dropout {dropout:g}, which counts in training alone"),
    ]
    return [description for is_lost, description in losses if is_lost]


def _convolution_problems(saved: AdapterFiles, base_info: BaseInfo) -> Iterator[str]:
    """Convolutions of another tuner's adapter that PEFT's LoRA would compute in another way."""
    convolutions = [layer.target_path for layer in saved.low.values() if layer.A.dim() > 2]
    if not convolutions:
        return
    assert base_info.module is not None  # the kernels' shapes came from the model
    names = Names(base_info.module())
    for path in convolutions:
        module = names.modules[names.canonical[path]]
        reason = peft_behaviour.deviation_reason(kind_for(module, "weight").name, module)
        if reason is not None:
            yield sentence(
                f"a change of {path!r}: {reason}", "layers that PEFT's LoRA computes", "merge it"
            )


def _require_weight_changes(saved: AdapterFiles, target: Format, model: nn.Module | None) -> None:
    """``AdapterError`` for changes that PEFT does not apply to weights. Without a model this cannot
    be checked: ``UnverifiedAdapter`` warns of that."""
    if model is None:
        layer_options = "a dilation, a padding mode or a forward of its own"
        warnings.warn(
            f"Nobody checked what PEFT makes of {saved.path}: where a module reads another one's"
            f" weight, or a layer has {layer_options}, that is no change of the weight, which is"
            f" what {target.name!r} holds. Give the model as base to have it checked.",
            UnverifiedAdapter,
            stacklevel=4,
        )
        return
    names, config, problems = Names(model), saved.peft_config, []
    for path, layer in saved.low.items():
        ref = ref_at(names, path, config)
        if ref is None:
            continue
        past, reason = deviations(
            names, ref, layer, means_parameter(names, ref, config), saved.tuner
        )
        if reason := past or reason:
            problem = (
                f"a change of {layer.target_path!r} that PEFT applies in another way: {reason}"
            )
            problems.append(sentence(problem, "a change of the weight", "use PEFT for it"))
    raise_all(AdapterError, "This adapter is none of the weights", problems)
